"""The estimate of a Mac's speed, held against figures that others published."""

from __future__ import annotations

import pytest

from mint_mlx.base.quant_config import QuantConfig, parse_config
from mint_mlx.checkpoint.layers import Inventory, Layer
from mint_mlx.runtime.speed_estimate import (
    BAND,
    CHIPS,
    RATES,
    estimate,
    find_chip,
    macs_with,
    prompt_band,
)
from mint_mlx.runtime.speed_table import layer_seconds, predict, prompt_speed, speed_of


def dense(
    blocks: int, hidden: int, wide: int, queries: int, keys: int, vocabulary: int
) -> Inventory:
    """A dense model with a head of its own."""
    layers = [Layer("lm_head", (vocabulary, hidden), "BF16", "linear", "head")]
    for block in range(blocks):
        shapes = {
            "q": (queries, hidden),
            "k": (keys, hidden),
            "v": (keys, hidden),
            "o": (hidden, queries),
            "gate": (wide, hidden),
            "up": (wide, hidden),
            "down": (hidden, wide),
        }
        for name, shape in shapes.items():
            path = f"model.layers.{block}.{name}_proj"
            layers.append(Layer(path, shape, "BF16", "linear", "mlp"))
    return Inventory(tuple(layers), {}, ())


QWEN3_4B = (36, 2560, 9728, 4096, 1024, 151936)
LLAMA_70B = (80, 8192, 28672, 8192, 1024, 128256)


@pytest.mark.parametrize(
    ("chip", "shape", "config", "tokens_per_second"),
    [
        ("M4 Max", QWEN3_4B, "mxfp8", 88.0),  # mlx PR 2946
        ("M4 Max", QWEN3_4B, "8bit-g64", 87.5),
        ("M4 Max", QWEN3_4B, "mxfp4", 141.0),
        ("M4 Max", QWEN3_4B, "nvfp4", 136.0),
        ("M4 Max", QWEN3_4B, "4bit-g64", 138.0),
        ("M5 Max", LLAMA_70B, "4bit-g64", 1 / 0.076),  # mlx PR 3791
    ],
)
def test_whole_models(
    chip: str, shape: tuple[int, ...], config: str, tokens_per_second: float
) -> None:
    inventory = dense(*shape)
    mac = find_chip(chip)
    assert mac is not None
    table = estimate(mac, inventory, "model", {1: 0})
    choice = {layer.path: parse_config(config) for layer in inventory.layers}
    low, high = predict(table, inventory, choice, 1).band
    assert low < tokens_per_second < high


@pytest.mark.parametrize(
    ("chip", "config", "milliseconds"),
    [
        ("M4 Pro", "2bit-g128", 0.121),  # mlx issue 3852
        ("M4 Pro", "4bit-g128", 0.198),
        ("M3 Max", "4bit-g64", 0.129),  # mlx PR 3863
    ],
)
def test_one_product(chip: str, config: str, milliseconds: float) -> None:
    layer = Layer("up_proj", (17408, 5120), "BF16", "linear", "mlp")
    assert within(chip, layer, config, milliseconds / 1e3)


@pytest.mark.parametrize("gigabytes", [258, 387])
def test_experts(gigabytes: float) -> None:
    """An M3 Ultra reads top-8 of 288 experts at 258 GB/s alone, 387 in a chain (mlx issue 4509)."""
    layer = Layer("up", (288, 2048, 4096), "BF16", "experts", "expert", reads=8 / 288)
    read = 8 * 2048 * 4096 * 4.5 / 8
    assert within("M3 Ultra", layer, "4bit-g64", read / gigabytes / 1e9)


MISTRAL_7B = (32, 4096, 14336, 4096, 1024, 32768)
LLAMA_8B = (32, 4096, 14336, 4096, 1024, 128256)


@pytest.mark.parametrize(
    ("chip", "shape", "tokens_per_second"),
    [
        ("M1 Max", LLAMA_8B, 499.6),  # llama.cpp: normiebench issue 40
        ("M2 Ultra", MISTRAL_7B, 869.3),  # mlx-lm PR 40, with attention over 33,898 tokens
        ("M3 Ultra", LLAMA_70B, 162.3),  # llama.cpp: beowulf-ai-cluster issue 17
        ("M4 Max", QWEN3_4B, 1574.0),  # mlx PR 2946, mxfp8
        ("M4 Max", QWEN3_4B, 1621.0),  # 4bit-g64
    ],
)
def test_prompts(chip: str, shape: tuple[int, ...], tokens_per_second: float) -> None:
    assert reads_prompt(chip, dense(*shape), tokens_per_second)


