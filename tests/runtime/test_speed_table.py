"""What a speed table knows, and what follows for a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mint_mlx.base.checksum import Damaged
from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import KEEP, QuantConfig
from mint_mlx.checkpoint.layers import Inventory, Layer
from mint_mlx.runtime.speed_table import (
    LayerKind,
    Rest,
    SpeedTable,
    Timing,
    covers,
    is_timed,
    kind_of,
    layer_seconds,
    merged,
    model_key,
    predict,
    times_scaled,
)
from mint_mlx.runtime.speed_table_file import load_table, save_table

FOUR = QuantConfig(4, 64)
EXPERTS = Layer("m.layers.0.up", (8, 128, 64), "BF16", "experts", "expert", reads=0.25)
LOOKUP = Layer("m.embed", (1000, 64), "BF16", "embedding", "embedding", reads=1 / 1000)
TIED = replace(LOOKUP, reads=1.0)
HEADS = Layer("m.layers.0.k", (4, 64, 128), "BF16", "multi-linear", "mla")
INVENTORY = Inventory((EXPERTS, LOOKUP, HEADS), {}, ())


def table() -> SpeedTable:
    times = {FOUR: {1: Timing(2e-3, 0.01), 8: Timing(9e-3)}}
    kinds = {kind_of(layer): times for layer in (EXPERTS, HEADS)}
    rests = {model_key(INVENTORY): Rest("a model", {100: 1e-3, 1100: 2e-3}, 0.02)}
    return SpeedTable("a machine", {"mlx": "1"}, kinds, rests, clock=0.002)  # type: ignore[arg-type]


def test_what_the_time_of_a_layer_depends_on() -> None:
    assert kind_of(EXPERTS) == LayerKind("experts", (8, 128, 64), 2, "BF16")
    assert kind_of(HEADS) == LayerKind("multi-linear", (4, 64, 128), 4, "BF16")
    assert kind_of(LOOKUP) is None
    assert kind_of(TIED) == LayerKind("linear", (1, 1000, 64), 1, "BF16")


def test_a_choice_takes_its_layers_and_the_rest() -> None:
    choice = {"m.layers.0.up": FOUR, "m.embed": KEEP, "m.layers.0.k": FOUR}
    speed = predict(table(), INVENTORY, choice, 600)
    assert speed.tokens_per_second == pytest.approx(1 / (2e-3 + 2e-3 + 1.5e-3))
    assert speed.band[0] < speed.tokens_per_second < speed.band[1]
    assert table().rests[model_key(INVENTORY)].at(2100) == pytest.approx(3e-3)
    assert layer_seconds(table(), HEADS, FOUR, batch=8) == 9e-3


def test_what_a_table_lacks_is_named() -> None:
    assert covers(table(), INVENTORY)
    assert not is_timed(table(), HEADS, KEEP)
    with pytest.raises(MintError, match=r"no time for .* at keep"):
        layer_seconds(table(), HEADS, KEEP)
    other = replace(HEADS, shape=(4, 64, 64))
    with pytest.raises(MintError, match="no times for layers of 4 heads of 64x64"):
        layer_seconds(table(), other, FOUR)
    inventory = Inventory((replace(EXPERTS, path="x"),), {}, ())
    with pytest.raises(MintError, match="of other models"):
        predict(table(), inventory, {"x": FOUR}, 100)


def test_tables_of_one_machine_are_joined() -> None:
    other = Inventory((TIED,), {}, ())
    times = {kind_of(TIED): {FOUR: {1: Timing(1.0)}}, kind_of(HEADS): {KEEP: {1: Timing(2.0)}}}
    more = SpeedTable("a machine", {"mlx": "1"}, times, {model_key(other): Rest("b", {1: 1.0})})  # type: ignore[arg-type]
    both = merged(table(), more)
    assert covers(both, INVENTORY) and covers(both, other)
    assert is_timed(both, HEADS, FOUR) and is_timed(both, HEADS, KEEP)

    # By the first one's clock: the second was timed while the machine was half as fast.
    slower = replace(times_scaled(more, 2.0), clock=0.002)
    both = merged(replace(table(), clock=0.001), slower)
    assert layer_seconds(both, TIED, FOUR) == 1.0 and both.clock == 0.001
    assert both.rests[model_key(other)].at(1) == 1.0
    with pytest.raises(MintError, match="different machines"):
        merged(table(), replace(more, machine="another"))


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    save_table(table(), path)
    assert load_table(path) == table()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("a machine", "b machine", "its checksum is wrong"),
        ('"mint_mlx_speed"', '"mint_mlx_other"', "its checksum is wrong"),
        ('{"checksum"', "x", "no checksum"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "speed.json"
    save_table(table(), path)
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(Damaged, match=message):
        load_table(path)


@pytest.mark.parametrize(
    ("old", "new"),
    [("0.002", "0"), ("0.002", "-1"), ("[4, 64, 128]", "[4, 64]"), ("4bit-g64", "4bit-g63")],
)
def test_impossible_numbers_are_refused(tmp_path: Path, old: str, new: str) -> None:
    from mint_mlx.base.checksum import with_checksum

    path = tmp_path / "speed.json"
    save_table(table(), path)
    text = path.read_text()
    text = "{" + text[text.index('"mint_mlx_speed"') :].replace(old, new)
    path.write_text(with_checksum(text))
    with pytest.raises(Damaged, match="is damaged"):
        load_table(path)
