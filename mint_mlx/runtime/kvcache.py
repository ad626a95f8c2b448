"""How large a model's key-value cache is at the end of a context, from the caches of mlx-lm.

The model is built without weights and two tokens are put through it; no array is ever computed, but
each cache then knows the shapes of what it stores. How it grows from there is its kind's own rule
(sliding windows and chunks stop growing, states of a linear attention never grow), and caches that
hold latents (MLA) have the latents' shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..base.errors import MintError
from ..checkpoint import mlxlm

if TYPE_CHECKING:  # what is refused before work starts is refused before mlx is loaded
    import mlx.core as mx

STEP = 256  # mlx-lm's caches grow by so many tokens
PREFILL = 2048  # tokens that mlx-lm puts through the model at once
KV_GROUP = 64  # the group size of mlx-lm's --kv-bits


@dataclass(frozen=True)
class CacheSize:
    """A cache at the end of a context.

    Attributes:
        bytes: of all blocks.
        tokens: in the block that holds most.
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
    sizes: list[CacheSize] = []
    for cache in mlxlm.two_token_cache(config, kv_bits):
        sizes += _grown(cache, context, kv_bits)
    return CacheSize(
        sum(c.bytes for c in sizes),
        max((c.tokens for c in sizes), default=0),
        max((c.size for c in sizes), default=0),
    )


def _grown(cache: Any, context: int, kv_bits: int | None) -> list[CacheSize]:
    """One block's caches at the end of a context that was put through PREFILL tokens at a time.

    Raises:
        MintError: a cache is of an unknown kind.
    """
    kind = type(cache).__name__
    if kind == "CacheList":  # mlx-lm quantizes none of these
        return [c for member in cache.caches for c in _grown(member, context, None)]
    if kind == "ArraysCache":
        return [CacheSize(sum(array.nbytes for array in cache.cache if array is not None), 0, 0)]
    if cache is None:
        return []
    if kind not in ("KVCache", "RotatingKVCache", "ChunkedKVCache", "ConcatenateKVCache"):
        raise MintError(
            f"mlx-lm makes a cache of the kind {kind} for this model, which mint-mlx doesn't know: "
            "its size can't be computed"
        )
    if cache.keys is None:  # a block that reads another one's
        return []

    # How many tokens it holds follows from how it grows.
    if kind == "RotatingKVCache":
        tokens = min(_stepped(context), cache.max_size + PREFILL - 1)
    elif kind == "ChunkedKVCache":
        tokens = min(_stepped(context), _stepped(cache.chunk_size + PREFILL))
    else:
        tokens = context if kind == "ConcatenateKVCache" else _stepped(context)

    bits = kv_bits if kind == "KVCache" else None  # mlx-lm quantizes no other kind
    total = sum(_token_bytes(array, bits) * tokens for array in (cache.keys, cache.values))
    return [CacheSize(total, tokens, cache.keys.shape[-1])]


def _stepped(tokens: int) -> int:
    """Tokens that a cache has room for once it holds so many."""
    return -(-tokens // STEP) * STEP


def _token_bytes(array: mx.array, kv_bits: int | None) -> int:
    """Bytes that one token takes in an array of keys or values (1, heads, tokens, dimension)."""
    _, heads, _, size = array.shape
    if kv_bits is None:
        return int(heads * size * array.itemsize)
    return int(heads * (size * kv_bits // 8 + 2 * array.itemsize * size // KV_GROUP))
