"""Changes to files, each reproducible from a random generator: what disks, people and strangers do.

Damage changes bytes and leaves a checksum wrong. A stranger's change is sound by its checksum, and
wrong in what it says.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mint_mlx.base.array_files import read_arrays, read_npz, write_arrays, write_npz, write_tensors
from mint_mlx.base.checksum import KEY, with_checksum

NAN, INF = float("nan"), float("inf")
JUNK: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**12, -(10**9), 1.5, NAN, INF, 1e-30),
    *(1e300, 10**400, -0.5, "", "x", "../x", "/etc/passwd", "\ud800", "4", "9bit-g7"),
    *([], [1], [[]], {}, {"a": 1}, [None] * 3, "yarn", {"type": "linear"}),
)
KEYS = ("x", "../y", "model_file", "auto_map", "quantization", "text_config")  # of a config
FILLS = (NAN, INF, -INF, -1.0, 0.0, 1e38, -7.0, 65_000.0)


def paths_of(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value."""
    if at:
        yield at
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, inner in items:
        yield from paths_of(inner, (*at, key))


def mutate_json(data: Any, rng: random.Random) -> Any:
    """Replace, drop, double or rename something in it."""
    *way, last = rng.choice(list(paths_of(data)) or [("x",)])
    table = data
    for key in way:
        table = table[key]

    how = rng.randrange(4)
    value = table.get(last) if isinstance(table, dict) else table[last]
    if how == 0 and isinstance(table, dict):
        table.pop(last, None)
    elif how == 1 and isinstance(table, dict):
        table[rng.choice(KEYS)] = value
    elif isinstance(value, int) and rng.random() < 0.5:
        table[last] += rng.choice([-1, 1, 8, -64, 10**9])
    else:
        table[last] = rng.choice(JUNK)
    return data


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, repeat or insert bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(max(1, min(len(changed), rng.choice([16, 400, 10**9]))))
        how = rng.randrange(4)
        if how == 0 and changed:
            changed[place % len(changed)] ^= 1 << rng.randrange(8)
        elif how == 1:
            del changed[place : place + rng.choice([1, 8, 10**6])]
        elif how == 2:
            changed[place:place] = changed[place : place + rng.randint(1, 50)]
        else:
            changed[place:place] = bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))
    return bytes(changed)


def mutate_header(file: Path, rng: random.Random) -> None:
    """Change a safetensors file's header, with its length set right."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    changed = mutate_json(json.loads(data[8 : 8 + length]), rng)
    header = json.dumps(changed).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(header)) + header + data[8 + length :])


def mutate_arrays(arrays: dict[str, np.ndarray], rng: random.Random) -> dict[str, np.ndarray]:
    """Drop, rename, swap, reshape, retype, resize or fill one of some arrays."""
    name = rng.choice(sorted(arrays))
    array = arrays[name]
    how = rng.randrange(7)
    if how == 0:
        return {n: a for n, a in arrays.items() if n != name}
    if how == 1:
        arrays[rng.choice(["x", "route.99", "metric.77", "9.ids"])] = arrays.pop(name)
    elif how == 2:
        other = rng.choice(sorted(arrays))
        arrays[name], arrays[other] = arrays[other], arrays[name]
    elif array.dtype.kind not in "biuf":
        arrays[name] = np.array(rng.choice(["", "{}", "[" * 5000, "\N{SNOWMAN}"]))
    elif how == 3:
        arrays[name] = rng.choice([array.reshape(-1), array[None], array.T.copy()])
    elif how == 4:
        types = (np.int8, np.uint16, np.int64, np.float16, np.float64, np.bool_)
        with np.errstate(all="ignore"):
            arrays[name] = array.astype(rng.choice(types))
    elif how == 5 and array.ndim:
        arrays[name] = rng.choice([array[:0], array[:-1], np.concatenate([array, array])])
    else:
        flat = array.reshape(-1).copy()
        places = [rng.randrange(max(1, flat.size))] if rng.random() < 0.7 else slice(None)
        with np.errstate(all="ignore"):
            flat[places] = np.array(rng.choice(FILLS)).astype(array.dtype)
        arrays[name] = flat.reshape(array.shape)
    return arrays


def damage(file: Path, rng: random.Random) -> None:
    """Change a file's bytes, or put something else in its place."""
    if rng.random() < 0.8:
        file.write_bytes(mutate_bytes(file.read_bytes(), rng))
    else:
        replace_by_other(file, rng)


