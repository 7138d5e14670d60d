"""The library's C interface, for tests, benchmarks and `kernels()`: what csrc/*_api.cpp export."""

import ctypes
from itertools import count
from pathlib import Path
from typing import Any

_Int, _Size, _Float = ctypes.c_int, ctypes.c_size_t, ctypes.c_float
_Text, _Data = ctypes.c_char_p, ctypes.c_void_p
_PACKED = (_Data, _Size)

# Result and arguments; a result of type int is a status, 0 or owl_last_error().
_FUNCTIONS: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "owl_last_error": (_Text, ()),
    "owl_best_isa": (_Text, ()),
    "owl_isa_name": (_Text, (_Size,)),
    "owl_isa_supported": (ctypes.c_bool, (_Text,)),
    "owl_check_packed": (_Int, _PACKED),
    # isa, packed, x, rows, y, threads, epilogue, bias, skip, gamma, epsilon, sum
    "owl_matmul": (
        _Int,
        (_Text, *_PACKED, _Data, _Size, _Data, _Size, _Int, *[_Data] * 3, _Float, _Data),
    ),
    "owl_gather": (_Int, (*_PACKED, _Size, _Data)),  # packed, row, out
    # isa, qkv, (length, past, heads, kv_heads, head_size, capacity), half_cache, (keys, values,
    # cosines, sines), scale, softcap, window, threads, out
    "owl_attention": (
        _Int,
        (_Text, _Data, *[_Size] * 6, _Int, *[_Data] * 4, *[_Float] * 2, *[_Size] * 2, _Data),
    ),
    # isa, weights, their sizes, their count, rows, by the way of many, threads, repeat, seconds
    "owl_time_matmul": (_Int, (_Text, *[_Data] * 2, *[_Size] * 2, _Int, *[_Size] * 2, _Data)),
    "owl_lies_dense": (_Int, (_Text, *_PACKED, _Data)),  # isa, packed, found
    "owl_late_thread_works": (_Int, (*_PACKED, _Size, _Data)),  # packed, rows, found
    # data, size, threads, repeat, seconds
    "owl_time_read": (_Int, (_Data, _Size, _Size, _Size, _Data)),
}


class Library:
    """The library at `path`, opened; OSError where it is none, AttributeError where not ours."""

    def __init__(self, path: Path) -> None:
        self._functions = ctypes.CDLL(str(path))
        for name, (result, arguments) in _FUNCTIONS.items():
            function = getattr(self._functions, name)
            function.restype, function.argtypes = result, arguments

    def call(self, name: str, *arguments: object) -> None:
        """Call a function with numbers, bytes, numpy arrays, or None for a pointer to nothing.

        ValueError with the library's own words where it fails.
        """
        plain = (getattr(argument, "ctypes", argument) for argument in arguments)
        if getattr(self._functions, name)(*plain) and _FUNCTIONS[name][0] is _Int:
            raise ValueError(self._functions.owl_last_error().decode())

    def isas(self) -> list[str]:
        """Instruction sets that were built in and that this processor runs, best first."""
        names = iter(map(self._functions.owl_isa_name, count()).__next__, None)
        return [name.decode() for name in names if self._functions.owl_isa_supported(name)]

    def best_isa(self) -> str:
        """`$OWL_ISA`, or the best that runs here; ValueError where the first does not."""
        best = self._functions.owl_best_isa()
        if best is None:
            raise ValueError(self._functions.owl_last_error().decode())
        return str(best.decode())
