from pathlib import Path
from typing import Any

import pytest

from owl_deploy.compression.request import as_settings
from owl_deploy.compression.run import prune
from owl_deploy.compression.settings import PruneSettings
from owl_deploy.errors import BadInput

MAGNITUDE = {"method": "magnitude", "allocation": "uniform", "sparsity": 0.5}


def test_settings_may_be_those_that_are_given() -> None:
    assert as_settings(MAGNITUDE) == PruneSettings.checked(**MAGNITUDE)
    with pytest.raises(BadInput, match="Unknown key 'sparsty'"):
        as_settings({"sparsty": 0.5})


@pytest.mark.parametrize("strange", ["owl-wanda-70", None])
def test_what_is_no_settings_is_refused(strange: Any) -> None:
    with pytest.raises(BadInput, match=r"which are none\. Give PruneSettings, a dict"):
        as_settings(strange)


def test_a_pruning_takes_both(llama: Path, text_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # the second time with `force`, which looks at the text before
        made = prune(llama, out, MAGNITUDE, text_file, force=out.is_dir())
    assert made.settings.sparsity == MAGNITUDE["sparsity"]
