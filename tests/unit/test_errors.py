import errno
import tomllib
import traceback
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException

from owl_deploy import api
from owl_deploy.errors import (
    MISSING,
    EnvironmentFailed,
    first_line,
    is_full_disk,
    is_out_of_memory,
    not_installed,
    printable,
    with_type,
)

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def packages(lines: list[str]) -> set[str]:
    names = {Requirement(line).name for line in lines}
    return {name.replace("-", "_") for name in names - {PROJECT["name"]}}


def test_every_extra_that_a_verb_wants_is_named_for_what_it_installs():
    extras = PROJECT["optional-dependencies"]
    for extra in set(MISSING.values()):
        assert {name for name, of in MISSING.items() if of == extra} == packages(extras[extra])
    assert not set(MISSING) & packages(PROJECT["dependencies"])


def test_only_a_package_of_an_extra_is_one_to_install():
    missing = ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn")
    said = not_installed(missing)
    assert said is not None
    assert "pip install 'owl-deploy[model]'" in str(said)
    assert not_installed(ModuleNotFoundError("no", name="torchlike")) is None
    assert not_installed(ImportError("no", name="torch")) is None  # there, and broken
    assert not_installed(ValueError()) is None


def test_the_api_says_so_too(monkeypatch):
    def fail(module):
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr(api, "import_module", fail)
    with pytest.raises(EnvironmentFailed, match=r"owl-deploy\[model\]"):
        _ = api.prune


def test_a_disk_that_is_full_is_told_in_many_ways():
    torch_says = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")
    of_several = CheckpointException("write", {1: (torch_says, traceback.StackSummary())})
    rust = [
        SafetensorError(f"Error while serializing: I/O error: {said} (os error {number})")
        for number, said in ((28, "No space left"), (122, "Disk quota"), (27, "File too large"))
    ]
    for error in (OSError(errno.ENOSPC, "No space left"), torch_says, of_several, *rust):
        assert is_full_disk(error)
    other = CheckpointException("write", {1: (ValueError("no"), traceback.StackSummary())})
    rust[0] = SafetensorError("HeaderTooSmall (os error 2)")
    others = (RuntimeError("sizes do not match"), other, OSError(errno.EIO, "Input/output"))
    for error in (*others, rust[0]):
        assert not is_full_disk(error)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory."),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate "
            "memory: you tried to allocate 8 bytes. Error code 12 (Cannot allocate memory)"
        ),
        RuntimeError("unable to mmap 8 bytes from file <model>: Cannot allocate memory (12)"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, `cusolverDnCreate(handle)`"),
    ],
    ids=str,
)
def test_a_memory_that_is_full_is_told_in_many_ways(error):
    assert is_out_of_memory(error)


def test_torch_says_it_on_this_machine_in_one_of_them():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("sizes do not match"),
        ValueError("not enough memory"),
        OSError(errno.EIO, "Input/output error"),
    ],
    ids=str,
)
def test_no_other_error_is_of_the_memory(error):
    assert not is_out_of_memory(error)


def test_what_a_terminal_would_obey_is_shown():
    assert (
        printable("a\x1b[2K\x07\u202eb\nc\u00e9 \u2603") == "a\\x1b[2K\\x07\\u202eb\nc\u00e9 \u2603"
    )


def test_an_exception_that_says_nothing_has_its_name():
    assert first_line(ValueError()) == "ValueError"
    assert first_line(ValueError("a\n  b")) == "a b"
    assert with_type(ValueError()) == "ValueError"
    assert with_type(ValueError("a\n  b")) == "ValueError: a b"
