"""Builds the peers' checkpoints: mlx-lm's quantizers, each called by its own functions.

Those that calibrate see the baseline text and nothing else. Their scales are cast to the source's
16-bit type before bytes are counted, since on a CPU some of them leave float32 behind.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..allocation.allocate import uniform
from ..base.errors import MintError
from ..base.hf_config import stated_dtype
from ..base.quant_config import QuantConfig
from ..base.remove import remove_file
from ..base.side_files import code_files
from ..checkpoint.layers import Inventory
from ..checkpoint.source import Source, open_model
from ..checkpoint.tokenizer import encode, load_tokenizer
from ..converters.output.conversion import Conversion
from ..converters.output.small_files import copy_small_files
from ..converters.output.write import write
from ..measure.sensitivity import Sensitivity, TokenWeights
from ..measure.text import Text
from ..runtime.cpu_ops import dense_products
from .protocol import context_of

CALIBRATION = 65_536  # tokens of the baseline text at most
DWQ_RATES = (1e-6, 1e-5, 1e-4, 1e-3)
DWQ_PASSES = 5  # over the text at most: as many steps and tokens as mlx-lm takes, or `best` does


def convert_uniform(source: Source, config: QuantConfig, out: Path) -> None:
    """`mlx_lm.convert -q` with these bits and groups."""
    from mlx_lm import convert

    with _quiet():
        convert(
            str(source.path),
            str(out),
            quantize=True,
            q_bits=config.bits,
            q_group_size=config.group_size,
            dtype=_dtype(source),
        )
    _drop_other_code(source, out)


def convert_recipe(source: Source, recipe: str, out: Path) -> None:
    """`mlx_lm.convert -q --quant-predicate` with this recipe."""
    from mlx_lm import convert

    with _quiet():
        convert(
            str(source.path),
            str(out),
            quantize=True,
            q_group_size=64,
            quant_predicate=recipe,
            dtype=_dtype(source),
        )
    _drop_other_code(source, out)


def convert_plain(source: Source, dtype: str, out: Path) -> None:
    """`mlx_lm.convert` to a type, without quantizing: `float32` and the like."""
    from mlx_lm import convert

    with _quiet():
        convert(str(source.path), str(out), dtype=dtype)


def _drop_other_code(source: Source, out: Path) -> None:
    """Delete the Python files that mlx-lm has just copied and that no config of the source names.

    Nobody runs them, and the cache could not tell them from a stranger's.
    """
    for file in out.glob("*.py"):
        if file.name not in code_files(source.path):
            remove_file(file)


def feedback(
    source: Source, inventory: Inventory, config: QuantConfig, text: str, out: Path
) -> None:
    """Plain GPTQ by our own error feedback: uniform bits, inputs from the text, unweighted.

    Unlike mlx-lm's it treats each expert by itself.
    """
    tokens = calibration(source, text)
    ones = TokenWeights(np.ones((tokens.size, 1), dtype=np.float32), None)
    weights = {layer.path: ones for layer in inventory.layers}
    unweighted = Sensitivity(source.origin, Text(tokens.astype(np.int32)), {}, weights)
    plan = replace(uniform(source, inventory, config, {}), quantizer="gptq")
    write(Conversion(source, inventory, plan, out, force=True, sensitivity=unweighted))


def gptq(source: Source, config: QuantConfig, text: str, routers: list[str], out: Path) -> None:
    """mlx-lm's `gptq_quantize`; `routers` are paths that get 8 bits in groups of 64 instead."""
    from mlx.utils import tree_flatten
    from mlx_lm.quant.gptq import gptq_quantize

    class Router(nn.Linear):
        """gptq_quantize takes plain nn.Linear only; its fallback makes this one 8 bits."""

        def to_quantized(self, **_: Any) -> Any:
            return nn.QuantizedLinear.from_linear(self, 64, 8)

    model = _load(source)
    leaves = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    for path in routers:
        leaves[path].__class__ = Router

    bits, group = config.bits, config.group_size
    data = mx.array(calibration(source, text))
    with _quiet():
        model, block = gptq_quantize(model, data, bits, group, bits, group)
    block |= {path: {"bits": 8, "group_size": 64} for path in routers}
    _save(source, out, model, block)


def awq(source: Source, config: QuantConfig, text: str, out: Path) -> None:
    """mlx-lm's `awq_quantize`.

    Raises:
        MintError: mlx-lm has no settings for this family.
    """
    from mlx_lm.quant.awq import AWQ_MODEL_CONFIGS, awq_quantize, update_config

    settings = AWQ_MODEL_CONFIGS.get(source.config["model_type"])
    if settings is None:
        raise MintError(f"mlx-lm's awq has no settings for {source.config['model_type']}")

    model = _load(source)
    data = mx.array(calibration(source, text))
    with _quiet(), dense_products():
        awq_quantize(
            model,
            data,
            settings,
            bits=config.bits,
            group_size=config.group_size,
            embed_bits=config.bits,
            embed_group_size=config.group_size,
        )
        block = update_config(model, {})["quantization"]
    _save(source, out, model, block)


