"""The inference engines, one row each: what drives them, what they open, what is allowed."""

import re
from dataclasses import dataclass
from pathlib import Path

from owl_deploy.errors import BadInput, unknown_name

MODEL = "model.onnx"
LOOKUP = "lookup"  # a draft that is no deployment: the text itself (drivers have the word as well)
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Ink:
    """How pictures show an engine: a colour on a light and on a dark page, and a marker."""

    light: str
    dark: str
    marker: str


@dataclass(frozen=True)
class Build:
    """What is compiled for this processor, once the wheels of an environment's lock are there.

    `lock` pins the one source distribution; `module` is what it is imported as; `options` go to
    CMake; `replaced`: files of its source, and what stands in their place; of that source, the
    paths in `kept` stay, in the folder `source` of the environment.
    """

    lock: Path
    module: str
    options: tuple[str, ...] = ()
    replaced: tuple[tuple[str, Path], ...] = ()
    kept: tuple[str, ...] = ()


@dataclass(frozen=True)
class Server:
    """How an engine serves a deployment by OpenAI's API, at /v1, with its state at /health.

    `program`: a file in the folder of its Python's packages, or else that Python itself. `options`
    come after it, in which {deployment}, {port}, {threads}, {rows} (requests at once), {batch} (as
    many of them as onnxruntime-genai takes), {context} (tokens of a prompt and its answer) and
    {cache} (`rows` times as many) stand for what is asked;
    `trusting` does for a deployment with operators of its own that is trusted. `unset`: beginnings
    of the names of environment variables that would change what it does.
    """

    options: tuple[str, ...]
    program: str | None = None
    trusting: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """One inference engine: all that the rest of the package knows of it.

    `driver` is a file with a `Driver` (worker.py has its protocol); `package` the distribution
    whose version counts; `lock` the lock file of the environment it needs (None: the running Python
    has it), with what is then compiled in `build`; `targets` the deployments that it opens, the one
    made for it first. `model_file`: what tells those from other folders; where it is no ONNX graph,
    their config.json gives the size of the vocabulary, or else `vocabulary` is it. `operators`:
    whether they carry this package's. `server`: how it answers over HTTP (None: not at all).
    `least_context` and `spare_context`: the smallest cache, in tokens, that it takes, and how many
    more than it computes rightly. `skips_zeros`: whether pruned weights can make it faster.
    `evaluated_in`: the engine that evaluates its deployments faster, if not itself. `for_tests`: no
    list names it.
    """

    name: str
    driver: Path
    package: str
    targets: tuple[str, ...]
    licence: str
    ink: Ink
    model_file: str = MODEL
    vocabulary: int = 0
    operators: bool = False
    lock: Path | None = None
    build: Build | None = None
    server: Server | None = None
    pythons: tuple[str, ...] = ()
    least_context: int = 0
    spare_context: int = 0
    skips_zeros: bool = False
    evaluated_in: str | None = None
    for_tests: bool = False

    @property
    def variable(self) -> str:
        """What a page's style sheet calls its colour."""
        return re.sub(r"[^a-z0-9-]", "-", self.name)

    @property
    def shares_packages(self) -> bool:
        """Whether what is kept of it runs in this Python, with its environment's packages."""
        return self.build is not None and bool(self.build.kept)

    def context_for(self, tokens: int) -> int:
        """The context to open it with, so that it computes `tokens` tokens rightly."""
        return max(tokens + self.spare_context, self.least_context)


