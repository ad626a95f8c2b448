"""The model card: what was seen to make the plan."""

from __future__ import annotations

from pathlib import Path

from helpers import Maker, llama

from mint_mlx.jobs.convert import convert

WEIGHTS = "weights only"
TEXT = "text that the model wrote itself"


def test_a_card_says_what_was_seen(make: Maker, tmp_path: Path) -> None:
    folder = str(make(llama(1)))
    cases = (
        ({"uniform": "4bit-g64", "quantizer": "gptq"}, TEXT),
        ({"uniform": "4bit-g64"}, WEIGHTS),
        (
            {"budget": "5bpw", "effort": "balanced", "objective": "nmse", "quantizer": "rtn"},
            WEIGHTS,
        ),
        ({"budget": "5bpw", "effort": "fast", "objective": "fisher"}, TEXT),
    )
    for number, (options, seen) in enumerate(cases):
        convert(folder, out=tmp_path / str(number), smoke=False, **options)
        assert seen in (tmp_path / str(number) / "README.md").read_text()