@pytest.mark.parametrize(
    ("chip", "weights", "tokens_per_second"),
    [
        ("M4 Max", 24.4e9, 266.2),  # Qwen3.6-27B without its tables: mlx-serve issue 120
        ("M5 Max", 24.4e9, 662.4),
        ("M5", 1.04e9, 6069.8),  # LFM2.5-1.2B without its table: mlx-lm PR 753
    ],
)
def test_prompts_of_models_as_large(chip: str, weights: float, tokens_per_second: float) -> None:
    layer = Layer("layers.0.x", (round(weights / 4096), 4096), "BF16", "linear", "mlp")
    assert reads_prompt(chip, Inventory((layer,), {}, ()), tokens_per_second)


def test_a_prompt_of_experts() -> None:
    """Qwen3-30B-A3B on an M3 Max: 681 tokens at 1160.6 a second (mlx-lm issue 92)."""
    layers = []
    for block in range(48):
        for i, shape in enumerate(((4096, 2048), (2048, 4096), (512, 2048), (512, 2048))):
            layers.append(Layer(f"layers.{block}.{i}", shape, "BF16", "linear", "mlp"))
        for i, size in enumerate(((768, 2048), (768, 2048), (2048, 768))):
            path = f"layers.{block}.e{i}"
            layers.append(Layer(path, (128, *size), "BF16", "experts", "expert", reads=8 / 128))
    assert reads_prompt("M3 Max", Inventory(tuple(layers), {}, ()), 1160.6)


def test_a_prompt_is_read_as_fast_at_all_bits() -> None:
    inventory = dense(*QWEN3_4B)
    table = estimate(CHIPS[-1], inventory, "model", {1: 0})
    choices = (
        {x.path: parse_config(c) for x in inventory.layers} for c in ("2bit-g32", "8bit-g64")
    )
    speeds = {prompt_speed(table, inventory, choice) for choice in choices}
    assert len(speeds) == 1
    assert all(chip.name[:2] in RATES and chip.cores >= 8 for chip in CHIPS)


def reads_prompt(chip: str, inventory: Inventory, tokens_per_second: float) -> bool:
    """Whether a measured speed of reading a prompt lies in the band of the estimated one."""
    mac = find_chip(chip)
    assert mac is not None
    table = estimate(mac, inventory, "model", {1: 0})
    choice = {layer.path: QuantConfig(4, 64) for layer in inventory.layers}
    speed = prompt_speed(table, inventory, choice)
    assert speed is not None
    low, high = prompt_band(speed)
    return low < tokens_per_second < high


def within(chip: str, layer: Layer, config: str, seconds: float) -> bool:
    """Whether a measured time lies in the band of the estimated one."""
    mac = find_chip(chip)
    assert mac is not None
    inventory = Inventory((layer,), {}, ())
    table = estimate(mac, inventory, "model", {1: 0})
    speed = speed_of(table, 1 / layer_seconds(table, layer, parse_config(config)), 1)
    return speed.band[0] < 1 / seconds < speed.band[1]


def test_a_slow_kernel_and_a_long_context_take_longer() -> None:
    chip = CHIPS[0]
    wide, odd = (Layer(f"x{n}", (2048, n), "BF16", "linear", "mlp") for n in (1024, 1408))
    inventory = Inventory((wide, odd), {}, ())
    table = estimate(chip, inventory, "model", {1: 0, 1000: 10**9})
    config = QuantConfig(4, 64)
    fast, slow = (layer_seconds(table, layer, config) for layer in (wide, odd))
    assert slow / fast > 1408 / 1024 * 1.2
    choice = {layer.path: config for layer in inventory.layers}
    speeds = [predict(table, inventory, choice, c).tokens_per_second for c in (1, 1000)]
    assert speeds[0] > speeds[1]
    assert table.estimated and table.band == BAND


def test_chips_are_known_by_name_and_memory() -> None:
    assert find_chip("m4-pro") == find_chip("Apple M4 Pro") == find_chip("M4 Pro")
    assert find_chip("M9") is None
    assert "M4 Max 32-core" in [chip.name for chip in macs_with(36)]
    assert macs_with(17) == ()
