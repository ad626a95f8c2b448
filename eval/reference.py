"""The source's own predictions, kept on disk: computed once, compared with any number of
candidates.

For each compared position: the K most probable next tokens with their log-probabilities, the mass
of all others, and the true token's log-probability. With K below the vocabulary the KL divergence
is that of the distribution whose rare tokens are merged into one, which is a little less than the
true one; the difference is measured on tokens kept whole."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..base.errors import MintError
from ..base.files import write_arrays
from ..base.targets import check_file
from ..runtime.divergence import log_softmax, rest_mass
from ..runtime.runner import Routing, Runner, forward
from .protocol import Windows

SCHEMA = 3
MARKER = "mint_mlx_reference"  # in every file of ours
FILE_BYTES = 1_000_000_000  # K is as large as a file of this size allows
LEAST_K = 128
PER_POSITION = ("ids", "best", "logp", "rest", "true")
STORED = (*PER_POSITION, "whole", "whole_logp", "control")
WHOLE = 1 << 24  # probabilities kept in distributions that are kept whole
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Part:
    """One set of windows with the source's predictions at its n compared positions.

    Attributes:
        windows: the tokens.
        ids: int (n, K), in no order that matters.
        best: int (n,), the source's first choice.
        logp: float32 (n, K).
        rest: float32 (n,), log of the mass of all other tokens (-inf where K is the vocabulary).
        true: float32 (n,), log-probability of the token that came (no token came at a window's last
            position).
        whole: int (w,), which of the n positions are kept whole.
        whole_logp: float32 (w, vocabulary).
        routing: int (windows, tokens, k) for each layer with experts.
        control: bool (scored tokens,), whether the token that came is a control token (chat only).
    """

    windows: Windows
    ids: np.ndarray
    best: np.ndarray
    logp: np.ndarray
    rest: np.ndarray
    true: np.ndarray
    whole: np.ndarray
    whole_logp: np.ndarray
    routing: tuple[np.ndarray, ...]
    control: np.ndarray


@dataclass(frozen=True)
class About:
    """What a reference belongs to."""

    source: str
    fingerprint: str
    protocol: str
    text: str
    vocabulary: int
    tokenizer: str
    noise_floor: float | None
    device: str
    schema: int = SCHEMA


@dataclass(frozen=True)
class Reference:
    """The source's predictions for all parts of a text."""

    about: About
    parts: tuple[Part, ...]


