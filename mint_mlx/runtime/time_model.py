"""Times what decoding takes beside the layers' products, by letting mlx-lm generate.

The stock model is built from its config with random weights, so none need be there; blocks that
don't fit in the memory set aside are left out (patching.blocks_run_by), and those that run stand
for all of their kind. What generation took less its layers' products is the rest: attention over a
cache of the context's length, norms, routing, sampling, and mlx-lm's own loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..base.errors import MintError
from ..base.quant_config import QuantConfig
from ..checkpoint import mlxlm
from ..checkpoint.layers import MLX_DTYPES, Inventory, Layer
from . import patching
from .clock import Clock, timed
from .kvcache import STEP
from .random_weights import random_codes, random_dense
from .runner import find_trunk
from .speed_table import Rest, SpeedTable, kind_of, layer_seconds, model_key
from .time_layers import timing

ROOM = 1_500_000_000  # bytes of weights of the blocks that run
BURSTS = (3, 40)  # how often mlx-lm generates some tokens, at least and at most
BURST = 0.1  # seconds that it does so, at least
LONGEST = 8  # tokens that it generates at once, at most
BESIDE = 2  # more that it computes each time: the first one, and one that isn't yielded
TOKENS = 1 + BESIDE + BURSTS[1] * (LONGEST + BESIDE)  # in all

Choice = Mapping[str, QuantConfig]


@dataclass(frozen=True)
class Reference:
    """The model that is timed.

    Attributes:
        config: its config.json.
        inventory: its layers.
        choice: their configurations.
    """

    config: dict[str, Any]
    inventory: Inventory
    choice: Choice


@dataclass(frozen=True)
class BlockGroup:
    """Blocks that cost the same.

    Attributes:
        blocks: all of them, by their place in the model.
        timed: those that run.
    """

    blocks: tuple[int, ...]
    timed: tuple[int, ...]


def time_rest(
    reference: Reference,
    table: SpeedTable,
    name: str,
    contexts: Sequence[int],
    seconds: float,
    clock: Clock,
    tell: Callable[[str, float], None] = lambda text, share: None,
) -> Rest:
    """What decoding a token takes beside the layers, in ticks.

    Args:
        reference: the model that is timed.
        table: has the ticks of its layers at its configurations.
        name: of the model, for people.
        contexts: tokens in the cache.
        seconds: that all of it may take, about.
        clock: is timed beside it.
        tell: receives what is timed, and which share is done.

    Raises:
        MintError: the model can't be run with some of its blocks, or its cache is of an unknown
            kind.
    """
    model = _random_model(reference)
    groups = _groups(model, reference)
    runs = _runs(groups)
    needed = {block for group in groups for block in group.timed}
    idle = [block for i, block in enumerate(_blocks(model)) if i not in needed]
    _fill(model, reference, idle)

    # What each run takes less its products belongs to the blocks that it adds to the first run.
    rests: dict[int, float] = {}
    spreads = []
    for i, context in enumerate(contexts):
        beside = []
        for j, active in enumerate(runs):
            tell(f"a context of {context}", (i * len(runs) + j) / (len(contexts) * len(runs)))
            share = seconds / len(contexts) / len(runs)
            taken = timing(_token_ticks(model, active, context, share, clock))
            beside.append(taken.seconds - _products(reference, table, active))
            spreads.append(taken.spread)
        rests[context] = _all_blocks(groups, beside)
    return Rest(name, rests, max(spreads))


def with_rest(table: SpeedTable, inventory: Inventory, rest: Rest) -> SpeedTable:
    """A table that also knows what a model takes beside its layers."""
    return replace(table, rests={**table.rests, model_key(inventory): rest})


def _runs(groups: Sequence[BlockGroup]) -> list[tuple[int, ...]]:
    """Which blocks each run has: all at once where they fit, else none first, then each group's."""
    if all(group.timed == group.blocks for group in groups):
        return [tuple(sorted(block for group in groups for block in group.blocks))]
    return [(), *(group.timed for group in groups)]


def _all_blocks(groups: Sequence[BlockGroup], beside: Sequence[float]) -> float:
    """What all blocks take beside their products, from the runs of `_runs`."""
    first, *others = beside
    if not others:
        return first
    pairs = zip(groups, others, strict=True)
    return first + sum((b - first) / len(g.timed) * len(g.blocks) for g, b in pairs)


