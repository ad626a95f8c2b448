"""Pictures: what they are drawn from, and what stands in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import Cli, Maker, llama, qwen3_moe

from mint_mlx.allocation.sweep import Measured, Point, Sweep
from mint_mlx.base.errors import MintError
from mint_mlx.base.pictures import is_picture
from mint_mlx.base.quant_config import KEEP, QuantConfig
from mint_mlx.eval.pictures import heat_map, loss_map, mac_bars, size_curve, style
from mint_mlx.eval.pictures.style import to_svg
from mint_mlx.jobs.inspect import LayerInfo
from mint_mlx.rules.efforts import band

GB = 10**9
FOUR, EIGHT = QuantConfig(4, 64), QuantConfig(8, 32)


def info(path: str, size: int, config: QuantConfig = FOUR) -> LayerInfo:
    return LayerInfo(path, "other", None, size, config, size)


def blocks(count: int, experts: int = 1) -> list[LayerInfo]:
    """An embedding, blocks with a small and a large projection, a head."""
    layers = [replace(info("model.embed_tokens", 500), role="embedding")]
    for i in range(count):
        layers.append(info(f"model.layers.{i}.attn.q_proj", 1, EIGHT))
        layers += [
            info(f"model.layers.{i}.mlp.experts.{e}.up_proj", 100 // experts)
            for e in range(experts)
        ]
    return [*layers, info("lm_head", 300, KEEP)]


def texts(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_a_grid_has_a_row_a_block_and_a_column_a_projection() -> None:
    """Experts that a family holds apart count together."""
    for experts in (1, 4):
        grid = heat_map.make_grid(blocks(3, experts))
        assert [column.label for column in grid.columns] == ["q_proj", "up_proj"]
        assert [column.bytes for column in grid.columns] == [3, 300]
        assert [layer.path for layer in grid.ends] == ["model.embed_tokens", "lm_head"]
        assert grid.blocks == 3
        lines = heat_map.column_lines(blocks(3, experts))
        assert [line[0] for line in lines] == ["q_proj", "up_proj", "embed_tokens", "lm_head"]
        assert sum(float(line[4].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.2)


def test_names_are_as_short_as_they_can_be() -> None:
    paths = ["layers.*.mlp.gate_proj", "layers.*.mlp.switch_mlp.gate_proj", "layers.*.mlp.gate"]
    assert list(heat_map._short_names(paths).values()) == [
        "mlp.gate_proj",
        "switch_mlp.gate_proj",
        "gate",
    ]


def test_bars_are_as_wide_as_their_bytes_unless_they_would_vanish() -> None:
    grid = heat_map.make_grid(blocks(2))
    widths, scale = heat_map._widths(grid, 900, 20)
    assert widths == pytest.approx([20, 880]) and scale == pytest.approx(8.8)
    assert sum(widths) == pytest.approx(900)
    shown = texts(to_svg(heat_map.heat_map(blocks(2), "a plan"), narrow=False))
    assert {"q_proj *", "up_proj", "4 bits", "8 bits", "unquantized", "groups of 32"} <= set(shown)


def test_many_layers_stay_small_and_readable() -> None:
    """94 blocks of ten projections, of which no bar is like the one above it."""
    layers = [
        info(f"model.layers.{i}.p{j}", 1000 + 50 * j, QuantConfig(3 + (i + j) % 3, 64))
        for i in range(94)
        for j in range(10)
    ]
    svg = to_svg(heat_map.heat_map(layers, "large"), narrow=True)
    assert len(svg) < 200_000
    width, height = map(float, re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    assert width == style.NARROW and height < 1500
    assert min(map(float, re.findall(r"(?:font|font-size): ([\d.]+)px", svg))) >= 7


def test_endless_plans_are_refused() -> None:
    with pytest.raises(MintError, match="more than a picture can show"):
        heat_map.heat_map([info("model.layers.99999.q_proj", 1)], "endless")


def curve(points: Sequence[tuple[int, float]]) -> Sweep:
    places = [Point(size, size * 8 / GB, loss, band(loss)) for size, loss in points]
    return Sweep("org/$name$", "fisher", places, 0, [(16, 5 * GB), (24, 7 * GB)], [])


def test_a_curve_has_bits_macs_a_band_and_the_checkpoint() -> None:
    drawn = curve([(4 * GB, 0.1), (6 * GB, 0.01), (8 * GB, 0.001)])
    uniform = [size_curve.UniformPoint("4bit-g64", 5 * GB, 0.2)]
    picture = size_curve.size_curve(drawn, size_curve.Marked(6 * GB, 0.01, 0.02, 0.001), uniform)
    shown = texts(to_svg(picture, narrow=False))
    for text in (
        "bits per weight",
        "size of all safetensors files (GB)",
        "16 GiB Mac",
        "24 GiB Mac",
        "4bit-g64",
        "this checkpoint, measured",
        "where true KLs were, 0.2 to 5.5 times the expected (more near 0)",
        "org/$name$",
    ):
        assert text in shown
    assert "measured 0.02" in picture.alt

    # A loss without a band is none of KL; perplexities of a user have an axis of their own.
    points = [replace(point, band=None) for point in drawn.points]
    plain = replace(drawn, objective="prior", points=points, measured=[Measured(5 * GB, 7.5)])
    shown = texts(to_svg(size_curve.size_curve(plain), narrow=True))
    assert "loss (prior)" in shown and "measured perplexity" in shown
    assert not any("true KLs" in text for text in shown)


def test_losses_are_shares_of_the_whole() -> None:
    layers = blocks(2)
    losses = {layer.path: (3.0 if "q_proj" in layer.path else 1.0) for layer in layers}
    shares = loss_map.shares(layers, losses)
    assert shares[0].label == "q_proj" and shares[0].loss == pytest.approx(0.6)
    assert sum(share.loss for share in shares) == pytest.approx(1)
    assert sum(share.bytes for share in shares) == pytest.approx(1)
    assert loss_map.by_block(losses) == pytest.approx([0.4, 0.4])


def test_macs_around_the_loads_are_shown() -> None:
    loads = [mac_bars.Load("8K", 17 * GB, GB), mac_bars.Load("16 bits", 61 * GB, GB)]
    shown = [gib for gib, _ in mac_bars._shown_macs(loads)]
    assert shown[0] <= 32 and 96 in shown and shown[-1] == 96
    assert len(shown) <= 8


def contrast(one: str, two: str) -> float:
    """The ratio of two colours' luminances, as WCAG 2 defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dim = sorted((luminance(one), luminance(two)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_texts_stand_out_from_what_they_stand_on() -> None:
    for colours in (style.COLOURS, style.DARK):
        for name in ("ink", "muted", "blue", "orange", "green", "pink"):
            assert contrast(colours[name], colours["paper"]) >= 4.5, name
    for bits, colour in heat_map.BITS.items():
        text = heat_map.WHITE if bits in heat_map.ON_DARK else heat_map.BLACK
        assert contrast(text, colour) >= 4.5, bits


def test_inspect_draws_models_and_plans(cli: Cli, make: Maker, tmp_path: Path) -> None:
    model = make(qwen3_moe(1))
    picture = tmp_path / "plan.png"
    assert cli("inspect", model, "--plot", picture).code == 0
    assert is_picture(picture)
    (tmp_path / "other.png").write_bytes(b"mine")
    assert cli("inspect", model, "--plot", tmp_path / "other.png").code == 1
    profile = tmp_path / "p.json"
    assert cli("profile", make(llama(1), "dense"), "-o", profile).code == 0
    refused = cli("inspect", profile, "--plot", picture)
    assert refused.code == 2 and "sweep --plot" in refused.err


def test_convert_without_a_size_draws_its_curve(cli: Cli, make: Maker, tmp_path: Path) -> None:
    picture = tmp_path / "curve.svg"
    ran = cli("convert", make(llama(1)), "--plot", picture)
    assert ran.code == 2 and "drawn" in ran.out
    assert "if its weights were Gaussian" in picture.read_text()
