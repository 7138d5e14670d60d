"""llama.cpp's own quantizer: `python quantize_gguf.py SOURCE FILE TYPE THREADS [IMPORTANCE]`.

IMPORTANCE: a .npz file that has for tensors, by their names in SOURCE, how much each input counts.

Runs in the engine's environment: no import of owl_deploy here.
"""

import ctypes
import sys
from typing import Any

import llama_cpp
import numpy as np


def main() -> None:
    """Write the GGUF `SOURCE` to `FILE` with its weights in `TYPE`, Q4_K_M for instance."""
    source, file, name, threads, *importance = sys.argv[1:]
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + name)
    options.nthread = int(threads)
    values = {}
    if importance:
        with np.load(importance[0]) as read:
            values = {tensor: np.ascontiguousarray(read[tensor], np.float32) for tensor in read}
        options.imatrix = _table(values)
    code = llama_cpp.llama_model_quantize(source.encode(), file.encode(), ctypes.byref(options))
    if code:
        sys.exit(f"llama.cpp's quantizer failed with code {code}")


def _table(values: "dict[str, np.ndarray]") -> Any:  # noqa: ANN401 - an array of llama.cpp's
    """`values`, which must live as long, as llama.cpp takes them: the last entry has no name."""
    entries = (llama_cpp.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, one) in zip(entries, values.items()):  # noqa: B905 - as old as 3.8
        entry.name, entry.size = name.encode(), one.size
        entry.data = one.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries


if __name__ == "__main__":
    main()
