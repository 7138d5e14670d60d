"""What a process knows of its group; what several do together is tests/integration's."""

import math
import subprocess
import sys

import pytest
import torch

from owl_deploy.errors import BadInput
from owl_deploy.utils import ranks
from owl_deploy.utils.ranks import ALONE, Ranks

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "none",
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
}


def test_a_process_alone_pays_nothing():
    code = (
        "import sys; from owl_deploy.utils import ranks\n"
        "one = ranks.join({'torch': '2'})\n"
        "assert one.gathered(3) == [3] and one.from_leader(lambda: 4) == 4\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_alone_everything_is_as_it_was():
    tensor = torch.arange(6.0)
    ALONE.reduce(tensor, 0)
    assert ALONE.leads
    assert ALONE.part(tensor).equal(torch.arange(6.0))
    assert ALONE.summed(tensor) is tensor
    merged = ALONE.merged({"a": tensor}, torch.device("cpu"))
    assert merged["a"] is tensor


@pytest.mark.parametrize(("rows", "size"), [(5, 2), (5, 3), (6, 3), (4, 4)])
def test_the_parts_are_all_there_is_and_about_equal(rows, size):
    windows = torch.arange(rows * 2).view(rows, 2)
    parts = [Ranks(rank, size).part(windows) for rank in range(size)]
    assert torch.cat(parts).equal(windows)
    assert {len(part) for part in parts} <= {rows // size, -(-rows // size)}


def test_torchruns_environment_says_which_process_this_is(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    free = ranks.psutil.virtual_memory()
    monkeypatch.setattr(ranks.psutil, "virtual_memory", lambda: free)
    monkeypatch.setattr(ranks.container, "free_memory", lambda: math.inf)
    assert not ranks.leads()
    assert ranks.local_rank() == 1
    assert ranks.free_memory() == free.available // 4
    with ranks.one_voice() as speaks:
        assert not speaks
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")  # a scheduler's variables alone are no group
    assert ranks.leads()
    assert ranks.local_rank() is None
    assert ranks.free_memory() == free.available
    monkeypatch.setattr(ranks.container, "free_memory", lambda: 1000.0)
    assert ranks.free_memory() == 1000
    assert ranks.join({}) is ALONE
    with ranks.one_voice() as speaks:
        assert speaks


def test_unlike_versions_are_named_both():
    told = [{"torch": "2.9", "python": "3.11"}] * 2 + [{"torch": "2.8", "python": "3.11"}]
    ranks._refuse_unlike(told[:2])
    with pytest.raises(BadInput, match=r"rank 0 has torch 2\.9, rank 2 2\.8"):
        ranks._refuse_unlike(told)


@pytest.mark.parametrize("joined", [True, False])
def test_a_process_leaves_with_what_it_has_still_to_do(joined):
    """One of a group although a thread goes on, which the interpreter would wait for."""
    code = (
        "import atexit, threading; from owl_deploy.utils import ranks\n"
        "atexit.register(print, 'at exit')\n"
        "print('printed', end=' ')\n"
        f"if {joined}:\n"
        "    ranks._stores.append(None)\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "ranks.leave(3)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "printed at exit\n", "")


def test_what_differs_between_processes_is_named(monkeypatch):
    others = {"text": "a", "dtype": "torch.bfloat16"}
    monkeypatch.setattr(Ranks, "gathered", lambda self, told: [told, others])
    Ranks(0, 2).check_alike(dict(others))
    with pytest.raises(BadInput, match=r"the same dtype\. .* and options, and name --dtype\.$"):
        Ranks(0, 2).check_alike({"text": "a", "dtype": "torch.float32"})
    with pytest.raises(BadInput, match=r"the same text\. Give .* files and options\.$"):
        Ranks(0, 2).check_alike({"text": "b"})
    with pytest.raises(BadInput, match=r"the same (dtype|tasks)\."):  # each has what one lacks
        Ranks(0, 2).check_alike({"text": "a", "tasks": []})
