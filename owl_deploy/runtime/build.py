"""Build the operator library in the source tree: `python -m owl_deploy.runtime.build`."""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.runtime import LIBRARY_NAME

ROOT = Path(__file__).parents[2]


def configure(folder: Path, options: Iterable[str] = ()) -> None:
    """Let CMake prepare a build in `folder`; `options` of CMakeLists.txt are switched on."""
    for tool, package in (("cmake", "cmake"), ("c++", "g++")):
        if shutil.which(tool) is None:
            raise EnvironmentFailed(
                f"`{tool}` is missing.", f"apt install {package}, or your system's equivalent."
            )
    if not (ROOT / "CMakeLists.txt").is_file():
        raise EnvironmentFailed(
            "The library's sources are not here: this is an installed package.",
            "Reinstall a wheel that carries the library, or build from a checkout.",
        )
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    switched = [f"-D{option}=ON" for option in options]
    _run(["cmake", "-S", str(ROOT), "-B", str(folder), *switched, *generator])


def build(destination: Path | None = None, options: Iterable[str] = ()) -> Path:
    """Compile the library to `destination`, by default beside this file; returns its path.

    `options` as for `configure`.
    """
    target = destination or Path(__file__).with_name(LIBRARY_NAME)
    with tempfile.TemporaryDirectory(prefix="owl-build-") as folder:
        configure(Path(folder), options)
        _run(["cmake", "--build", folder, "--parallel"])
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_suffix(".tmp")
        shutil.copyfile(Path(folder) / LIBRARY_NAME, staged)
        # A process that has the old library loaded keeps it: only the name moves.
        staged.replace(target)
    return target


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    output = done.stdout + done.stderr
    if "onnxruntime_cxx_api.h not found" in output:
        raise EnvironmentFailed(
            "ONNX Runtime's C API header is missing.",
            "apt install libonnxruntime-dev, then build again.",
        )
    raise EnvironmentFailed(
        f"`{' '.join(command[:2])}` failed.", "\n".join(output.splitlines()[-20:])
    )


def main() -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, text in (
        ("sanitize", "with the address and undefined-behaviour sanitizers"),
        ("werror", "with warnings as errors, as a change to the sources must pass"),
        ("evex", "AVX-VNNI's kernels in AVX-512's encoding, to test them without AVX-VNNI"),
    ):
        parser.add_argument(
            f"--{name}",
            dest="options",
            action="append_const",
            const=f"OWL_{name.upper()}",
            help=text,
        )
    parser.add_argument("-o", "--output", type=Path, help="where to put the library")
    arguments = parser.parse_args()
    try:
        path = build(arguments.output, arguments.options or ())
    except EnvironmentFailed as error:
        sys.exit(f"error: {error}")
    sys.stdout.write(f"{path}\n")


if __name__ == "__main__":
    main()
