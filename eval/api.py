"""`mint_mlx.evaluate`: a checkpoint's figures from Python, every option spelled out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..base.one_line import one_line
from ..base.report import Report
from . import evaluate as scoring
from .card import find_card, write_card
from .make_report import make_report
from .settings import Settings


class Evaluation(dict[str, Any]):
    """The figures of `mint-mlx eval --json` by name, those of single windows included."""

    def __repr__(self) -> str:
        facts = [str(self["model"]), f"perplexity {self['perplexity']:.5g}"]
        facts += [f"KL {self['kl']:.4g} from {self['source']}"] if "kl" in self else []
        return one_line(self, *facts, f"{self['windows']} windows")


def evaluate(
    model: str,
    source: str | None = None,
    *,
    protocol: str = "windows",
    length: int | None = None,
    windows: int | None = None,
    seed: int | None = None,
    batch: int | None = None,
    text: str | None = None,
    chat: bool = False,
    kinds: bool = False,
    save_reference: str | Path | None = None,
    card: bool = False,
    report: Report | None = None,
) -> Evaluation:
    """Score a checkpoint: perplexity, and with a source the divergence from it.

    Args:
        model: a folder or a Hub id.
        source: the model it was made from, or a file that `save_reference` wrote.
        protocol: `windows` or `llama.cpp`.
        length: tokens a window; None takes the protocol's, or the model's context if shorter.
        windows: number of windows; None takes all.
        seed: chooses the windows at random; None takes the first ones.
        batch: windows at once; None takes what suits their length.
        text: a file; None takes WikiText-2's test split.
        chat: score the source's own replies instead of a text.
        kinds: score its replies to tasks of several kinds, and tell the KL of each kind.
        save_reference: keep the source's predictions in this .safetensors file.
        card: write the figures into the checkpoint's model card.
        report: receives progress.

    Raises:
        MintError: an option is impossible, the text is too short, the tokenizers differ, logits
            aren't finite, or a model can't be loaded.
    """
    settings = Settings(protocol, length, windows, seed, batch, text, chat, kinds)
    reference = Path(save_reference) if save_reference is not None else None
    if card:
        find_card(model)
    figures = scoring.evaluate(model, settings, source, reference, report)
    if card and not figures["interrupted"]:
        write_card(model, figures)
    return Evaluation(figures)


def report(
    checkpoint: str | Path,
    source: str | None = None,
    *,
    out: str | Path | None = None,
    windows: int | None = None,
    text: str | None = None,
    report: Report | None = None,
) -> list[Path]:
    """Write a page about a checkpoint, and the pictures that its model card shows.

    Args:
        checkpoint: its folder.
        source: the model it was made from: what is missing is measured. Without one the page shows
            what is known.
        out: the folder for it; the checkpoint's by default.
        windows: number of windows to score; None takes all.
        text: a file to score; None takes WikiText-2's test split.
        report: receives progress.

    Returns:
        The paths of `report.html` and of the pictures.

    Raises:
        MintError: there is no such checkpoint, the report can't be written, or something can't be
            measured.
    """
    settings = Settings(windows=windows, text=text)
    return make_report(checkpoint, source, settings, Path(out) if out else None, report)
