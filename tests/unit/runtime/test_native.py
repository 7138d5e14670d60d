"""The binding of the library's C interface: what it states, and what it does with other files."""

import _ctypes
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from owl_deploy.runtime import kernels, native, pack

from .conftest import Kernels

SOURCES = Path(native.__file__).parent / "csrc"
KINDS = {"int": "i", "std::size_t": "L", "float": "f", "std::uint64_t": "L"}  # ctypes' codes


def kind(declared: str) -> str:
    """ctypes' code for the type of "float epsilon" and its like."""
    if "*" in declared:
        return "z" if "char*" in declared.replace(" *", "*") else "P"
    return KINDS[declared.split()[0]]


def test_functions_are_stated_as_the_sources_declare_them() -> None:
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*_api.cpp")))
    declared = re.findall(r"^OWL_EXPORT ([\w:* ]+?)(owl_\w+)\(([^)]*)\)", text, re.MULTILINE)
    found = {}
    for result, name, arguments in declared:
        found[name] = (kind(result), [kind(a) for a in arguments.split(",") if a.strip()])
    stated = {
        name: ("i" if result._type_ == "?" else result._type_, [a._type_ for a in arguments])
        for name, (result, arguments) in native._FUNCTIONS.items()
    }
    assert stated == found


@pytest.mark.parametrize("other", [__file__, _ctypes.__file__], ids=["text", "another library"])
def test_other_files_have_no_kernels(other: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWL_RUNTIME_LIBRARY", other)
    assert kernels() is None


def test_a_failure_speaks_in_the_librarys_words(kernels: Kernels) -> None:
    block = pack.pack(np.ones((16, 4), dtype=np.float32), "fp32")
    with pytest.raises(ValueError, match="the instruction set is 'none', but the kernels that run"):
        kernels.matmul("none", block, np.ones((1, 4), dtype=np.float32), 16)
    weights, sizes = (np.array([n], dtype=np.uintp) for n in (block.ctypes.data, block.size - 64))
    with pytest.raises(ValueError, match="the block's length differs"):
        kernels.call("owl_time_matmul", b"portable", weights, sizes, 1, 1, 0, 1, 1, np.zeros(1))


@pytest.mark.parametrize("rows", [1, 5])
def test_a_thread_that_comes_late_finds_work(kernels: Kernels, rows: int) -> None:
    """A pool's threads wake one by one: the first must not take the whole of a single product."""
    block = pack.pack(np.ones((2048, 256), dtype=np.float32), "fp32")
    found = np.zeros(1, dtype=np.int32)
    kernels.call("owl_late_thread_works", block, block.size, rows, found)
    assert found[0] == 1


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, dtype=np.float32)


def test_products_that_the_operators_refuse(kernels: Kernels) -> None:
    odd = pack.pack(ones(48, 64), "fp32")
    planes = pack.pack(ones(32, 64), "int8", sparse=False, planes=True)
    for block in (odd, planes):
        with pytest.raises(ValueError, match="an even number of row groups, and no planes"):
            kernels.matmul("portable", block, ones(1, 64), 24, epilogue="silu_mul")
    x, y = ones(1, 64), ones(1, 48)
    rest = (x, 1, y, 1, 7, None, None, None, 0.0, None)
    with pytest.raises(ValueError, match="unknown epilogue"):
        kernels.call("owl_matmul", b"portable", odd, odd.size, *rest)
    with pytest.raises(ValueError, match="need gamma"):
        kernels.matmul("portable", odd, x, 48, skip=x)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kv_heads": 0}, "multiple of kv_num_heads"),
        ({"heads": 0}, "multiple of kv_num_heads"),
        ({"heads": 65}, "too many query heads"),
        ({"head_size": 0}, "unsupported shape"),
        ({"head_size": 24}, "unsupported shape"),
        ({"length": 9}, "unsupported shape"),
        ({"past": 2**64 - 1}, "unsupported shape"),
        ({"sines": None}, "a rotary table is missing"),
    ],
)
def test_attention_that_the_operators_refuse(
    kernels: Kernels, change: dict[str, int | None], words: str
) -> None:
    sizes = {"length": 1, "past": 0, "heads": 2, "kv_heads": 1, "head_size": 16, "capacity": 8}
    data = {"keys": ones(128), "values": ones(128), "cosines": ones(64), "sines": ones(64)}
    sizes, data = ({k: change.get(k, v) for k, v in some.items()} for some in (sizes, data))
    rest = (1.0, 0.0, 0, 1, ones(32))
    with pytest.raises(ValueError, match=words):
        kernels.call(
            *("owl_attention", b"portable", ones(64), *sizes.values(), 0, *data.values(), *rest)
        )


