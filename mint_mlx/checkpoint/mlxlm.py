"""What loading touches of mlx-lm's internals: building a lazy model, its tokenizer, a generated
sentence.

Everything is imported inside the functions, since `import mlx_lm` takes one to two seconds.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

from ..base.errors import NO_METAL, MintError
from ..base.hf_config import text_config
from .tokenizer import PROMPT, first_line, load_tokenizer, sentence_prompt

SENTENCE = 40  # tokens that are written after it
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


def check_model(config: dict[str, Any], folder: Path) -> None:
    """Refuse a config that mlx-lm has no model class for, or of a quantized layout that isn't read.

    Raises:
        MintError: no `model_type`, code of its own, an unknown type or layout.
    """
    from mlx_lm.utils import _get_classes

    from ..converters.sources.layouts import check_layout

    if not isinstance(config.get("model_type"), str):
        raise MintError("config.json has no model_type: this is not a language model checkpoint")
    if config.get("model_file") is not None:
        raise MintError(
            f"this checkpoint brings code of its own ({config['model_file']}), which mint-mlx does "
            "not run: use one whose architecture mlx-lm has built in"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model_class, _ = _get_classes(config)
    except (ValueError, AttributeError):
        raise MintError(
            f"mlx-lm has no model of type {config['model_type']!r}: update mlx-lm, or check that "
            "this is a text model"
        ) from None
    except SystemExit:  # olmo's module ends the program where a package is missing
        raise MintError(
            f"mlx-lm needs another package for models of type {config['model_type']!r}, which "
            "isn't installed"
        ) from None
    check_layout(config, folder, model_class)


def build_model(folder: Path, stream: Any = None) -> Any:
    """The lazy mlx-lm model of a checkpoint, weights mapped and sanitized but not read.

    Everything that builds the weights (reading, stacking, dequantizing) is put on a CPU stream, the
    default one or that which is given, so that on a Mac no GPU command buffer ever waits for the
    disk (the GPU watchdog kills those).

    Raises:
        MintError: mlx-lm can't build the model from this config and these tensors.
    """
    import mlx.core as mx
    from mlx_lm.utils import _get_classes, load_model

    from ..converters.sources.layouts import reader

    def classes(config: dict[str, Any]) -> tuple[type, type]:
        model_class, args_class = _get_classes(config)
        return reader(config, folder, model_class), args_class

    try:
        with mx.stream(stream or mx.cpu):
            model, _ = load_model(folder, lazy=True, get_model_classes=classes)
    # The config and the tensors are the user's: these are the ways in which mlx-lm fails on ones
    # that don't fit.
    except _BUILD_ERRORS as error:
        raise MintError(
            f"mlx-lm cannot build a model from {folder.name}: {first_line(error)} (is the "
            "checkpoint complete, and does its config.json belong to it?)"
        ) from error
    return model


def straight_parameters(folder: Path) -> dict[str, list[tuple[str, str]]]:
    """The model's parameters that are tensors of the checkpoint themselves, or stacks of such along
    the first axis.

    Returns:
        By the parameter's name the tensors, as (file, name), that it is made of, in order.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten

    origins: dict[int, list[tuple[str, str]]] = {}
    alive = []  # an id is given out again once its array is gone
    load, stack = mx.load, mx.stack

    def traced_load(file: Any, *args: Any, **more: Any) -> Any:
        found: Any = load(file, *args, **more)
        if isinstance(found, dict):
            origins.update(
                {id(array): [(Path(str(file)).name, name)] for name, array in found.items()}
            )
            alive.append(list(found.values()))
        return found

    def traced_stack(arrays: Any, axis: int = 0, **more: Any) -> Any:
        arrays = list(arrays)
        made = stack(arrays, axis, **more)
        parts = [origins.get(id(array), []) for array in arrays]
        if axis == 0 and all(len(part) == 1 for part in parts):
            origins[id(made)] = [part[0] for part in parts]
            alive.append([made])
        return made

    mx.load, mx.stack = traced_load, traced_stack  # type: ignore[assignment]
    try:
        model = build_model(folder)
    finally:
        mx.load, mx.stack = load, stack
    return {
        name: origins[id(array)]
        for name, array in tree_flatten(model.parameters())
        if id(array) in origins
    }


