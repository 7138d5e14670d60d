"""Prune a causal language model, export it to ONNX, and measure what that bought on a CPU.

From Python: `owl_deploy.api`. Importing this package loads no torch: the verbs live in sub-packages
that do.
"""

import os

# ONNX Runtime's own builds report their sessions to Microsoft, and leave an identifier of the
# machine on the disk, unless this is set before they load. What owl starts inherits it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = ["__version__"]

TYPE_CHECKING = False  # by its name; `typing` would be imported before `owl` can take Ctrl-C
if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        """The version, read when it is first asked for: that imports as much as all else before."""
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from importlib.metadata import version

        found = globals()[name] = version("owl-deploy")
        return found
