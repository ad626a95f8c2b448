"""The model card: what was seen to make the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers import Maker, llama

from mint_mlx.base.errors import MintError, UsageError
from mint_mlx.converters.output.card import with_pictures, with_results
from mint_mlx.eval.card import find_card, write_card
from mint_mlx.jobs.convert import convert
from mint_mlx.jobs.request import Request, check_request

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


def test_a_folder_s_name_on_the_hub_and_no_measurements(make: Maker, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = {"base_model": "org/tiny", "measurements": False, "smoke": False}
    convert(str(make(llama(1))), "5bpw", out, effort="fast", **options)
    card = (out / "README.md").read_text()
    assert "base_model: org/tiny" in card
    assert "[org/tiny](https://huggingface.co/org/tiny), quantized" in card
    assert not (out / "mint-profile.json").exists()
    assert (out / "mint-plan.yaml").exists()
    with pytest.raises(UsageError, match="--base-model must be org/name"):
        check_request(Request("x", "5bpw", base_model="tiny"))


def test_results_and_pictures_stand_in_the_card_once() -> None:
    card = "# x\n\n- made with: y\n\n```bash\nrun\n```\n"
    once = with_results(card, ["| a |"])
    assert with_results(once, ["| b |"]) == once.replace("| a |", "| b |")
    assert once.index("| a |") < once.index("```bash")
    shown = with_pictures(once, {"curve.png": "a curve"})
    assert shown.count("![a curve](curve.png)") == 1
    assert with_pictures(shown, {"curve.png": "a curve"}) == shown
    others = "# of others\n```bash\n"
    assert with_pictures(with_results(others, ["| a |"]), {"curve.png": "a curve"}) == others


def test_figures_are_written_into_a_card_of_ours_alone(tmp_path: Path) -> None:
    figures = {"text": "WikiText-2 test", "windows": 2, "length": 64}
    figures |= {"perplexity": 9.5, "perplexity_se": 0.5, "source": "org/tiny"}
    figures |= {"kl": 0.0123, "kl_se": None, "same_top1": 0.95}
    card = tmp_path / "README.md"
    for text in (None, "# of others\n"):
        if text is not None:
            card.write_text(text)
        with pytest.raises(MintError, match="holds no model card of mint-mlx"):
            find_card(str(tmp_path))
    card.write_text("# x\n\n- made with: y\n\n```bash\n")
    assert write_card(str(tmp_path), figures) == card
    text = card.read_text()
    assert "| perplexity | 9.5 ± 0.5 |" in text
    assert "| KL divergence from org/tiny, nats a token | 0.0123 |" in text
