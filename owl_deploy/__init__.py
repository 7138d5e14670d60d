"""Prune a causal language model, export it to ONNX, and measure what that bought on a CPU.

From Python: `owl_deploy.api`. Importing this package loads no torch: the verbs live in sub-packages
that do.
"""

import os
from importlib.metadata import version

# ONNX Runtime's own builds report their sessions to Microsoft, and leave an identifier of the
# machine on the disk, unless this is set before they load. What owl starts inherits it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = version("owl-deploy")
__all__ = ["__version__"]
