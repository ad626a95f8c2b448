"""The interface to mlx-lm: builds lazy models, splits them, generates from them.

What loading relies on of mlx-lm's internals (the upper bound in pyproject.toml guards it):

- `utils._get_classes(config)`: the model class and the class of its arguments. The latter is a
  dataclass with `from_dict`; its fields without a default are the keys that a config must have.
- `utils.load_model(folder, lazy=True, get_model_classes=...)`: calls the model class's `sanitize`
  on the loaded tensors (converters/sources/layouts.py wraps it), then quantizes by config.json.
- `utils.load_config`, `utils.sharded_load`: the same for several machines. `sharded_model` patches
  the former temporarily (config_keys.py).
- `utils.load_model(model_config=...)`: keys that replace those of config.json.
- `utils.load_tokenizer` (tokenizer.py).
- `models.cache.make_prompt_cache`, and `to_quantized(group_size, bits)` of the caches.
- `quant_predicate` and `cast_predicate` of a model, where it has them (layers.py).
- `load`, `generate` and `stream_generate`, which are public.
- `load_model` reads shards through `mlx.core.load`, and `sanitize` stacks experts by
  `mlx.core.stack`: `build_model` patches the latter temporarily, straight.py both. It
  finds the shards through `glob.glob`, which `_reads_only` patches where an index names others.

mlx-lm is imported inside the functions, since that takes one to two seconds.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from ..base.errors import FOR_METAL, MintError, is_for_metal
from ..base.hf_config import text_config
from ..base.safetensors_header import TensorInfo, read_folder, read_header
from ..converters.sources.restore import drop_unused
from ..converters.sources.sanitize import wrap_sanitize
from .build_failure import why_not_built
from .class_towers import without_mtp, without_towers
from .config_keys import adapt
from .model_classes import text_class
from .stored_dtype import with_stored_dtype
from .tied_head import drop_copy, with_copy, with_own_head
from .tokenizer import first_line

# The exceptions with which mlx-lm fails on a config and tensors that don't fit together. Both come
# from the user, so these are refusals and not bugs of ours.
_BUILD_ERRORS = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    NameError,
    AssertionError,
)


def check_model(config: dict[str, Any]) -> None:
    """Refuse a config that mlx-lm has no model class for.

    Raises:
        MintError: no `model_type`, code of its own, or an unknown type.
    """
    from mlx_lm.utils import _get_classes

    if not isinstance(config.get("model_type"), str):
        raise MintError(
            "config.json has no model_type, so this is not a language model: give a checkpoint of "
            "one"
        )
    if config.get("model_file") is not None:
        raise MintError(
            f"this checkpoint brings code of its own ({config['model_file']}), which mint-mlx does "
            "not run: use one whose architecture mlx-lm has built in"
        )

    # Some of mlx-lm's modules print when they are imported, which would spoil --json.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            _get_classes(config)
    except (ValueError, AttributeError):
        raise MintError(
            f"mlx-lm has no model of type {config['model_type']!r}: update mlx-lm, or check that "
            "this is a text model"
        ) from None
    except SystemExit:  # olmo's module ends the program where a package is missing
        raise MintError(
            f"mlx-lm needs a package for models of type {config['model_type']!r} that isn't "
            "installed: load the model with mlx_lm.generate to see which, and install it"
        ) from None


def build_model(
    folder: Path,
    stream: Any = None,
    exact: bool = False,
    dtype: Any = None,
    keep_nvfp4: bool = False,
) -> Any:
    """The lazy mlx-lm model of a checkpoint, weights mapped and sanitized but not read.

    All operations that build the weights (reading, stacking, dequantizing) are put on a CPU stream,
    the default one or the given one, so that on a Mac no GPU command buffer ever waits for the disk
    (the GPU watchdog kills those).

    Args:
        folder: of the checkpoint.
        stream: to put the operations on.
        exact: leave scales and biases of foreign formats in float32.
        dtype: of weights that are dequantized as they are read; the 16-bit type that the config
            states by default.
        keep_nvfp4: leave experts of NVFP4 packed, which no CPU runs, where the class of mlx-lm
            takes their global scale.

    Raises:
        MintError: mlx-lm can't build the model from this config and these tensors.
    """
    from mlx_lm.utils import _get_classes, load_config, load_model

    from ..converters.sources.layouts import Reading, reader

    headers = read_folder(folder)

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, args_class = _get_classes(config)
        config.update(with_own_head(config, folder, headers, bare_model))
        prepared = _prepared(model_class, config)
        as_read = Reading(exact, dtype, keep_nvfp4)
        return reader(config, folder, headers, prepared, stacks, as_read), args_class

    config: dict[str, Any] = {}
    try:
        with (
            mx.stream(stream or mx.cpu),
            _reads_only(folder, headers),
            _trace_stacks() as stacks,
        ):
            config = with_stored_dtype(adapt(load_config(folder)), headers)
            model, _ = load_model(folder, lazy=True, model_config=config, get_model_classes=classes)
    except _BUILD_ERRORS as error:
        raise MintError(why_not_built(folder.name, config, error)) from error
    return model


def _prepared(model_class: type, config: dict[str, Any]) -> type:
    """A model class whose `sanitize` gets the tensors as mlx-lm expects them."""
    from ..converters.sources.group_limits import rules_out_by_zero, shift_biases
    from ..converters.sources.multipliers import fold_multipliers
    from ..converters.sources.tensor_names import rename

    reader, table = text_class(config), text_config(config)

    def prepare(
        model: Any, weights: dict[str, Any], stock: Callable[[dict[str, Any]], dict[str, Any]]
    ) -> dict[str, Any]:
        renamed = rename(model, config, drop_copy(model, config, weights))
        folded = fold_multipliers(config, drop_unused(model, renamed))
        sanitized = without_mtp(model, config, without_towers(model, stock(folded)))
        if reader and "quantization" not in config and rules_out_by_zero(reader.name, table):
            sanitized = shift_biases(sanitized)
        return with_copy(model, config, sanitized)  # some classes drop the head in sanitize

    return wrap_sanitize(model_class, prepare)


@contextlib.contextmanager
def _reads_only(folder: Path, headers: Mapping[str, Mapping[str, TensorInfo]]) -> Iterator[None]:
    """Let `load_model` read the tensors of these headers, and no others, by patching it.

    Where the files are all model*.safetensors, each with tensors of its own, nothing is patched.
    """
    from mlx_lm import utils

    stored = {file.name: file for file in folder.glob("model*.safetensors")}
    if stored.keys() == headers.keys() and all(
        len(read_header(file)[0]) == len(headers[name]) for name, file in stored.items()
    ):
        yield
        return
    glob, load = utils.glob, mx.load

    def load_listed(file: Any, *args: Any, **options: Any) -> Any:
        loaded: Any = load(file, *args, **options)
        table = headers.get(Path(str(file)).name)
        return {n: loaded[n] for n in table} if table is not None else loaded

    paths = [str(folder / name) for name in headers]
    utils.glob = SimpleNamespace(glob=lambda pattern: paths)
    mx.load = load_listed
    try:
        yield
    finally:
        utils.glob, mx.load = glob, load


@contextlib.contextmanager
def _trace_stacks() -> Iterator[dict[int, list[int]]]:
    """Record which arrays are stacked along the first axis, by patching mlx.core.

    Yields:
        By the id of a stack the ids of its arrays, in order; valid inside the context only.
    """
    stacks: dict[int, list[int]] = {}
    references: list[Any] = []  # Python reuses the id of an array that is gone
    stack = mx.stack

    def traced_stack(arrays: Any, axis: int = 0, **options: Any) -> Any:
        arrays = list(arrays)
        stacked = stack(arrays, axis, **options)
        if axis == 0:
            stacks[id(stacked)] = [id(array) for array in arrays]
            references.append((stacked, arrays))
        return stacked

    mx.stack = traced_stack  # type: ignore[assignment]
    try:
        yield stacks
    finally:
        mx.stack = stack


def sharded_model(folder: Path) -> Any:
    """The model split over the ranks that `mlx.launch` started, by mlx-lm's own loader.

    By tensors where each rank gets whole key-value heads, else by blocks.

    Raises:
        MintError: mlx-lm can't split this family, or this shape.
    """
    from mlx_lm import utils

    group = mx.distributed.init()
    try:
        with _adapted_configs():
            by_tensors = splits_tensors(utils.load_config(folder), group.size())
            groups = {"tensor_group" if by_tensors else "pipeline_group": group}
            model, _ = utils.sharded_load(
                str(folder), tokenizer_config={"trust_remote_code": False}, **groups
            )
    # Splitting by blocks needs the index of the shards.
    except (*_BUILD_ERRORS, FileNotFoundError) as error:
        raise MintError(
            f"mlx-lm cannot split {folder.name} over several machines ({first_line(error)}): run "
            "`eval` on one"
        ) from error
    return model


@contextlib.contextmanager
def _adapted_configs() -> Iterator[None]:
    """Let mlx-lm's loaders read configs as `adapt` brings them, by patching `load_config`."""
    from mlx_lm import utils

    load_config = utils.load_config
    utils.load_config = lambda folder: adapt(load_config(folder))
    try:
        yield
    finally:
        utils.load_config = load_config


