"""What a model's cache takes for a context of so many tokens, from the caches that mlx-lm makes for
it.

The model is built without weights and two tokens are put through it; no array is ever computed, but
each cache then knows the shapes of what it keeps. How it grows from there is its kind's own rule
(sliding windows and chunks stop growing, states of a linear attention never do), and caches that
hold latents (MLA) have the latents' shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..base.errors import MintError
from ..checkpoint import mlxlm

STEP = 256  # mlx-lm's caches grow by so many tokens
PREFILL = 2048  # tokens that mlx-lm puts through the model at once
KV_GROUP = 64  # the group size of mlx-lm's --kv-bits


@dataclass(frozen=True)
class CacheSize:
    """A cache at the end of a context.

    Attributes:
        bytes: of all blocks.
        tokens: held by the block that holds most.
        size: dimensions of a key in the block whose keys have most.
    """

    bytes: int
    tokens: int
    size: int


def cache_size(config: dict[str, Any], context: int, kv_bits: int | None = None) -> CacheSize:
    """The cache of a model at the end of a context, keys and values in 16 bits or in `kv_bits`.

    Args:
        config: the model's config.json.
        context: tokens.
        kv_bits: as mlx-lm's `--kv-bits`, groups of 64.

    Raises:
        MintError: mlx-lm can't quantize this model's cache, or the cache is of an unknown kind.
    """
    found = [
        c
        for cache in mlxlm.two_token_cache(config, kv_bits)
        for c in _grown(cache, context, kv_bits)
    ]
    return CacheSize(
        sum(c.bytes for c in found),
        max((c.tokens for c in found), default=0),
        max((c.size for c in found), default=0),
    )


def _grown(cache: Any, context: int, kv_bits: int | None) -> list[CacheSize]:
    """One block's caches at the end of a context that was put through in pieces of PREFILL."""
    kind = type(cache).__name__
    if kind == "CacheList":
        return [
            c for part in cache.caches for c in _grown(part, context, None)
        ]  # mlx-lm quantizes none of these
    if kind == "ArraysCache":
        return [CacheSize(sum(array.nbytes for array in cache.cache if array is not None), 0, 0)]
    if cache is None:
        return []
    if kind not in ("KVCache", "RotatingKVCache", "ChunkedKVCache", "ConcatenateKVCache"):
        raise MintError(
            f"mlx-lm keeps a cache of the kind {kind} for this model, whose growth is not known "
            "here"
        )
    if cache.keys is None:  # a block that reads another one's
        return []
    if kind == "RotatingKVCache":
        tokens = min(_stepped(context), cache.max_size + PREFILL - 1)
    elif kind == "ChunkedKVCache":
        tokens = min(_stepped(context), _stepped(cache.chunk_size + PREFILL))
    else:
        tokens = context if kind == "ConcatenateKVCache" else _stepped(context)
    bits = kv_bits if kind == "KVCache" else None
    held = sum(_token_bytes(array, bits) * tokens for array in (cache.keys, cache.values))
    return [CacheSize(held, tokens, cache.keys.shape[-1])]


def _stepped(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


def _token_bytes(array: mx.array, kv_bits: int | None) -> int:
    """Bytes that one token takes in an array of keys or values (1, heads, tokens, dimension)."""
    _, heads, _, size = array.shape
    if kv_bits is None:
        return int(heads * size * array.itemsize)
    return int(heads * (size * kv_bits // 8 + 2 * array.itemsize * size // KV_GROUP))
