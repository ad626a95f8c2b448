"""Protocols: how a text is cut into windows, and which tokens are scored.

`windows`    non-overlapping windows of L tokens, every token but a window's first scored (MINT's
and GPTQ's way). `llama.cpp`  L = 512, the window's first token replaced by BOS if the tokenizer
puts one before a text, only the second
             half scored: what `llama-perplexity` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.errors import MintError, UsageError
from ..base.hf_config import config_tables

PROTOCOLS = ("windows", "llama.cpp")
DEFAULT_LENGTH = {"windows": 2048, "llama.cpp": 512}


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
        """The positions whose predictions are compared; the last one predicts a token beyond the
        window.
        """
        return slice(self.first - 1, self.tokens.shape[1])

    @property
    def per_window(self) -> int:
        """Number of such positions."""
        return int(self.tokens.shape[1]) - self.first + 1

    @property
    def following(self) -> np.ndarray:
        """The token that comes after each one, int32 (windows, tokens); after the last one stands a
        0 for none.
        """
        return np.pad(self.tokens[:, 1:], ((0, 0), (0, 1)))

    @property
    def scored(self) -> int:
        """Number of tokens whose likelihood counts."""
        return len(self.tokens) * (self.tokens.shape[1] - self.first)


def default_length(protocol: str, config: dict[str, Any]) -> int:
    """The protocol's window, or the model's context if that is shorter."""
    return min(DEFAULT_LENGTH[protocol], context_of(config) or DEFAULT_LENGTH[protocol])


def context_of(config: dict[str, Any]) -> int | None:
    """The longest context that a model's config states, in tokens."""
    for table in config_tables(config):
        for key in (
            "max_position_embeddings",
            "n_positions",
            "max_sequence_length",
            "max_seq_len",
            "seq_length",
        ):
            if type(table.get(key)) is int and table[key] > 0:
                return int(table[key])
    return None


def check_protocol(protocol: str, length: int | None, limit: int | None, seed: int | None) -> None:
    """Refuse what can't be: an unknown protocol, windows of no use, a seed without windows to
    choose.

    Raises:
        UsageError: saying which.
    """
    if protocol not in PROTOCOLS:
        raise UsageError(f"no protocol is called {protocol!r}: there are {', '.join(PROTOCOLS)}")
    if length is not None and length < 4:
        raise UsageError(f"windows of {length} tokens are too short: give --length 4 or more")
    if limit is not None and limit < 1:
        raise UsageError("--windows must be 1 or more")
    if seed is not None and seed < 0:
        raise UsageError("--seed must not be negative")
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
        limit: the first so many windows, or with a seed so many at random.
        seed: for the choice of windows.
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
            "or --length"
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
    """The token that this tokenizer puts before a text, if it does."""
    ids = tokenizer.encode("a")
    bos = tokenizer.bos_token_id
    return int(bos) if bos is not None and len(ids) and ids[0] == bos else None
