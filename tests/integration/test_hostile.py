"""Folders that others made: nothing that they name runs unless it is ours or trusted."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from owl_deploy.errors import BadInput, EnvironmentFailed, OwlError
from owl_deploy.export.parity import Session
from owl_deploy.export.targets import export
from owl_deploy.inference import EngineProcess
from owl_deploy.runtime import LIBRARY_NAME, library_path
from owl_deploy.utils.artefact import MANIFEST, sha256

try:
    library_path()
except EnvironmentFailed as error:
    pytest.skip(str(error), allow_module_level=True)

CONFIG = "genai_config.json"
# A library that leaves a trace as soon as it is loaded, and otherwise is one of operators.
EVIL = """
#include <stdio.h>
__attribute__((constructor)) static void run(void) { fclose(fopen(TRACE, "w")); }
__attribute__((visibility("default"))) void* RegisterCustomOps(void* o, const void* a) { return 0; }
"""


@pytest.fixture(scope="module")
def exported(llama, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("hostile") / "deployment"
    export(llama, folder, target="owl", precision="int8")
    return folder


@pytest.fixture
def deployment(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "deployment"))


@pytest.fixture
def trace(tmp_path) -> Path:
    return tmp_path / "trace"


@pytest.fixture
def evil(tmp_path, trace) -> Path:
    source, library = tmp_path / "evil.c", tmp_path / "evil.so"
    source.write_text(EVIL)
    command = ["cc", "-shared", "-fPIC", f'-DTRACE="{trace}"', "-o", library, source]
    subprocess.run(list(map(str, command)), check=True)
    return library


def change(deployment: Path, *keys: str, value) -> None:
    """Put `value` at `keys` of the settings."""
    config = json.loads((deployment / CONFIG).read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
    inner[keys[-1]] = value
    (deployment / CONFIG).write_text(json.dumps(config))


def name_library(deployment: Path, name: str) -> None:
    change(deployment, "model", "decoder", "session_options", "custom_ops_library", value=name)


def list_again(deployment: Path) -> None:
    """Make the manifest agree with whatever lies there now."""
    manifest = json.loads((deployment / MANIFEST).read_text())
    manifest["files"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in deployment.iterdir()
        if path.name != MANIFEST
    }
    (deployment / MANIFEST).write_text(json.dumps(manifest))


def unlisted(deployment, evil):
    shutil.copy(evil, deployment)
    name_library(deployment, evil.name)


def absolute(deployment, evil):
    name_library(deployment, str(evil))


def upwards(deployment, evil):
    name_library(deployment, f"../{evil.name}")


def replaced(deployment, evil):
    shutil.copy(evil, deployment / LIBRARY_NAME)


def other_graph(deployment, evil):
    shutil.copy(deployment / "model.onnx", deployment / "other.onnx")
    change(deployment, "model", "decoder", "filename", value="other.onnx")


def named_twice(deployment, evil):
    """Where the first of two equal keys counts for one reader and the last for another."""
    unlisted(deployment, evil)
    text = (deployment / CONFIG).read_text()
    first = '"session_options": {'
    (deployment / CONFIG).write_text(text.replace(first, f"{first}}}, {first}", 1))


def in_a_pipeline(deployment, evil):
    shutil.copy(evil, deployment)
    options = {"custom_ops_library": evil.name}
    part = {"all": {"filename": "model.onnx", "session_options": options}}
    change(deployment, "model", "decoder", "pipeline", value=[part])


def in_another_part(deployment, evil):
    shutil.copy(evil, deployment)
    options = {"custom_ops_library": evil.name}
    part = {"filename": "model.onnx", "session_options": options}
    change(deployment, "model", "embedding", value=part)


def profile(deployment, evil):
    """Would write a file of the session's."""
    change(
        deployment, "model", "decoder", "session_options", "enable_profiling", value=str(evil) + "x"
    )


def profile_of_a_run(deployment, evil):
    """Would write a file for every token."""
    options = {"enable_profiling": str(evil) + "x"}
    change(deployment, "model", "decoder", "run_options", value=options)


def other_tokenizer(deployment, evil):
    """Would read files beside the folder."""
    change(deployment, "model", "tokenizer_dir", value="../elsewhere")


CASES = (
    *(unlisted, absolute, upwards, replaced, other_graph),
    *(named_twice, in_a_pipeline, in_another_part, profile),
    *(profile_of_a_run, other_tokenizer),
)


def by_generate(owl, deployment, text_file):
    return owl("generate", deployment, "The river", "-n", 2)


def by_perplexity(owl, deployment, text_file):
    return owl("eval", deployment, "--perplexity", text_file, "--window", 32, "--windows", 1)


def by_harness(owl, deployment, text_file):
    tasks = ("--tasks", "owl_sentences", "--tasks-path", Path("tests/tasks").absolute())
    return owl("eval", deployment, *tasks, "--limit", 1, "--window", 256)


def by_bench(owl, deployment, text_file):
    asked = ("--scenario", "decode", "--context", 64, "--pairs", 1)
    return owl("bench", deployment, "--baseline", deployment, *asked)


