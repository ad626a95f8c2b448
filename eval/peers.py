"""The peers: quantizers of mlx-lm, each called by its own functions and written as a checkpoint
like ours.

Those that calibrate see the baseline text and nothing else. Their scales are cast to the source's
16-bit type before bytes are counted, since on a CPU some of them leave float32 behind.
"""

from __future__ import annotations

import contextlib
import copy
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..allocation.allocate import uniform
from ..base.errors import MintError
from ..base.hf_config import stated_dtype
from ..base.quant_config import AFFINE_BITS, AFFINE_GROUPS, KEEP, QuantConfig
from ..checkpoint.layers import Inventory
from ..checkpoint.layout import weight_tensors
from ..checkpoint.source import Source, open_model
from ..checkpoint.tokenizer import encode, load_tokenizer
from ..converters.output.write import Conversion, write
from ..converters.sources.layouts import read_layout
from ..jobs.model import Job
from ..measure.sensitivity import Sensitivity, TokenWeights
from ..runtime.cpu_ops import dense_products
from .protocol import context_of

RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
CALIBRATED = ("gptq", "gptq-guarded", "feedback", "awq", "dwq", "dynamic_quant")
NEAR = 0.55  # bits per weight around a budget in which uniform sizes are taken
CALIBRATION = 65_536  # tokens of the baseline text at most
DWQ_RATES = (1e-6, 1e-5, 1e-4, 1e-3)
DWQ_PASSES = (
    5  # over the text, at most: as many steps and tokens as mlx-lm takes by itself, or `best` does
)


@dataclass(frozen=True)
class Peer:
    """One peer at one size.

    Attributes:
        name: as in the table.
        text: whether it sees the baseline text.
        build: writes the checkpoint into a folder.
        about: its parameters, for the table and the cache.
    """

    name: str
    text: bool
    build: Callable[[Path], None]
    about: str


def uniform_sizes(
    inventory: Inventory, bits: tuple[int, ...], groups: tuple[int, ...]
) -> dict[QuantConfig, int]:
    """Bytes of all weights under each uniform configuration, roughly (guards and file headers
    aside).
    """
    paths = [layer.path for layer in inventory.layers]
    return {
        c: _size(inventory, dict.fromkeys(paths, c))
        for c in (QuantConfig(b, g) for b in bits for g in groups)
    }


def _size(inventory: Inventory, choice: dict[str, QuantConfig]) -> int:
    total = inventory.other_bytes
    for layer in inventory.layers:
        config = choice[layer.path]
        usable = config if config.divides(layer.shape[-1]) and not layer.keep else KEEP
        total += sum(
            spec.nbytes for spec in weight_tensors(layer.path, layer.shape, layer.dtype, usable)
        )
    return total


def recipe_size(source: Source, inventory: Inventory, recipe: str) -> int | None:
    """Bytes of all weights under a recipe of mlx-lm, roughly; None where mlx-lm has none for this
    model.
    """
    from mlx_lm.convert import mixed_quant_predicate_builder

    model = open_model(source)
    try:
        predicate: Any = mixed_quant_predicate_builder(recipe, model)
    except ValueError:
        return None
    modules = dict(model.named_modules())
    wanted = {layer.path: predicate(layer.path, modules[layer.path]) for layer in inventory.layers}
    return _size(
        inventory,
        {p: QuantConfig(w["bits"], w["group_size"]) if w else KEEP for p, w in wanted.items()},
    )


def nearest(sizes: dict[QuantConfig, int], budget: int) -> QuantConfig:
    """The configuration whose size comes closest to a budget."""
    return min(sizes, key=lambda c: (abs(sizes[c] - budget), c))