def dynamic_quant(source: Source, low: int, high: int, target: float, text: str, out: Path) -> None:
    """mlx-lm's `dynamic_quant`: `high` bits for sensitive layers, `low` for others, groups of 64.

    `target` is in bits per weight.
    """
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model

    data = mx.array(calibration(source, text))
    with _quiet():
        model = _load(source)
        sensitivities = dict(estimate_sensitivities(model, data, low, 64, high, 64))

        # As stored: in float32 all that stays unquantized would count twice.
        model = open_model(source)
        threshold = estimate_threshold(
            model,
            sensitivities,
            target,
            low_bits=low,
            low_group_size=64,
            high_bits=high,
            high_group_size=64,
        )

        def predicate(path: str, module: Any) -> bool | dict[str, int]:
            if not hasattr(module, "to_quantized"):
                return False
            return {"bits": high, "group_size": 64} if sensitivities[path] > threshold else True

        model, config = quantize_model(
            model, dict(source.config), 64, low, quant_predicate=predicate
        )
    _save(source, out, model, config["quantization"])


class _Student(NamedTuple):
    """A model that dwq has trained, its loss on the held-out text, and its learning rate."""

    loss: float
    model: Any
    rate: float


def dwq(source: Source, config: QuantConfig, text: str, out: Path) -> None:
    """mlx-lm's DWQ at its best learning rate, for as many passes over the text as that helps.

    Both are chosen by the last tenth of the text, which is held out.

    Raises:
        MintError: it diverged at every learning rate.
    """
    from mlx_lm.utils import quantize_model

    windows = [(window.tolist(), 0) for window in calibration(source, text, 256)]
    held_out = max(2, len(windows) // 10)
    train = windows[:-held_out]
    valid = windows[-held_out:]

    teacher = _load(source)
    with _quiet():
        start, full = quantize_model(
            open_model(source), dict(source.config), config.group_size, config.bits
        )

    best = _Student(math.inf, start, 0.0)
    for rate in DWQ_RATES:
        best = _better(best, start, teacher, train, valid, rate)
    if best.loss == math.inf:
        raise MintError("mlx-lm's dwq diverged at every learning rate")

    for _ in range(DWQ_PASSES - 1):
        further = _better(best, best.model, teacher, train, valid, best.rate)
        if further is best:
            break
        best = further
    _save(source, out, best.model, full["quantization"])


def _better(
    best: _Student, start: Any, teacher: Any, train: list[Any], valid: list[Any], rate: float
) -> _Student:
    """One more pass over the text, from `start` on; its result if it is better than the best."""
    student = copy.deepcopy(start)
    loss = _train(student, teacher, train, valid, rate)
    return _Student(loss, student, rate) if loss < best.loss else best


def _train(student: Any, teacher: Any, train: list[Any], valid: list[Any], rate: float) -> float:
    """Run mlx-lm's `dwq_quantize`; returns the loss on the held-out text afterwards."""
    import mlx.optimizers as optimizers
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.tuner.losses import kl_div_loss

    dtype = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    student.set_dtype(dtype)
    with _quiet(), dense_products():
        dwq_quantize(
            student,
            lambda batch, index, split: teacher(batch),
            optimizers.Adam(learning_rate=rate, bias_correction=True),
            train,
            valid,
            batch_size=2,
            max_seq_length=len(train[0][0]),
            seed=0,
            dtype=dtype,
        )

        losses = []
        for tokens, _ in valid:
            ours = student(mx.array([tokens])).astype(mx.float32)
            theirs = teacher(mx.array([tokens])).astype(mx.float32)
            losses.append(mx.mean(kl_div_loss(ours, theirs)).item())
    return float(np.mean(losses))


# What they share


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what mlx-lm prints on stdout and the bars that it draws on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def calibration(source: Source, text: str, length: int = 512) -> np.ndarray:
    """Windows of the baseline text, int (windows, tokens), no longer than the model's context.

    Raises:
        MintError: it is too short for two of them.
    """
    length = min(length, context_of(source.config) or length)
    ids = encode(load_tokenizer(source.path), text[: 16 * CALIBRATION])[:CALIBRATION]
    count = len(ids) // length
    if count < 2:
        raise MintError(
            f"the baseline text has {len(ids)} tokens, but calibrating needs {2 * length} or more: "
            "give a longer one with --baseline-text"
        )
    return np.asarray(ids[: count * length]).reshape(count, length)


def _dtype(source: Source) -> str:
    """The 16-bit type of a source, as mlx-lm calls it."""
    return "float16" if stated_dtype(source.config) == "F16" else "bfloat16"


def _load(source: Source) -> Any:
    """The model with its weights; in float32 on a CPU, where gather_mm takes nothing else."""
    model = open_model(source)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def _save(source: Source, out: Path, model: Any, quantization: dict[str, Any]) -> None:
    """Write a peer's model with mlx-lm's own writer, scales in the source's 16-bit type."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import save_config, save_model

    # Some parameters must stay float32: the model class says which.
    dtype = getattr(mx, _dtype(source))
    may_cast = getattr(model, "cast_predicate", None) or (lambda _: True)
    cast = [
        (path, array.astype(dtype))
        for path, array in tree_flatten(model.parameters())
        if mx.issubdtype(array.dtype, mx.floating) and may_cast(path)
    ]
    model.load_weights(cast, strict=False)

    out.mkdir(parents=True)
    save_model(out, model)
    block = {"mode": "affine"} | quantization
    save_config(dict(source.config) | {"quantization": block}, out / "config.json")
    copy_small_files(source, out, "text")