def sharded_model(folder: Path) -> Any:
    """The model split over the ranks that `mlx.launch` started, by mlx-lm's own loader.

    By tensors where each rank gets whole key-value heads, else by blocks.

    Raises:
        MintError: mlx-lm can't split this family, or this shape.
    """
    import mlx.core as mx
    from mlx_lm.utils import load_config, sharded_load

    group = mx.distributed.init()
    try:
        by = {
            "tensor_group"
            if splits_tensors(load_config(folder), group.size())
            else "pipeline_group": group
        }
        model, _ = sharded_load(str(folder), tokenizer_config={"trust_remote_code": False}, **by)
    except (
        *_BUILD_ERRORS,
        FileNotFoundError,
    ) as error:  # it wants an index where it splits by blocks
        raise MintError(
            f"mlx-lm cannot split {folder.name} over several machines ({first_line(error)}): run "
            "`eval` on one"
        ) from error
    return model


def splits_tensors(config: dict[str, Any], count: int) -> bool:
    """Whether `sharded_model` gives each of so many ranks a part of every tensor, not some of the
    blocks.
    """
    heads = text_config(config).get("num_key_value_heads")
    return heads is None or heads % count == 0


def stock_parameters(folder: Path) -> tuple[set[str] | None, str | None]:
    """The names of the parameters that mlx-lm alone, without our readers, loads lazily; or why it
    can't.
    """
    import mlx.core as mx
    from mlx.utils import tree_flatten
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
    import mlx.core as mx
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    try:
        with mx.stream(mx.cpu):
            return model_class(args_class.from_dict(config))
    except _BUILD_ERRORS as error:
        raise MintError(
            f"mlx-lm cannot build a model from this config.json: {first_line(error)}"
        ) from error


def two_token_cache(config: dict[str, Any], kv_bits: int | None = None) -> list[Any]:
    """The prompt cache that mlx-lm makes for a model, two tokens long: its arrays have shapes, but
    aren't computed.

    Args:
        config: the model's config.json.
        kv_bits: also try whether the model runs with a cache of so many bits.

    Raises:
        MintError: mlx-lm can't build or run such a model, or not with a quantized cache.
    """
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    model = bare_model(config)
    try:
        with mx.stream(mx.cpu):
            model.eval()
            model.set_dtype(mx.bfloat16)
            caches: list[Any] = make_prompt_cache(model)
            model(mx.zeros((1, 2), dtype=mx.int32), cache=caches)
    except _BUILD_ERRORS as error:
        raise MintError(
            f"the cache of this model cannot be measured: {first_line(error)}"
        ) from error
    if kv_bits is not None:
        try:
            with mx.stream(mx.cpu):
                smaller = [
                    c.to_quantized(64, kv_bits) if hasattr(c, "to_quantized") else c for c in caches
                ]
                model(mx.zeros((1, 2), dtype=mx.int32), cache=smaller)
        except (*_BUILD_ERRORS, NotImplementedError) as error:
            raise MintError(
                f"mlx-lm cannot run this model with a quantized cache ({first_line(error)}): leave "
                "--kv-bits out"
            ) from error
    return caches


def required_keys(config: dict[str, Any]) -> set[str]:
    """Keys of a config.json that mlx-lm's model class can't do without."""
    import dataclasses

    from mlx_lm.utils import _get_classes

    _, args_class = _get_classes(config)
    missing = dataclasses.MISSING
    return {
        f.name
        for f in dataclasses.fields(args_class)
        if f.default is missing and f.default_factory is missing
    }


def generate_sentence(folder: Path) -> str:
    """Load a written checkpoint with stock mlx-lm and let it go on greedily from a short prompt.

    '' where the model has parts that mlx-lm runs on Metal only, and there is none.

    Raises:
        MintError: it loads but doesn't generate.
    """
    import mlx.core as mx
    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))
    if mx.default_device() == mx.cpu:  # gather_mm takes float32 only there
        model.set_dtype(mx.float32)
    prompt = sentence_prompt(folder, tokenizer)
    try:
        text: str = generate(model, tokenizer, prompt=prompt, max_tokens=SENTENCE, verbose=False)
    # The forward pass is mlx-lm's, on values of the user's config.json: these are its ways to fail
    # on bad ones.
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        if NO_METAL in str(error):
            return ""
        raise MintError(
            f"the result loads but mlx-lm cannot generate from it ({type(error).__name__}: "
            f"{first_line(error)}): check the source's config.json, or give --no-smoke to keep the "
            "result all the same"
        ) from error
    start = PROMPT if tokenizer.chat_template is None else ""
    return " ".join(f"{start} {text}".split())


def generate_tokens(folder: Path, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy replies of a checkpoint to prompts of token ids, each with the token that ended it."""
    import mlx.core as mx
    from mlx_lm import stream_generate

    model, tokenizer = build_model(folder), load_tokenizer(folder)
    if mx.default_device() == mx.cpu:  # gather_mm takes float32 only there
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return [
        [int(r.token) for r in stream_generate(model, tokenizer, p, max_tokens=max_tokens)]
        for p in prompts
    ]