def _products(reference: Reference, table: SpeedTable, active: Sequence[int]) -> float:
    """Ticks of the products in a run with these blocks."""
    return sum(
        layer_seconds(table, layer, reference.choice[layer.path])
        for layer in reference.inventory.layers
        if layer.block is None or layer.block in active
    )


def _random_model(reference: Reference) -> nn.Module:
    """The stock model, quantized; no weight of it is there yet."""
    model: nn.Module = mlxlm.bare_model(reference.config)
    choice = reference.choice

    def chosen(path: str, module: nn.Module) -> bool | dict[str, int | str]:
        config = choice.get(path)
        takes = config is not None and config.quantized and hasattr(module, "to_quantized")
        return config.as_mlx() if takes and config is not None else False

    with mx.stream(mx.cpu):
        nn.quantize(model, class_predicate=chosen)
    model.eval()
    return model


def _groups(model: nn.Module, reference: Reference) -> list[BlockGroup]:
    """The model's blocks by what they cost, and for each group those that fit in ROOM."""
    blocks = _blocks(model)
    layers: dict[int, list[Layer]] = {}
    for layer in reference.inventory.layers:
        if layer.block is not None:
            layers.setdefault(layer.block, []).append(layer)

    alike: dict[Any, list[int]] = {}
    for i, (block, cache) in enumerate(zip(blocks, _caches(model, len(blocks)), strict=True)):
        kinds = tuple(sorted(str(kind_of(layer)) for layer in layers.get(i, [])))
        window = getattr(cache, "max_size", None)
        alike.setdefault((type(block).__name__, kinds, type(cache), window), []).append(i)

    groups = []
    for members in alike.values():
        first = layers.get(members[0], [])
        size = sum(layer.bytes(reference.choice[layer.path]) for layer in first)
        count = max(1, int(ROOM / len(alike) / max(size, 1)))
        groups.append(BlockGroup(tuple(members), tuple(members[:count])))
    return groups


def _blocks(model: nn.Module) -> list[nn.Module]:
    trunk, name = find_trunk(model)
    return list(trunk[name])


def _caches(model: nn.Module, count: int) -> list[Any]:
    """The model's caches, one a block; where there are fewer, some blocks have none."""
    from mlx_lm.models.cache import make_prompt_cache

    caches: list[Any] = make_prompt_cache(model)
    return caches + [None] * (count - len(caches)) if len(caches) <= count else [None] * count


def _token_ticks(
    model: nn.Module, active: Sequence[int], context: int, seconds: float, clock: Clock
) -> list[float]:
    """Ticks of a token that mlx-lm generates, of each time that it generates some.

    Args:
        model: with random weights.
        active: the blocks that run.
        context: tokens in the cache.
        seconds: that it may take, about.
        clock: is timed before and after each time.

    Raises:
        MintError: the model can't be run so.
    """
    from mlx_lm.generate import wired_limit
    from mlx_lm.models.cache import make_prompt_cache

    idle = [block for i, block in enumerate(_blocks(model)) if i not in active]
    with _left_out(idle), wired_limit(model):
        caches = make_prompt_cache(model)
        try:
            mx.eval(model(mx.zeros((1, 1), mx.int32), cache=caches))
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise MintError(
                f"this model can't be timed with some of its blocks alone ({error}): its speed is "
                "not predicted"
            ) from error
        for cache in caches:
            _lengthen(cache, context)

        # The first time tells how many tokens take long enough.
        started = time.perf_counter()
        tokens, single = tokens_at_once(model, caches)
        ticks: list[float] = []
        while len(ticks) < BURSTS[0] or (
            len(ticks) < BURSTS[1] and time.perf_counter() - started < seconds
        ):
            burst = partial(generate_tokens, model, tokens, caches)
            ticks.append(timed(clock, burst, tokens * single)[1])
    return ticks


def tokens_at_once(model: nn.Module, caches: list[Any]) -> tuple[int, float]:
    """How many tokens take long enough to be timed together, and the seconds of one, about."""
    single = generate_tokens(model, 1, caches)
    return max(1, min(LONGEST, round(BURST / single))), single