def make_peers(
    name: str, source: Source, inventory: Inventory, budget: int, text: str | None
) -> list[Peer]:
    """Set a peer up for a budget: of its fixed sizes those within NEAR of it.

    Args:
        name: `uniform-g32`, `mixed_3_4`, `gptq`, `gptq-guarded`, `feedback`, `awq`, `dwq`,
            `dynamic_quant`.
        source: the unquantized checkpoint.
        inventory: its layers.
        budget: bytes aimed at.
        text: the baseline text, for those that calibrate.

    Raises:
        MintError: there is no such peer, or it needs a text.
    """
    bits_per_weight = budget * 8 / inventory.parameters
    if name.startswith("uniform-g") and name[9:].isdigit() and int(name[9:]) in AFFINE_GROUPS:
        sizes = uniform_sizes(inventory, AFFINE_BITS, (int(name[9:]),))
        close = [
            c for c, size in sizes.items() if abs(size - budget) * 8 <= NEAR * inventory.parameters
        ]
        return [Peer(name, False, partial(_convert, source, c), str(c)) for c in close]
    if name in RECIPES:
        size = recipe_size(source, inventory, name)  # None: mlx-lm will say why, in a row
        if size is not None and abs(size - budget) * 8 > NEAR * inventory.parameters:
            return []
        return [Peer(name, False, partial(_recipe, source, name), "g64")]
    if text is None:
        raise MintError(
            f"{name} calibrates on a text: give one with --baseline-text (never the text that is "
            "scored)"
        )
    if name in ("gptq", "gptq-guarded"):
        config = nearest(uniform_sizes(inventory, (2, 4, 8), AFFINE_GROUPS), budget)
        guarded = name != "gptq"
        routers = (
            [layer.path for layer in inventory.layers if layer.role == "router"] if guarded else []
        )
        return [Peer(name, True, partial(_gptq, source, config, text, routers), str(config))]
    if name == "feedback":
        config = nearest(uniform_sizes(inventory, AFFINE_BITS, AFFINE_GROUPS), budget)
        return [Peer(name, True, partial(_feedback, source, inventory, config, text), str(config))]
    if name == "awq":
        config = nearest(uniform_sizes(inventory, AFFINE_BITS, AFFINE_GROUPS), budget)
        return [Peer(name, True, partial(_awq, source, config, text), str(config))]
    if name == "dwq":
        config = nearest(
            uniform_sizes(inventory, tuple(b for b in AFFINE_BITS if b < 8), AFFINE_GROUPS), budget
        )
        return [
            Peer(
                name,
                True,
                partial(_dwq, source, config, text),
                f"{config}, up to {DWQ_PASSES} passes",
            )
        ]
    if name == "dynamic_quant":
        low = max((b for b in AFFINE_BITS if b + 0.7 <= bits_per_weight), default=2)
        high = min(b for b in AFFINE_BITS if b >= min(low + 2, 8))
        about = f"{low} and {high} bits, g64, to {bits_per_weight:.4f} bpw"
        return [
            Peer(name, True, partial(_dynamic, source, low, high, bits_per_weight, text), about)
        ]
    raise MintError(f"no method is called {name!r}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """mlx-lm prints on stdout and draws bars on stderr."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def _convert(source: Source, config: QuantConfig, out: Path) -> None:
    from mlx_lm import convert

    bits, group = config.bits, config.group_size
    with _quiet():
        convert(
            str(source.path),
            str(out),
            quantize=True,
            q_bits=bits,
            q_group_size=group,
            dtype=_dtype(source),
        )


def _feedback(
    source: Source, inventory: Inventory, config: QuantConfig, text: str, out: Path
) -> None:
    """Plain GPTQ by our own error feedback: uniform bits, inputs from the text, expert by expert,
    unweighted.
    """
    tokens = calibration(source, text)
    ones = TokenWeights(np.ones((tokens.size, 1), dtype=np.float32), None)
    weights = {layer.path: ones for layer in inventory.layers}
    plain = Sensitivity(source.origin, tokens.astype(np.int32), "text", {}, weights)
    plan = replace(uniform(source, inventory, config, {}), quantizer="gptq")
    write(Conversion(source, inventory, plan, out, force=True, sensitivity=plain))


def _recipe(source: Source, recipe: str, out: Path) -> None:
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


def _load(source: Source) -> Any:
    """The model as peers take it: in float32 on a CPU, where gather_mm knows nothing else."""
    model = open_model(source)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    return model


def refuse_quantized(job: Job) -> None:
    """Refuse a source that is quantized already.

    Raises:
        MintError: naming the first such layer.
    """
    stored = [layer for layer in job.inventory.layers if layer.stored]
    if stored or read_layout(job.source.config, job.source.path):
        how = (
            f"{stored[0].path} is {stored[0].stored}"
            if stored
            else "config.json has a quantization_config"
        )
        raise MintError(
            f"{job.source.name} is quantized already ({how}), which mlx-lm's own methods don't "
            "take: give the original checkpoint in bf16, fp16 or fp32"
        )


def calibration(source: Source, text: str, length: int = 512) -> np.ndarray:
    """Windows of the baseline text, int (windows, tokens), no longer than the model's context."""
    length = min(length, context_of(source.config) or length)
    ids = encode(load_tokenizer(source.path), text[: 16 * CALIBRATION])[:CALIBRATION]
    count = len(ids) // length
    if count < 2:
        raise MintError(
            f"the baseline text has {len(ids)} tokens: at least {2 * length} are needed"
        )
    return np.asarray(ids[: count * length]).reshape(count, length)


def _dtype(source: Source) -> str:
    """The 16-bit type of a source, as mlx-lm calls it."""
    return "float16" if stated_dtype(source.config) == "F16" else "bfloat16"


def _save(source: Source, out: Path, model: Any, quantization: dict[str, Any]) -> None:
    """Write a peer's model with mlx-lm's own writer, scales in the source's 16-bit type."""
    from mlx.utils import tree_flatten
    from mlx_lm.utils import save_config, save_model

    kind, cast = (
        getattr(mx, _dtype(source)),
        getattr(model, "cast_predicate", None) or (lambda _: True),
    )
    floating = (
        (path, a)
        for path, a in tree_flatten(model.parameters())
        if mx.issubdtype(a.dtype, mx.floating)
    )
    model.load_weights([(path, a.astype(kind)) for path, a in floating if cast(path)], strict=False)
    out.mkdir(parents=True)
    save_model(out, model)
    save_config(
        dict(source.config) | {"quantization": {"mode": "affine"} | quantization},
        out / "config.json",
    )
    for file in source.path.iterdir():
        if file.name.startswith(
            ("tokenizer", "special_tokens", "vocab", "merges", "chat_template")
        ):
            shutil.copyfile(file, out / file.name)


def _gptq(source: Source, config: QuantConfig, text: str, routers: list[str], out: Path) -> None:
    from mlx.utils import tree_flatten
    from mlx_lm.quant.gptq import gptq_quantize

    class Router(nn.Linear):
        """Passed over by gptq_quantize, which takes plain nn.Linear only; its fallback makes it 8
        bits.
        """

        def to_quantized(self, **_: Any) -> Any:
            return nn.QuantizedLinear.from_linear(self, 64, 8)

    model = _load(source)
    leaves = dict(tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module))
    for path in routers:
        leaves[path].__class__ = Router
    data = mx.array(calibration(source, text))
    with _quiet():
        model, block = gptq_quantize(
            model, data, config.bits, config.group_size, config.bits, config.group_size
        )
    block |= {path: {"bits": 8, "group_size": 64} for path in routers}
    _save(source, out, model, block)


