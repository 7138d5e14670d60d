"""The one folder outside its outputs that owl writes.

Engine environments, the demo's input, and what takes long to find and may be needed again.
"""

import functools
import os
from pathlib import Path

import platformdirs

from owl_deploy.errors import EnvironmentFailed


def cache_path() -> Path:
    """Where the cache folder is, or would be: `OWL_CACHE`, else the user's own of the system.

    Raises `EnvironmentFailed` where there is neither.
    """
    try:
        return _place(os.environ.get("OWL_CACHE") or platformdirs.user_cache_dir("owl_deploy"))
    except RuntimeError as error:  # neither HOME nor an entry in /etc/passwd
        raise EnvironmentFailed(
            "This user has no home folder to keep a cache in.", "Set OWL_CACHE to a folder."
        ) from error


@functools.cache
def _place(told: str) -> Path:
    """Where that is, from the folder of the first who asks: a cluster's task then works in another,
    and a relative path would mean a second cache there."""
    return Path(told).absolute()


def cache_dir(*parts: str) -> Path:
    """The cache folder, or the folder `parts` in it, made if need be.

    Raises `EnvironmentFailed` where it cannot be written.
    """
    folder = cache_path().joinpath(*parts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "no permission")
    except OSError as error:
        raise EnvironmentFailed(
            f"The cache folder {folder} cannot be written ({error.strerror}).",
            "Set OWL_CACHE to a folder that can.",
        ) from error
    return folder
