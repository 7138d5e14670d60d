"""llama.cpp's own quantizer, started as `python quantize_gguf.py SOURCE FILE TYPE THREADS`.

Runs in the engine's environment: no import of owl_deploy here.
"""

import ctypes
import sys

import llama_cpp


def main() -> None:
    """Write the GGUF `SOURCE` to `FILE` with its weights in `TYPE`, Q4_K_M for instance."""
    source, file, name, threads = sys.argv[1:]
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, "LLAMA_FTYPE_MOSTLY_" + name)
    options.nthread = int(threads)
    code = llama_cpp.llama_model_quantize(source.encode(), file.encode(), ctypes.byref(options))
    if code:
        sys.exit(f"llama.cpp's quantizer failed with code {code}")


if __name__ == "__main__":
    main()
