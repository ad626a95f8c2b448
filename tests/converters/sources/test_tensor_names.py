"""Tensors under the names that they have in memory become those that mlx-lm reads."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from families import write_family
from helpers import TOKENS, Weights, edit_weights, kl
from mlx.utils import tree_flatten

from mint_mlx.base.errors import MintError
from mint_mlx.checkpoint.mlxlm import build_model
from mint_mlx.jobs.convert import convert

EXPERTS = re.compile(r"(.*)\.(switch_mlp|experts)\.(gate|up|down)_proj\.weight")


def parameters(folder: Path) -> dict[str, mx.array]:
    arrays = dict(tree_flatten(build_model(folder).parameters()))
    mx.eval(arrays)  # before the file is rewritten
    return arrays


def fused(weights: Weights, turned: bool = False) -> Weights:
    """Experts as transformers holds them in memory; `turned`: with inputs before outputs."""
    result = {n: a for n, a in weights.items() if not EXPERTS.fullmatch(n)}
    for name in weights:
        match = EXPERTS.fullmatch(name)
        if match and match[3] == "up":
            gate, up, down = (
                weights[f"{match[1]}.{match[2]}.{n}_proj.weight"] for n in ("gate", "up", "down")
            )
            pair = {"gate_up": mx.concatenate([gate, up], axis=1), "down": down}
            for leaf, array in pair.items():
                turn = array.swapaxes(1, 2) if turned else array
                result[f"{match[1]}.experts.{leaf}_proj"] = turn
    return result


def single(weights: Weights) -> Weights:
    """Experts as released by most, each in tensors of its own."""
    result: Weights = {}
    for name, array in weights.items():
        match = EXPERTS.fullmatch(name)
        if match is None:
            result[name] = array
            continue
        for e in range(array.shape[0]):
            result[f"{match[1]}.experts.{e}.{match[3]}_proj.weight"] = array[e]
    return result


def renamed(*pairs: tuple[str, str]) -> Callable[[Weights], Weights]:
    """A change of names by regular expressions."""

    def change(weights: Weights) -> Weights:
        result = {}
        for name, array in weights.items():
            for pattern, new in pairs:
                name = re.sub(pattern, new, name)
            result[name] = array
        return result

    return change


def in_memory(weights: Weights) -> Weights:
    """As transformers holds them: MoE blocks are called mlp."""
    return renamed((r"block_sparse_moe", "mlp"))(fused(weights))


CASES: list[tuple[str, Callable[[Weights], Weights]]] = [
    ("qwen3_moe", fused),
    ("qwen3_moe", lambda w: fused(w, turned=True)),
    ("qwen3_moe", lambda w: renamed((r"^", "_orig_mod."))(single(w))),
    ("qwen3_moe", lambda w: renamed((r"^", "module._fsdp_wrapped_module."))(single(w))),
    (
        "qwen3_moe",
        lambda w: renamed((r"(layers\.\d+\.)", r"\1_checkpoint_wrapped_module._orig_mod."))(
            single(w)
        ),
    ),
    ("qwen3_moe", lambda w: renamed((r"^model\.", ""))(single(w))),
    ("qwen2_moe", fused),
    ("olmoe", fused),
    ("glm4_moe", fused),
    ("deepseek_v3", fused),
    ("dots1", fused),
    ("ernie4_5_moe", fused),
    ("mixtral", fused),
    ("mixtral", in_memory),
    ("mixtral", renamed((r"block_sparse_moe\.gate", "mlp.gate"))),
    ("phimoe", lambda w: renamed((r"mlp\.gate", "mlp.router"))(in_memory(w))),
    ("minimax", in_memory),
    ("minimax", lambda w: renamed((r"mlp\.e_score", "mlp.gate.e_score"))(in_memory(w))),
    ("granitemoe", lambda w: renamed((r"router\.layer", "router"))(fused(w))),
    ("jamba", fused),
    ("lfm2_moe", fused),
    ("qwen3_vl_moe", fused),
    ("qwen3_vl_moe", lambda w: fused(w, turned=True)),
    ("qwen3_vl_moe", single),
    ("qwen3_5_moe", fused),
    ("qwen3_5_moe", lambda w: fused(w, turned=True)),
    ("qwen3_5_moe", single),
    (
        "qwen3_5_moe",
        lambda w: renamed((r"^language_model\.model", "model.language_model"))(single(w)),
    ),
    ("kimi_linear", renamed((r"layers\.0\.mlp", "layers.0.block_sparse_moe"))),
    ("kimi_linear", fused),
    ("qwen3_vl_moe", lambda w: renamed((r"experts\.(\d+)\.(\w+)", r"experts.\2s.\1"))(single(w))),
    ("llama4", renamed((r"^language_model\.", ""))),
    ("llama4", renamed((r"^language_model\.model", "model.language_model"))),
]


@pytest.mark.parametrize(
    ("family", "change"), CASES, ids=[f"{n}-{f}" for n, (f, _) in enumerate(CASES)]
)
def test_the_parameters_are_those_of_the_released_names(
    family: str, change: Callable[[Weights], Weights], tmp_path: Path
) -> None:
    folder = write_family(tmp_path / "model", family)
    expected = parameters(folder)
    before = set(mx.load(str(folder / "model.safetensors")))
    edit_weights(folder, change)
    assert set(mx.load(str(folder / "model.safetensors"))) != before
    actual = parameters(folder)
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert mx.array_equal(actual[name], array), name


def test_a_fused_qwen3_next_is_sanitized_like_a_released_one(tmp_path: Path) -> None:
    def stored(weights: Weights) -> Weights:
        return {n: a.swapaxes(1, 2) if "conv1d.weight" in n else a for n, a in weights.items()}

    released = write_family(tmp_path / "released", "qwen3_next")
    edit_weights(released, lambda w: single(stored(w)))
    other = write_family(tmp_path / "fused", "qwen3_next")
    edit_weights(other, lambda w: fused(stored(w)))
    expected, actual = parameters(released), parameters(other)
    assert actual.keys() == expected.keys()
    assert all(mx.array_equal(actual[name], array) for name, array in expected.items())


def test_a_conversion_of_fused_experts(tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", "qwen3_moe")
    edit_weights(folder, fused)
    result = convert(str(folder), uniform="keep", out=tmp_path / "out")
    assert kl(folder, result.path, TOKENS) == 0


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_shapes_that_fit_in_no_order_are_refused(axis: int, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", "qwen3_moe")

    def cut(weights: Weights) -> Weights:
        index: list[Any] = [slice(None)] * 3
        index[axis] = slice(0, -2)
        changed = fused(weights)
        return {n: a[tuple(index)] if n.endswith("gate_up_proj") else a for n, a in changed.items()}

    edit_weights(folder, cut)
    with pytest.raises(MintError, match="mlx-lm cannot build"):
        build_model(folder)
