"""What a model's cache takes for a context of so many tokens, from the caches that mlx-lm makes for it.

The model is built without weights and two tokens are put through it; no array is ever computed, but each cache then
knows the shapes of what it keeps. How it grows from there is its kind's own rule (sliding windows and chunks stop
growing, states of a linear attention never do), and caches that hold latents (MLA) have the latents' shape.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from . import mlxlm
from .errors import MintError

STEP = 256  # mlx-lm's caches grow by so many tokens
PREFILL = 2048  # tokens that mlx-lm puts through the model at once
KV_BITS, KV_GROUP = (2, 3, 4, 5, 6, 8), 64  # what mlx-lm's --kv-bits takes, and its group size


def cache_bytes(config: dict[str, Any], context: int, kv_bits: int | None = None) -> int:
    """Bytes of the cache of a model at the end of a context, keys and values in 16 bits or in `kv_bits`.

    Args:
        config: the model's config.json.
        context: tokens.
        kv_bits: as mlx-lm's `--kv-bits`, groups of 64.

    Raises:
        MintError: mlx-lm can't quantize this model's cache, or the cache is of an unknown kind.
    """
    return sum(_grown(cache, context, kv_bits) for cache in mlxlm.begun_cache(config) if cache is not None)


def _grown(cache: Any, context: int, kv_bits: int | None) -> int:
    """Bytes of one block's cache at the end of a context that was put through in pieces of PREFILL."""
    kind = type(cache).__name__
    if kind == "CacheList":
        return sum(_grown(part, context, None) for part in cache.caches)  # mlx-lm quantizes none of these
    if kind == "ArraysCache":
        return sum(array.nbytes for array in cache.cache if array is not None)
    if kind not in ("KVCache", "RotatingKVCache", "ChunkedKVCache", "ConcatenateKVCache"):
        raise MintError(f"mlx-lm keeps a cache of the kind {kind} for this model, whose growth is not known here")
    if cache.keys is None:  # a block that reads another one's
        return 0
    if kind == "RotatingKVCache":
        if kv_bits is not None:
            raise MintError("mlx-lm cannot quantize the cache of a sliding window, which this model has: no --kv-bits")
        tokens = min(_stepped(context), cache.max_size + PREFILL - 1)
    elif kind == "ChunkedKVCache":
        tokens = min(_stepped(context), _stepped(cache.chunk_size + PREFILL))
    else:
        tokens = context if kind == "ConcatenateKVCache" else _stepped(context)
    quantized = kind == "KVCache" and kv_bits is not None
    return sum(_token_bytes(array, kv_bits if quantized else None) * tokens for array in (cache.keys, cache.values))


def _stepped(tokens: int) -> int:
    return -(-tokens // STEP) * STEP


def _token_bytes(array: mx.array, kv_bits: int | None) -> int:
    """Bytes that one token takes in an array of keys or values (1, heads, tokens, dimension)."""
    _, heads, _, size = array.shape
    if kv_bits is None:
        return int(heads * size * array.itemsize)
    if size % KV_GROUP:
        raise MintError(f"mlx-lm quantizes a cache in groups of {KV_GROUP}, which don't divide {size}: no --kv-bits")
    return int(heads * (size * kv_bits // 8 + 2 * array.itemsize * size // KV_GROUP))
