import itertools

import pytest

NUMBERS = itertools.count()  # what is in memory outlives a test


@pytest.fixture
def store():
    """An empty store in memory."""
    from owl_deploy.distributed.cluster.store import Store

    return Store(f"memory://bucket/{next(NUMBERS)}")
