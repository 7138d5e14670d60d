"""Prune a causal language model, export it to ONNX, and measure what that bought on a CPU.

From Python: `owl_deploy.api`. Importing this package loads no torch: the verbs live in sub-packages
that do.
"""

from importlib.metadata import version

__version__ = version("owl-deploy")
__all__ = ["__version__"]