def replace_by_other(file: Path, rng: random.Random, other: Path = Path("/dev/zero")) -> None:
    """Put something else in a file's place: nothing, a folder, or a link (also to `other`)."""
    moved = file.with_name(f"moved-{file.name}")
    how = rng.randrange(7)
    if how == 0:
        file.write_bytes(b"")
        return
    file.replace(moved)
    if how == 1:
        file.symlink_to("nowhere")
    elif how == 2:
        file.symlink_to(file.name)  # to itself
    elif how == 3:
        file.symlink_to("/dev/zero")
    elif how == 4:
        file.symlink_to(other)
    elif how == 5:
        os.mkfifo(file)
    else:
        file.mkdir()


def forge(file: Path, rng: random.Random) -> None:
    """Change what a file of ours says, with a checksum that is right, or without one."""
    bare = rng.random() < 0.3
    if file.suffix == ".part":
        damage(file, rng)
    elif file.suffix == ".safetensors" and rng.random() < 0.3:
        mutate_header(file, rng)
    elif re.search("hidden|grad|refined", file.name):
        tensors: dict[str, Any] = mx.load(str(file))  # type: ignore[assignment]
        exact = {n: np.array(a.astype(mx.float32)) for n, a in tensors.items()}
        changed = mutate_arrays(exact, rng)
        write_tensors(file, {n: mx.array(a) for n, a in changed.items() if a.dtype.kind != "U"})
    elif file.suffix == ".safetensors":
        arrays, about = read_arrays(file, old=True)
        if about and rng.random() < 0.4:
            key = rng.choice(sorted(about.keys() - {KEY}) or ["x"])
            about.setdefault(key, "[1]")
            about[key] = _changed_text(about[key], rng)
        else:
            arrays = mutate_arrays(arrays, rng)
        write_arrays(file, arrays, about)
    elif zipped(file):
        arrays = read_npz(file, old=True)
        arrays.pop("checksum", None)
        if "head" in arrays and rng.random() < 0.4:
            arrays["head"] = np.array(_changed_text(str(arrays["head"]), rng))
        else:
            arrays = mutate_arrays(arrays, rng)
        if bare:
            with file.open("wb") as out:
                np.savez(out, **arrays)  # type: ignore[arg-type]
        else:
            write_npz(file, arrays, compressed=True)
    else:
        lines = file.read_text(encoding="utf-8").splitlines()
        whole = len(lines) < 2 or not all(_is_json(line) for line in lines)
        texts = ["\n".join(lines)] if whole else lines
        place = rng.randrange(len(texts))
        text = _changed_text(texts[place], rng)
        sealed = not bare and text.startswith("{") and text != "{}"
        texts[place] = with_checksum(text) if sealed else text
        file.write_text("\n".join(texts) + "\n", encoding="utf-8", errors="replace")


def zipped(file: Path) -> bool:
    return file.read_bytes()[:2] == b"PK"


def _is_json(text: str) -> bool:
    try:
        json.loads(text or "0")
    except ValueError:
        return False
    return True


def _changed_text(text: str, rng: random.Random) -> str:
    """A JSON text with one place changed, without its checksum."""
    if not text:
        return "[]"
    return _unsealed(json.loads(text), rng)


def _unsealed(data: Any, rng: random.Random) -> str:
    """JSON data with one place changed, without its checksum."""
    if isinstance(data, dict):
        data.pop(KEY, None)
    return json.dumps(mutate_json(data, rng))


def copy(origin: Path, target: Path) -> Path:
    """A fresh copy of a file or a folder."""
    if origin.is_dir():
        shutil.copytree(origin, target)
    else:
        shutil.copyfile(origin, target)
    return target
