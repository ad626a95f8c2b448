"""Protocols: how a text is cut into windows, and which of their tokens are scored.

`windows`: windows of L tokens that don't overlap; every token is scored but a window's first. MINT
and GPTQ do so.

`llama.cpp`: L = 512. The window's first token is replaced by BOS if the tokenizer puts one before a
text, and only the second half is scored, as `llama-perplexity` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.errors import MintError, UsageError
from ..base.hf_config import config_tables

PROTOCOLS = ("windows", "llama.cpp")
DEFAULT_LENGTH = {"windows": 2048, "llama.cpp": 512}
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
)


@dataclass(frozen=True)
class Windows:
    """Windows of one length.

    Attributes:
        tokens: int32 (windows, tokens).
        first: index of the first scored token; its prediction is made at the position before.
    """

    tokens: np.ndarray
    first: int = 1

    @property
    def positions(self) -> slice:
        """The positions that are compared; the last one predicts a token beyond the window."""
        return slice(self.first - 1, self.tokens.shape[1])

    @property
    def per_window(self) -> int:
        """Number of such positions."""
        return int(self.tokens.shape[1]) - self.first + 1

    @property
    def following(self) -> np.ndarray:
        """The token after each one, int32 (windows, tokens); 0 after a window's last one."""
        return np.pad(self.tokens[:, 1:], ((0, 0), (0, 1)))

    @property
    def scored(self) -> int:
        """Number of tokens whose likelihood counts."""
        return len(self.tokens) * (self.tokens.shape[1] - self.first)


def done_of_all(text: Sequence[Windows], finished: int, done: int) -> tuple[int, int]:
    """How much of all sets of windows is done, and how much there is.

    A window counts one, or its tokens where lengths differ.

    Args:
        text: the sets.
        finished: how many of them are.
        done: windows of the next one.
    """
    lengths = [windows.tokens.shape[1] for windows in text]
    counts = lengths if len(set(lengths)) > 1 else [1] * len(text)
    costs = [count * len(windows.tokens) for count, windows in zip(counts, text, strict=True)]
    return sum(costs[:finished]) + counts[finished] * done, sum(costs)


def default_length(protocol: str, config: dict[str, Any]) -> int:
    """The protocol's window, or the model's context if that is shorter."""
    return min(DEFAULT_LENGTH[protocol], context_of(config) or DEFAULT_LENGTH[protocol])


def context_of(config: dict[str, Any]) -> int | None:
    """The longest context that a model's config states, in tokens, or None."""
    for table in config_tables(config):
        for key in CONTEXT_KEYS:
            if type(table.get(key)) is int and table[key] > 0:
                return int(table[key])
    return None


def check_protocol(protocol: str, length: int | None, limit: int | None, seed: int | None) -> None:
    """Refuse an unknown protocol, impossible windows, and a seed without a number of windows.

    Raises:
        UsageError: the first of them.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"--protocol must be one of {', '.join(PROTOCOLS)} (got {protocol!r})")
    if length is not None and length < 4:
        raise UsageError(f"--length must be 4 or more (got {length})")
    if limit is not None and limit < 1:
        raise UsageError(f"--windows must be 1 or more (got {limit})")
    if seed is not None and seed < 0:
        raise UsageError(f"--seed must be 0 or more (got {seed})")
    if seed is not None and limit is None:
        raise UsageError("--seed chooses windows at random: say how many with --windows")


def cut(
    ids: np.ndarray,
    protocol: str,
    length: int,
    limit: int | None = None,
    seed: int | None = None,
    bos: int | None = None,
) -> Windows:
    """Cut token ids into windows.

    Args:
        ids: int (tokens,).
        protocol: a name of PROTOCOLS.
        length: tokens a window.
        limit: take only the first so many windows, or with a seed so many at random.
        seed: chooses the windows.
        bos: the token that starts every window (llama.cpp only), or None.

    Raises:
        MintError: the text is shorter than one window.
        UsageError: the protocol or a figure is impossible.
    """
    check_protocol(protocol, length, limit, seed)
    count = len(ids) // length
    if count == 0:
        raise MintError(
            f"the text has {len(ids)} tokens, less than one window of {length}: give a longer text "
            "or a smaller --length"
        )

    tokens = np.array(ids[: count * length], dtype=np.int32).reshape(count, length)
    if limit is not None and seed is not None and limit < count:
        tokens = tokens[np.sort(np.random.default_rng(seed).choice(count, limit, replace=False))]
    tokens = tokens[:limit].copy()

    if protocol == "windows":
        return Windows(tokens)
    if bos is not None:
        tokens[:, 0] = bos
    return Windows(tokens, length // 2 + 1)


def bos_token(tokenizer: Any) -> int | None:
    """The token that this tokenizer puts before a text, or None."""
    ids = tokenizer.encode("a")
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and len(ids) and ids[0] == bos else None