def test_timings_that_cannot_be_taken(kernels: Kernels) -> None:
    blocks = [pack.pack(ones(16, cols), "fp32") for cols in (64, 256)]
    blocks.append(pack.pack(ones(16, 64), "bf16"))
    addresses, sizes = (
        np.array(some, dtype=np.uintp)
        for some in ([b.ctypes.data for b in blocks], [b.size for b in blocks])
    )
    seconds = np.zeros(1)
    for first, count, threads, words in (
        (0, 0, 1, "no weights"),
        (0, 1, 0, "no threads"),
        (0, 2, 1, "differ in their columns or values"),
        (1, 2, 1, "differ in their columns or values"),
    ):
        places = (addresses[first:].copy(), sizes[first:].copy(), count)
        with pytest.raises(ValueError, match=words):
            kernels.call("owl_time_matmul", b"portable", *places, 1, 0, threads, 1, seconds)
    with pytest.raises(ValueError, match="no threads"):
        kernels.call("owl_time_read", blocks[0], blocks[0].size, 0, 1, seconds)


def test_no_name_is_no_instruction_set(kernels: Kernels) -> None:
    assert not kernels._functions.owl_isa_supported(None)


# What a process keeps, in MiB; shared by the codes of child processes.
RESIDENT = """
import gc
import resource

def resident():
    gc.collect()
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 2**20
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_long_prompts_memory_is_given_back() -> None:
    code = f"""{RESIDENT}
import numpy as np
from owl_deploy.runtime import library_path, pack
from owl_deploy.runtime.native import Library

library, block = Library(library_path()), pack.pack(np.ones((16, 1024), np.float32), "fp32")
rest = (1, 0, None, None, None, 1e-5, None)
x, y = np.ones((20000, 1024), np.float32), np.ones((20000, 16), np.float32)
library.call("owl_matmul", b"", block, block.size, x, 1, y, *rest)
before = resident()
library.call("owl_matmul", b"", block, block.size, x, len(x), y, *rest)  # 80 MB prepared
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 20


def test_a_product_for_which_there_is_no_room_spoils_no_other() -> None:
    code = """if True:
        import resource
        import numpy as np
        from owl_deploy.runtime import library_path, pack
        from owl_deploy.runtime.native import Library

        library, block = Library(library_path()), pack.pack(np.ones((16, 64), np.float32), "int8")

        def product(x, y):
            rest = (1, 0, None, None, None, 1e-5, None)
            library.call("owl_matmul", b"", block, block.size, x, len(x), y, *rest)
            return y[0]

        one, many = (
            (np.ones((rows, 64), np.float32), np.zeros((rows, 16), np.float32)) for rows in (1, 64)
        )
        huge = np.zeros((3_000_000, 64), np.float32), np.zeros((3_000_000, 16), np.float32)
        first = [product(x, y).copy() for x, y in (one, many)]
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (32 << 20),) * 2)
        try:
            product(*huge)
        except ValueError as error:
            print(error)
        for (x, y), before in zip((one, many), first):
            assert np.array_equal(product(x, y), before)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "bad_alloc" in done.stdout