def by_engine(owl, deployment, text_file):
    return _code(lambda: _run_engine(deployment))


def by_parity(owl, deployment, text_file):
    return _code(lambda: Session(deployment).step([1, 2, 3]))


def _run_engine(deployment):
    with EngineProcess("owl", deployment, context=64) as process:
        process.request("decode", prompt=[1, 2, 3], steps=1, warmup=0)


def _code(action):
    try:
        action()
    except OwlError as error:
        return error.exit_code, "", str(error)
    return 0, "", ""


VERBS = (by_generate, by_perplexity, by_harness, by_bench)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.__name__)
def test_a_changed_folder_is_refused(owl, deployment, evil, trace, text_file, case, verb):
    case(deployment, evil)
    code, _, err = verb(owl, deployment, text_file)
    assert code == 2, err
    assert [line.split(" ")[0] for line in err.splitlines()].count("owl:") == 1
    assert not trace.exists()
    assert owl("verify", deployment)[0] in (1, 2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("verb", [*VERBS, by_engine, by_parity], ids=lambda verb: verb.__name__)
def test_a_folder_that_lists_what_it_names_runs_none_of_it(
    owl, deployment, evil, trace, text_file, case, verb
):
    case(deployment, evil)
    list_again(deployment)
    code, _, err = verb(owl, deployment, text_file)
    # Ours is loaded in the place of what has its name; all else is refused.
    assert code == (0 if case is replaced else 2), err
    assert not trace.exists()


@pytest.mark.parametrize("case", [unlisted, replaced], ids=lambda case: case.__name__)
def test_a_trusted_library_runs(owl, deployment, evil, trace, text_file, case):
    case(deployment, evil)
    list_again(deployment)
    assert owl("verify", deployment)[0] == (1 if case is unlisted else 0)
    assert not trace.exists()
    code, _, err = owl("generate", deployment, "The river", "-n", 2, "--trust-library")
    assert trace.exists()  # and it brings no operators, so that the graph cannot run
    assert code == 4, err


@pytest.mark.parametrize("name", ["/evil.so", "../evil.so", "a\\b.so", "..", "c:evil.so"])
def test_trust_does_not_lead_out_of_the_folder(deployment, name):
    name_library(deployment, name)
    list_again(deployment)
    with pytest.raises(BadInput, match="not a file of the folder"):
        EngineProcess("owl", deployment, trust_library=True).__enter__()


def test_the_asking_is_one_sentence(owl, deployment, evil):
    unlisted(deployment, evil)
    list_again(deployment)
    _, _, err = owl("generate", deployment, "The river")
    assert err.strip().endswith(
        "would run evil.so, a library that is not owl's. If you trust whoever made it, "
        "give --trust-library."
    )


def test_a_hub_cache_opens(owl, exported, tmp_path, text_file):
    """Every file a link into one folder of blobs, as the Hub's client leaves them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in exported.iterdir():
        shutil.copy(path, blobs / sha256(path))
        (snapshot / path.name).symlink_to(Path("../../blobs") / sha256(path))
    assert by_generate(owl, snapshot, text_file)[0] == 0
    assert by_perplexity(owl, snapshot, text_file)[0] == 0
    assert owl("verify", snapshot)[0] == 0


def test_weights_behind_a_link_elsewhere_are_refused(owl, deployment, tmp_path, text_file):
    (deployment / "model.onnx.data").rename(tmp_path / "elsewhere")
    (deployment / "model.onnx.data").symlink_to(tmp_path / "elsewhere")
    code, _, err = by_generate(owl, deployment, text_file)
    assert code == 2
    assert "only from the graph's own folder. Copy the deployment" in err
    shutil.copytree(deployment, tmp_path / "copy")  # follows links, as cp -rL does
    assert by_generate(owl, tmp_path / "copy", text_file)[0] == 0


def test_verify_for_machines(owl, deployment):
    code, out, _ = owl("verify", deployment, "--json")
    found = json.loads(out)
    assert (code, found["whole"], found["operators"]) == (0, True, "this installation's")
    (deployment / "note.txt").write_text("")
    assert owl("verify", deployment)[0] == 0  # nothing reads it
    (deployment / "tokenizer.json").write_text("{}")
    (deployment / "chat_template.jinja").write_text("evil")
    code, out, _ = owl("verify", deployment, "--json")
    states = {row["name"]: row["state"] for row in json.loads(out)["rows"]}
    assert code == 1
    changed = {name: state for name, state in states.items() if state != "as exported"}
    assert changed == {
        "tokenizer.json": "edited",
        "chat_template.jinja": "added",
        "note.txt": "not loaded",
    }
    assert json.loads(out)["fingerprint"] != found["fingerprint"]


def test_verify_shows_what_a_terminal_would_obey(owl, deployment):
    (deployment / "\x1b[2Knote").touch()
    code, out, _ = owl("verify", deployment)
    assert (code, "\\x1b[2Knote" in out, "\x1b" in out) == (0, True, False)
