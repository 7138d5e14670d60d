"""The one folder outside its outputs that owl writes: engine environments and the demo's input."""

import os
from pathlib import Path

import platformdirs


def cache_dir() -> Path:
    """The cache folder, made if need be: `OWL_CACHE`, else the user's own of the system."""
    folder = Path(os.environ.get("OWL_CACHE") or platformdirs.user_cache_dir("owl_deploy"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder
