"""The open sparse engine: packed weights and the ONNX Runtime operators that read them."""

import os
import sys
from pathlib import Path

from owl_deploy.errors import BadInput, EnvironmentFailed
from owl_deploy.runtime.native import Library

_CHECKOUT = (Path(__file__).parents[2] / "CMakeLists.txt").is_file()
_NAMES = {
    "linux": "libowl_runtime.so",
    "darwin": "libowl_runtime.dylib",
    "win32": "owl_runtime.dll",
}
LIBRARY_NAMES = frozenset(_NAMES.values())
LIBRARY_NAME = _NAMES.get(sys.platform, _NAMES["linux"])


def library_path() -> Path:
    """The operator library: `$OWL_RUNTIME_LIBRARY`, or the one beside this file."""
    override = os.environ.get("OWL_RUNTIME_LIBRARY")
    path = Path(override) if override else Path(__file__).parent / LIBRARY_NAME
    if not path.is_file():
        then = "`python -m owl_deploy.runtime.build`" if _CHECKOUT else "install owl-deploy again"
        raise EnvironmentFailed(
            f"The owl engine's library {path} is missing.",
            "It needs a C++ compiler and ONNX Runtime's header: `apt install g++ cmake "
            f"libonnxruntime-dev`, then {then}. Everything but the owl engine works without it.",
        )
    return path


def kernels() -> str | None:
    """The instruction set whose kernels run here, such as "avx512": `$OWL_ISA`, or the best.

    None where the library is missing or is none. Raises `BadInput` where `$OWL_ISA` names kernels
    that do not run here.
    """
    try:
        library = Library(library_path())
    except (EnvironmentFailed, OSError, AttributeError):
        return None
    try:
        return library.best_isa()
    except ValueError as error:
        raise BadInput(f"{error}.", "Set it to one of them, or not at all.") from None
