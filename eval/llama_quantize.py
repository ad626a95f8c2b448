"""Runs llama.cpp's quantizer from its library, in a process of its own that a fault may end.

    python -m mint_mlx.eval.llama_quantize FOLDER SOURCE.gguf OUT.gguf NUMBER

FOLDER holds libllama and its neighbours, NUMBER is that of the type (peer_gguf.TYPES). No
importance matrix is used.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

LIBRARIES = ("libggml-base", "libggml", "libllama")  # in this order


class _Parameters(ctypes.Structure):
    """The beginning of llama.cpp's `llama_model_quantize_params`, and room for what follows."""

    _fields_ = (
        ("threads", ctypes.c_int32),
        ("type", ctypes.c_int32),
        ("rest", ctypes.c_byte * 248),
    )


def library(folder: Path, name: str) -> Path | None:
    """The file of a library, whose name may hold a version; None where there is none."""
    for pattern in (
        f"{name}.so",
        f"{name}.dylib",
        f"{name}.so.*",
        f"{name}.v*.so",
        f"{name}.*.dylib",
    ):
        for file in sorted(folder.glob(pattern)):
            return file
    return None


def quantize(folder: Path, source: str, out: str, number: int) -> int:
    """Quantize a GGUF file; returns llama.cpp's code, 0 for success."""
    for name in LIBRARIES:
        file = library(folder, name)
        if file is None:
            raise FileNotFoundError(f"{folder} holds no {name}")
        loaded = ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    loaded.llama_model_quantize_default_params.restype = _Parameters
    parameters = loaded.llama_model_quantize_default_params()
    parameters.threads = 2
    parameters.type = number
    run = loaded.llama_model_quantize
    run.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Parameters))
    run.restype = ctypes.c_uint32
    return int(run(source.encode(), out.encode(), ctypes.byref(parameters)))


if __name__ == "__main__":
    sys.exit(quantize(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