def _awq(source: Source, config: QuantConfig, text: str, out: Path) -> None:
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


def _dynamic(source: Source, low: int, high: int, target: float, text: str, out: Path) -> None:
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities, estimate_threshold
    from mlx_lm.utils import quantize_model

    data = mx.array(calibration(source, text))
    with _quiet():
        model = _load(source)
        sensitivities = dict(estimate_sensitivities(model, data, low, 64, high, 64))
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


def _dwq(source: Source, config: QuantConfig, text: str, out: Path) -> None:
    """DWQ at the best of several learning rates, then on as long as that helps, by a part of the
    text held out.
    """
    from mlx_lm.utils import quantize_model

    windows = calibration(source, text, 256)
    held = max(2, len(windows) // 10)
    train, valid = ([(w.tolist(), 0) for w in part] for part in (windows[:-held], windows[-held:]))
    teacher = _load(source)
    with _quiet():
        start, full = quantize_model(
            open_model(source), dict(source.config), config.group_size, config.bits
        )

    best: tuple[float, Any, float] | None = None

    def improve(student: Any, rate: float) -> bool:
        """Let a student see the text (again); whether it is the best now, by what is held out."""
        nonlocal best
        student = copy.deepcopy(student)
        loss = _distil(student, teacher, train, valid, rate)
        better = np.isfinite(loss) and (best is None or loss < best[0])
        best = (loss, student, rate) if better else best
        return bool(better)

    for rate in DWQ_RATES:
        improve(start, rate)
    if best is None:
        raise MintError("mlx-lm's dwq diverged at every learning rate")
    for _ in range(DWQ_PASSES - 1):
        if not improve(*best[1:]):
            break
    _save(source, out, best[1], full["quantization"])


def _distil(student: Any, teacher: Any, train: list[Any], valid: list[Any], rate: float) -> float:
    """Run mlx-lm's dwq_quantize and return its loss on the held-out part afterwards."""
    import mlx.optimizers as optimizers
    from mlx_lm.quant.dwq import dwq_quantize
    from mlx_lm.tuner.losses import kl_div_loss

    kind = mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16
    student.set_dtype(kind)
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
            dtype=kind,
        )
        losses = []
        for tokens, _ in valid:
            ours, theirs = (
                model(mx.array([tokens])).astype(mx.float32) for model in (student, teacher)
            )
            losses.append(mx.mean(kl_div_loss(ours, theirs)).item())
    return float(np.mean(losses))


def stored_bytes(folder: Path) -> int:
    """Bytes of a checkpoint's safetensors files."""
    return sum(f.stat().st_size for f in folder.glob("*.safetensors"))