def splits_tensors(config: dict[str, Any], count: int) -> bool:
    """Whether `sharded_model` gives each of `count` ranks a slice of every tensor (else blocks)."""
    heads = text_config(config).get("num_key_value_heads")
    return heads is None or heads % count == 0


def stock_parameters(folder: Path) -> tuple[set[str] | None, str | None]:
    """Load a checkpoint lazily with mlx-lm alone, without our readers.

    Returns:
        The names of the parameters, or None and why mlx-lm can't load it.
    """
    from mlx_lm.utils import load_model

    try:
        with mx.stream(mx.cpu):
            model, _ = load_model(folder, lazy=True)
    except _BUILD_ERRORS as error:
        return None, first_line(error)
    return {name for name, _ in tree_flatten(model.parameters())}, None


def bare_model(config: dict[str, Any]) -> Any:
    """The model that a config describes, unquantized and with no weights read.

    Raises:
        MintError: mlx-lm can't build one.
    """
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    try:
        with mx.stream(mx.cpu):
            # Some classes write into the tables that they read.
            return model_class(args_class.from_dict(deepcopy(config)))
    except _BUILD_ERRORS as error:
        text = why_not_built("this config.json", config, error)
        raise MintError(text) from error


def check_runs(config: dict[str, Any]) -> None:
    """Refuse a model that mlx-lm builds and then fails on at the first token.

    No number is computed, so that classes which look at numbers while they run (DBRX's router) are
    not tried. What needs Metal passes: it is converted for a Mac.

    Raises:
        MintError: with mlx-lm's words.
    """
    reader = text_class(config)
    if reader is None or any(look in reader.code for look in (".tolist()", ".item()")):
        return
    try:
        two_token_cache(config)
    except MintError as error:
        if str(error) != FOR_METAL:
            raise