def choose_k(scored: int, vocabulary: int) -> int:
    """As many tokens as the file's size allows, at least LEAST_K; all where they fit."""
    item = 4 + (2 if vocabulary <= 1 << 16 else 4)
    return int(min(vocabulary, max(LEAST_K, FILE_BYTES // (scored * item))))


def predict(
    runner: Runner,
    windows: Windows,
    scored: int,
    batch: int,
    control: np.ndarray | None = None,
    progress: Progress = lambda *_: None,
    routing: Routing | None = None,
) -> Part:
    """Run the source over windows and keep its predictions.

    Args:
        runner: the source.
        windows: what to run it on.
        scored: tokens scored in all parts together, from which K follows.
        batch: windows at once.
        control: which of the scored tokens are control tokens.
        progress: called with (windows finished, windows in all).
        routing: takes the choice of experts, where it is kept as well.

    Raises:
        MintError: its logits aren't finite.
    """
    columns: dict[str, list[np.ndarray]] = {name: [] for name in (*PER_POSITION, "whole")}
    total = len(windows.tokens) * windows.per_window
    wanted = np.zeros(0, dtype=np.int64)
    following = windows.following
    order: list[np.ndarray] = []
    whole_at: list[np.ndarray] = []
    for piece in forward(runner, windows.tokens, batch, routing):
        taken = take(piece.columns, windows)
        if taken is None:
            continue
        inside, positions = taken
        logp = log_softmax(piece.logits[:, inside])
        n, vocabulary = logp.shape[0] * logp.shape[1], logp.shape[-1]
        flat = logp.reshape(n, vocabulary)
        k = choose_k(scored, vocabulary)
        if not len(wanted):
            wanted = np.linspace(0, total - 1, min(max(1, WHOLE // vocabulary), total)).astype(
                np.int64
            )
        ids = (
            mx.argpartition(-flat, k - 1, axis=-1)[:, :k]
            if k < vocabulary
            else mx.broadcast_to(mx.arange(k), (n, k))
        )
        top = mx.take_along_axis(flat, ids, axis=-1)
        best = mx.argmax(flat, axis=-1)
        true = mx.take_along_axis(
            logp, mx.array(following[piece.rows, positions])[..., None], axis=-1
        )
        rest = rest_mass(top) if k < vocabulary else mx.full((n,), -mx.inf)
        place = places(piece.rows, positions, windows)
        keep = np.flatnonzero(np.isin(place, wanted))
        whole = flat[mx.array(keep)] if len(keep) else None
        mx.eval(ids, best, top, rest, true, *([whole] if whole is not None else []))
        small = np.uint16 if vocabulary <= 1 << 16 else np.uint32
        columns["ids"].append(np.asarray(ids).astype(small))
        columns["best"].append(np.asarray(best).astype(small))
        columns["logp"].append(np.asarray(top))
        columns["rest"].append(np.asarray(rest))
        columns["true"].append(np.asarray(true).reshape(-1))
        order.append(place)
        if whole is not None:
            columns["whole"].append(np.asarray(whole))
            whole_at.append(place[keep])
        if not np.isfinite(columns["true"][-1]).all():
            raise MintError("the source's logits are not finite: its weights are damaged")
        progress(piece.rows.start, len(windows.tokens))
    progress(len(windows.tokens), len(windows.tokens))
    back = np.argsort(np.concatenate(order), kind="stable")
    found = {name: np.concatenate(columns[name])[back] for name in PER_POSITION}
    return Part(
        windows,
        **found,
        whole=np.concatenate(whole_at),
        whole_logp=np.concatenate(columns["whole"]),
        routing=tuple(_small(r) for r in routing.arrays(windows.tokens.shape))
        if routing is not None
        else (),
        control=np.zeros(windows.scored, dtype=bool) if control is None else control,
    )


def take(columns: slice, windows: Windows) -> tuple[slice, slice] | None:
    """Of a piece's positions those that are compared: as a slice into the piece, and as they stand
    in the window.
    """
    start, stop = (
        max(columns.start, windows.positions.start),
        min(columns.stop, windows.positions.stop),
    )
    if start >= stop:
        return None
    return slice(start - columns.start, stop - columns.start), slice(start, stop)


def places(rows: slice, positions: slice, windows: Windows) -> np.ndarray:
    """Which of all n compared positions these are, in order; int (rows x positions,)."""
    start = np.arange(rows.start, rows.stop)[:, None] * windows.per_window - windows.positions.start
    return (start + np.arange(positions.start, positions.stop)).reshape(-1)


def _small(routing: np.ndarray) -> np.ndarray:
    return routing.astype(np.uint8 if routing.max(initial=0) < 256 else np.uint16)


def text_hash(parts: list[Windows]) -> str:
    """Names the tokens that are scored, whatever file they came from."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(f"{part.tokens.shape} {part.first}".encode())
        digest.update(part.tokens.astype("<i4").tobytes())
    return digest.hexdigest()


def check_reference_file(path: Path) -> None:
    """Refuse a file that a reference can't be written to, or that is something else.

    Raises:
        MintError: saying why.
    """
    if path.suffix != ".safetensors":
        raise MintError(
            f"{path} must end in .safetensors, so that --source knows it as a reference"
        )
    check_file(path, MARKER, force=True)  # an older one, also of another version, is replaced


def save_reference(reference: Reference, path: Path) -> None:
    """Write a reference as a safetensors file, whole or not at all."""
    arrays: dict[str, np.ndarray] = {}
    for i, part in enumerate(reference.parts):
        for name in STORED:
            arrays[f"{i}.{name}"] = np.ascontiguousarray(getattr(part, name))
        arrays[f"{i}.tokens"] = part.windows.tokens
        arrays |= {f"{i}.routing.{j}": r for j, r in enumerate(part.routing)}
    about = asdict(reference.about) | {"firsts": [part.windows.first for part in reference.parts]}
    write_arrays(path, arrays, {MARKER: json.dumps(about)})


def load_reference(path: Path) -> Reference:
    """Read a reference.

    Raises:
        MintError: there is none, or the file isn't one.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise MintError(
            f"there is no reference {path}: make one with `mint-mlx eval MODEL --source REF "
            "--save-reference`"
        )
    try:
        with safe_open(path, framework="numpy") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})[MARKER])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        firsts = about.pop("firsts")
        if about["schema"] != SCHEMA:
            raise MintError(f"{path} was made by another version of mint-mlx: make it anew")
        parts = []
        for i, first in enumerate(firsts):
            layers = sum(name.startswith(f"{i}.routing.") for name in arrays)
            routing = tuple(arrays[f"{i}.routing.{j}"] for j in range(layers))
            fields = {name: arrays[f"{i}.{name}"] for name in STORED}
            parts.append(Part(Windows(arrays[f"{i}.tokens"], first), routing=routing, **fields))
        return Reference(About(**about), tuple(parts))
    except (SafetensorError, KeyError, TypeError, ValueError):
        raise MintError(
            f"{path} is not a reference of mint-mlx: make one with --save-reference"
        ) from None