def generate_tokens(model: nn.Module, tokens: int, caches: list[Any]) -> float:
    """Seconds of each of some tokens that mlx-lm generates, once it has begun.

    They are computed where a clock's ticks are: on a CPU another stream is another thread, and so
    maybe another core, which others slow down at other times.

    Args:
        model: is asked for them.
        tokens: how many; BESIDE more are computed.
        caches: of the model; go on.
    """
    from mlx_lm.generate import generate_step

    steps = generate_step(
        mx.array([1]),
        model,
        max_tokens=tokens + 1,
        prompt_cache=caches,
        stream=mx.default_stream(mx.default_device()),
    )
    arrived = [time.perf_counter() for _ in steps]
    mx.eval([cache.state for cache in caches])  # it has begun one more
    return (arrived[-1] - arrived[0]) / tokens


def _left_out(blocks: Sequence[nn.Module]) -> AbstractContextManager[None]:
    """Let some blocks return what they are given."""
    return patching.blocks_run_by(blocks, lambda block, hidden, *args, **kwargs: hidden)


def _fill(model: nn.Module, reference: Reference, idle: Sequence[nn.Module]) -> None:
    """Give all modules random weights but those in some blocks; activations stay in range."""
    skipped = {id(module) for block in idle for module in block.modules()}
    units = reference.inventory.units(dict(reference.choice))
    dtypes = {spec.name: spec.dtype for _, specs in units for spec in specs}
    for path, module in model.named_modules():
        if id(module) in skipped:
            continue
        arrays = {
            name: value
            for name, value in module.items()
            if isinstance(value, mx.array) and not name.startswith("_")
        }
        codes = _random_codes(module, arrays, dtypes, path) if "scales" in arrays else {}
        for name, value in arrays.items():
            dtype = getattr(mx, MLX_DTYPES.get(dtypes.get(f"{path}.{name}", ""), ""), value.dtype)
            module[name] = codes[name] if name in codes else _random(name, value.shape, dtype)
        mx.eval([module[name] for name in arrays])


def _random_codes(
    module: Any, arrays: dict[str, mx.array], dtypes: Mapping[str, str], path: str
) -> dict[str, mx.array]:
    """The weight of a quantized module, anew."""
    config = QuantConfig(module.bits, module.group_size, module.mode)
    packed = arrays["weight"].shape
    columns = packed[-1] * 32 // config.bits
    code = dtypes.get(f"{path}.scales", "BF16")
    dtype = getattr(mx, MLX_DTYPES[code]) if config.mode == "affine" else mx.uint8
    return random_codes(packed[:-1], columns, config, columns**-0.5, dtype)


def _random(name: str, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """A parameter that isn't quantized: ones for a norm's weight, zeros for other vectors."""
    if len(shape) > 1:
        return random_dense(shape, shape[-1] ** -0.5, dtype)
    return mx.ones(shape, dtype) if name == "weight" else mx.zeros(shape, dtype)


def _lengthen(cache: Any, context: int) -> None:
    """Let a cache that holds one token hold as many as a context has; values are random.

    Raises:
        MintError: it is of an unknown kind.
    """
    kind = type(cache).__name__
    if kind == "CacheList":
        for member in cache.caches:
            _lengthen(member, context)
    if kind in ("CacheList", "ArraysCache", "NoneType"):
        return
    if kind not in ("KVCache", "RotatingKVCache", "ChunkedKVCache"):
        raise MintError(
            f"mlx-lm makes a cache of the kind {kind} for this model, which mint-mlx doesn't know: "
            "its speed is not predicted"
        )
    if cache.keys is None:  # a block that is left out, or reads another one's
        return

    # How many tokens a cache holds, and where the next one goes, are its kind's own rules.
    length = min(
        context, getattr(cache, "max_size", context), getattr(cache, "chunk_size", context)
    )
    room = length if kind == "RotatingKVCache" else -(-(length + TOKENS) // STEP) * STEP
    for name in ("keys", "values"):
        array = getattr(cache, name)
        batch, heads, _, size = array.shape
        setattr(cache, name, random_dense((batch, heads, room, size), 1.0, array.dtype))
    cache.offset = context
    if kind == "RotatingKVCache":
        cache._idx = length
    if kind == "ChunkedKVCache":
        cache.start_position = context - length
    mx.eval(cache.keys, cache.values)
