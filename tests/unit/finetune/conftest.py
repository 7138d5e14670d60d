import pytest

from owl_deploy.compression.run import prune
from owl_deploy.compression.settings import PruneSettings
from tests import tiny

# Without dropout, where a family has it by default: an oracle draws other numbers.
STEADY = {"opt": {"dropout": 0.0, "attention_dropout": 0.0}}


def pruned(family, folder):
    """A tiny model of a family, and that model with 60 % of its blocks' weights removed."""
    dense = tiny.write_model(family, folder / "dense", **STEADY.get(family, {}))
    settings = PruneSettings.checked(method="magnitude", allocation="uniform", sparsity=0.6)
    prune(dense, folder / "sparse", settings, None)
    return dense, folder / "sparse"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Dense and pruned checkpoint of a family, made once."""
    made = {}

    def of(family):
        if family not in made:
            made[family] = pruned(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of