MOST_ROWS = 32  # that onnxruntime-genai takes in a batch
OWL_SERVE = Server(
    options=(
        # -P: nothing is imported from the folder that the benchmark is run in.
        *("-P", "-m", "owl_deploy", "serve", "{deployment}", "--port", "{port}"),
        *("--batch", "{batch}", "--waiting", "{rows}"),
        *("--context", "{context}", "--threads", "{threads}"),
    ),
    trusting=("--trust-library",),
    unset=("OWL_API_KEY",),
)
# Okabe and Ito's colours, told apart by all eyes, darker or lighter where a page needs it.
_ENGINES = (
    Engine(
        name="deepsparse",
        driver=_HERE / "drivers" / "deepsparse.py",
        package="deepsparse",
        targets=("deepsparse",),
        licence="Neural Magic Community License: evaluation in development and test only, "
        "never production; no reverse engineering. Retired by its makers in June 2025.",
        ink=Ink("#0072b2", "#56b4e9", "o"),
        lock=_HERE / "locks" / "deepsparse.txt",
        pythons=("3.11", "3.10", "3.9", "3.8"),
        # DeepSparse 1.8 gives other logits for the last tokens that its cache holds, and NaN for
        # all where the cache holds no more than two of its chunks of 64.
        least_context=192,
        spare_context=64,
        skips_zeros=True,
        evaluated_in="onnxruntime",
    ),
    Engine(
        name="onnxruntime",
        driver=_HERE / "drivers" / "onnxruntime.py",
        package="onnxruntime-genai",
        targets=("onnxruntime", "deepsparse"),
        licence="MIT: any use.",
        ink=Ink("#b84e00", "#ff9a52", "s"),
        server=OWL_SERVE,
    ),
    Engine(
        name="owl",
        driver=_HERE / "drivers" / "onnxruntime.py",
        package="onnxruntime-genai",
        targets=("owl",),
        licence="Apache-2.0 (our operators) in onnxruntime-genai (MIT): any use.",
        ink=Ink("#007d5a", "#3ccfa0", "D"),
        server=OWL_SERVE,
        operators=True,
        skips_zeros=True,
    ),
    Engine(
        name="llama.cpp",
        driver=_HERE / "drivers" / "llama_cpp.py",
        package="llama-cpp-python",
        targets=("llama.cpp",),
        licence="MIT: any use.",
        ink=Ink("#7a6a00", "#f0e442", "v"),
        model_file="model.gguf",
        lock=_HERE / "locks" / "llama.cpp.txt",
        build=Build(
            lock=_HERE / "locks" / "llama.cpp-source.txt",
            module="llama_cpp",
            # For text alone; its default is this processor's instructions. The server, without its
            # page and TLS, finds the libraries beside it.
            options=(
                *("-DLLAVA_BUILD=OFF", "-DMTMD_BUILD=OFF", "-DGGML_NATIVE=ON"),
                *("-DLLAMA_BUILD_TOOLS=ON", "-DLLAMA_TOOLS_INSTALL=ON"),
                *("-DLLAMA_USE_PREBUILT_UI=OFF", "-DLLAMA_OPENSSL=OFF"),
                *("-DCMAKE_INSTALL_LIBDIR=lib", "-DCMAKE_INSTALL_RPATH=$ORIGIN/../lib"),
            ),
            replaced=(
                (
                    "vendor/llama.cpp/tools/CMakeLists.txt",
                    _HERE / "locks" / "llama.cpp-tools.cmake",
                ),
            ),
            # The converter from checkpoints to GGUF, which the wheel leaves out.
            kept=(
                "vendor/llama.cpp/convert_hf_to_gguf.py",
                "vendor/llama.cpp/conversion",
                "vendor/llama.cpp/gguf-py/gguf",
            ),
        ),
        server=Server(
            program="bin/llama-server",
            options=(
                *("--model", "{deployment}/model.gguf", "--port", "{port}"),
                *("--parallel", "{rows}", "--ctx-size", "{cache}"),
                *("--threads", "{threads}", "--offline", "--fit", "off"),
                # Nothing is kept of a prompt: no two begin alike, and copies take time.
                *("--cache-ram", "0", "--no-cache-prompt"),
            ),
            unset=("LLAMA_",),
        ),
        # The converter needs torch and transformers: it runs in the Python that has owl, and takes
        # compiled packages from the environment, which must be of the same version.
        pythons=("3.13", "3.12", "3.11"),
    ),
    Engine(
        name="fake",
        driver=_HERE / "drivers" / "fake.py",
        package="owl-deploy",
        targets=("fake",),
        licence="Apache-2.0. Runs nothing: its latencies are written in the deployment, for tests.",
        ink=Ink("#a8528a", "#e5a3cb", "^"),
        model_file="fake.json",
        vocabulary=16,
        for_tests=True,
    ),
)
# The table: whoever adds a row, here or from outside, has another engine in all verbs.
ENGINES = {engine.name: engine for engine in _ENGINES}


def public_engines() -> list[Engine]:
    """The engines to name to people."""
    return [engine for engine in ENGINES.values() if not engine.for_tests]


def known_targets() -> list[str]:
    """Every target that some engine opens."""
    return list(dict.fromkeys(target for row in ENGINES.values() for target in row.targets))


def get_engine(name: str) -> Engine:
    """The engine called `name`; raises `BadInput` with the nearest name for an unknown one."""
    if name not in ENGINES:
        raise _unknown(name)
    return ENGINES[name]


def public_engine(name: str) -> Engine:
    """The engine that people may ask for by `name`: the same, but for those of tests."""
    engine = get_engine(name)
    if engine.for_tests:
        raise _unknown(name)
    return engine


def _unknown(name: str) -> BadInput:
    return unknown_name("engine", name, (engine.name for engine in public_engines()))


def engine_for(target: str) -> Engine:
    """The engine that a deployment's `target` is made for."""
    for engine in ENGINES.values():
        if engine.targets[0] == target:
            return engine
    raise unknown_name("deployment target", target, known_targets())


def engine_of_file(folder: Path) -> Engine | None:
    """The engine whose deployments alone have a file that `folder` has; None for an ONNX graph."""
    return next(
        (
            engine
            for engine in ENGINES.values()
            if engine.model_file != MODEL and (folder / engine.model_file).is_file()
        ),
        None,
    )