def two_token_cache(config: dict[str, Any], kv_bits: int | None = None) -> list[Any]:
    """The prompt cache that mlx-lm makes for a model, after two tokens.

    Its arrays have shapes, but are not evaluated.

    Args:
        config: the model's config.json.
        kv_bits: also try whether the model runs with a cache of so many bits.

    Raises:
        MintError: mlx-lm can't build or run such a model, or not with a quantized cache.
    """
    from mlx_lm.models.cache import make_prompt_cache

    model = bare_model(config)
    tokens = mx.zeros((1, 2), dtype=mx.int32)
    try:
        with mx.stream(mx.cpu):
            model.eval()
            model.set_dtype(mx.bfloat16)
            caches: list[Any] = make_prompt_cache(model)
            model(tokens, cache=caches)
    except _BUILD_ERRORS as error:
        if is_for_metal(error):
            raise MintError(FOR_METAL) from error
        raise MintError(
            f"mlx-lm cannot run this model ({first_line(error)}): its class fails at the first "
            "token; check the values of config.json, the types of its layers above all, or wait "
            "for a version of mlx-lm that can"
        ) from error
    if kv_bits is None:
        return caches

    # Not every attention can read a quantized cache, and those that can't fail only when they run.
    try:
        with mx.stream(mx.cpu):
            quantized = [
                c.to_quantized(64, kv_bits) if hasattr(c, "to_quantized") else c for c in caches
            ]
            model(tokens, cache=quantized)
    except (*_BUILD_ERRORS, NotImplementedError) as error:
        raise MintError(
            f"mlx-lm cannot run this model with a quantized cache ({first_line(error)}): leave "
            "--kv-bits out"
        ) from error
    return caches
