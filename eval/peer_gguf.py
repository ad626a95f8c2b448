"""llama.cpp's quantizer as a peer: K-quants and the like of a source, without an importance matrix.

The program `llama-quantize` is taken where it is on the path, else the library of llama.cpp in the
folder that LLAMA_CPP_LIB names, or in the npm package @node-llama-cpp of the current folder. What
it makes is read back as a checkpoint (gguf_file.py), with the size of the GGUF file's tensors.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from ..base.errors import MintError
from ..base.remove import Kind
from ..base.scratch import scratch_folder
from ..checkpoint.layers import Inventory
from ..checkpoint.source import Source
from .gguf_file import architecture_of, gguf_package, read_gguf, write_gguf
from .llama_quantize import LIBRARIES, library

# llama.cpp's number of each type, and about how many bits a weight takes in it.
TYPES = {
    "Q2_K": (10, 3.0),
    "Q3_K_S": (11, 3.5),
    "Q3_K_M": (12, 3.9),
    "Q3_K_L": (13, 4.2),
    "IQ3_S": (26, 3.5),
    "IQ3_M": (27, 3.7),
    "IQ4_XS": (30, 4.3),
    "IQ4_NL": (25, 4.5),
    "Q4_0": (2, 4.6),
    "Q4_1": (3, 5.0),
    "Q4_K_S": (14, 4.6),
    "Q4_K_M": (15, 4.9),
    "Q5_0": (8, 5.5),
    "Q5_1": (9, 6.0),
    "Q5_K_S": (16, 5.5),
    "Q5_K_M": (17, 5.7),
    "Q6_K": (18, 6.6),
    "Q8_0": (7, 8.5),
}
SUPERBLOCK = 256  # weights of a row in a block of most types
FIXED = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")  # whose blocks have 32 weights
LIBRARY = "LLAMA_CPP_LIB"  # the folder of llama.cpp's libraries
PACKAGES = "node_modules/@node-llama-cpp/*/bins/*"
PROGRAM = "llama-quantize"
FILES = Kind("GGUF files", ("*.gguf",))


def about(name: str, inventory: Inventory) -> str:
    """What a row says of a type: whose it is, and which share of the weights falls back."""
    text = "llama.cpp, no imatrix"
    layers = [layer for layer in inventory.layers if layer.role != "router"]
    uneven = sum(layer.size for layer in layers if layer.shape[-1] % SUPERBLOCK)
    if name in FIXED or not uneven:
        return text
    share = uneven / sum(layer.size for layer in layers)
    widths = sorted({layer.shape[-1] for layer in layers if layer.shape[-1] % SUPERBLOCK})
    rows = " and ".join(map(str, widths))
    return f"{text}, {share:.0%} in rows of {rows} fall back to other types"


def build(source: Source, name: str, out: Path) -> None:
    """Quantize a source to a type and write it as a checkpoint in float32.

    Raises:
        MintError: llama.cpp or the gguf package isn't installed, the family is none of those
            known, or llama.cpp fails.
    """
    command = _command()
    gguf_package()
    architecture_of(source)
    with scratch_folder(FILES) as folder:
        plain = folder / "source.gguf"
        quantized = folder / f"{name}.gguf"
        write_gguf(source, plain)
        _run([*command, str(plain), str(quantized), _last(command, name)], name)
        read_gguf(source, quantized, out)


def library_folder() -> Path | None:
    """The folder of llama.cpp's libraries, or None."""
    named = os.environ.get(LIBRARY)
    folders = [Path(named)] if named else sorted(Path().glob(PACKAGES))
    for folder in folders:
        if all(library(folder, name) for name in LIBRARIES):
            return folder.absolute()
    return None


def quantizer_stamp() -> str:
    """What tells one installation of llama.cpp's quantizer from another; '' where there is none."""
    program, folder = shutil.which(PROGRAM), library_folder()
    if program is not None:
        files = [Path(program)]
    elif folder is not None:
        files = sorted(folder.iterdir())
    else:
        return ""
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.blake2b(repr(stats).encode(), digest_size=8).hexdigest()


def _command() -> list[str]:
    """How the quantizer is called, without files and type.

    Raises:
        MintError: it isn't installed.
    """
    program = shutil.which(PROGRAM)
    if program is not None:
        return [program]
    folder = library_folder()
    if folder is not None:
        return [sys.executable, "-m", "mint_mlx.eval.llama_quantize", str(folder)]
    raise MintError(
        f"llama.cpp's quantizer isn't installed: put `{PROGRAM}` on the path, or run `npm install "
        f"@node-llama-cpp/linux-x64` here, or set {LIBRARY} to the folder of libllama"
    )


def _last(command: list[str], name: str) -> str:
    """How the type is given: by name to the program, by number to the library."""
    return name if len(command) == 1 else str(TYPES[name][0])


def _run(command: list[str], name: str) -> None:
    """Run the quantizer.

    Raises:
        MintError: it fails.
    """
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        why = lines[-1] if lines else f"code {done.returncode}"
        raise MintError(f"llama.cpp cannot make {name} of this model: {why}")
