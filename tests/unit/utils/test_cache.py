import pytest

from owl_deploy.errors import EnvironmentFailed
from owl_deploy.utils import cache


def test_a_user_without_a_home(monkeypatch):
    def no_home(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("OWL_CACHE", raising=False)
    monkeypatch.setattr(cache.platformdirs, "user_cache_dir", no_home)
    with pytest.raises(EnvironmentFailed, match="Set OWL_CACHE"):
        cache.cache_path()
