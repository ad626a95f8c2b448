"""Measures what a checkpoint's report lacks, and writes it: a page, pictures, the card's part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.files import PAGE_FILE
from ..base.folders import is_checkpoint
from ..base.report import Report, Silent
from ..base.targets import check_page_folder
from ..checkpoint.source import load_source
from ..checkpoint.tokenizer import load_tokenizer
from ..jobs.model import check_same_model
from .card import show_in_card
from .checkpoint_facts import read_facts
from .evaluate import evaluate
from .kinds import kind_table, with_error
from .measured import MeasuredTable, keep_figures, keep_table
from .page import write_page
from .reference_file import load_reference
from .report_page import PICTURES, checkpoint_page
from .settings import Settings
from .text import check_same_tokenizer


def check_report(checkpoint: str | Path, out: Path | None = None) -> Path:
    """The folder of a checkpoint of which a report can be written.

    Args:
        checkpoint: the folder.
        out: where the report goes; beside the weights by default, where they are ours.

    Raises:
        MintError: it is no folder, one of someone else's that nothing is written into, or it holds
            a file of a report's name that isn't ours.
    """
    folder = Path(checkpoint).expanduser()
    if not (folder / "config.json").is_file():
        raise MintError(f"{checkpoint} is not the folder of a checkpoint: download it first")
    if out is None and not is_checkpoint(folder):
        raise MintError(
            f"{folder} was not written by mint-mlx, which writes nothing into it: make a report "
            "elsewhere with `mint-mlx report CHECKPOINT -o FOLDER`"
        )
    check_page_folder(out or folder, [f"{name}.png" for name in PICTURES])
    return folder


def _check_source(folder: Path, source: str, report: Report) -> None:
    """Refuse a source that isn't there or is of another model, also where nothing needs it.

    Args:
        folder: of the checkpoint.
        source: a model, or a file of its predictions.
        report: is told of a source of other weights.

    Raises:
        MintError: saying which.
    """
    checkpoint = load_source(str(folder))
    if source.endswith(".safetensors"):
        about = load_reference(Path(source).expanduser()).about
        check_same_tokenizer(about.source, about.tokenizer, load_tokenizer(folder))
    else:
        check_same_model(checkpoint, load_source(source, weights=False), report)


def make_report(
    checkpoint: str | Path,
    source: str | None = None,
    settings: Settings | None = None,
    out: Path | None = None,
    report: Report | None = None,
) -> list[Path]:
    """Write a checkpoint's report, and measure what it lacks where the source is given.

    Args:
        checkpoint: its folder.
        source: the model it was made from, or a file of its predictions; without one the report
            shows what is known.
        settings: what is scored and how; other ones than by default are always scored anew.
        out: the folder for the report; the checkpoint's by default.
        report: receives progress.

    Returns:
        The paths of the page and of its pictures.

    Raises:
        MintError: the report can't be written, or something can't be measured.
        KeyboardInterrupt: scoring was interrupted; nothing was written.
    """
    report = report or Silent()
    folder = check_report(checkpoint, out)
    if source is not None:
        _check_source(folder, source, report)
    model = None if source is None or source.endswith(".safetensors") else source
    facts = read_facts(folder, model, measure=True, report=report, notes=out)

    chosen = settings is not None and settings != Settings()
    if source is not None and (facts.measured.figures is None or chosen):
        figures = evaluate(str(folder), settings, source, report=report, with_spread=True)
        if figures["interrupted"]:
            raise KeyboardInterrupt
        keep_figures(out or folder, facts.fingerprint, figures)
    return write_report(folder, model, out)


def report_figures(folder: Path, figures: Mapping[str, Any], source: str) -> list[Path]:
    """Keep figures of `evaluate`, with `spread`, and write the report with them.

    Those by kind of text stand beside the figures of a text, and take their place in no report.
    """
    facts = read_facts(folder)
    if "kinds" in figures:
        keep_table(folder, facts.fingerprint, _by_kind(figures))
    else:
        keep_figures(folder, facts.fingerprint, figures)
    model = None if source.endswith(".safetensors") else source
    return write_report(folder, model)


def _by_kind(figures: Mapping[str, Any]) -> MeasuredTable:
    """KL divergence by kind of text as a table of the report."""
    columns, lines = kind_table(figures["kinds"])
    text = (
        f"KL on replies of {figures['source']} to bundled tasks of several kinds, by `mint-mlx "
        f"eval --kinds`: {with_error(figures['kl'], figures['kl_se'])} nats per token over all."
    )
    title = "Divergence by kind of text"
    return MeasuredTable(title, text, tuple(columns), tuple(map(tuple, lines)))


def write_report(folder: Path, source: str | None = None, out: Path | None = None) -> list[Path]:
    """Write the report of what is known, and show its pictures and figures in the card.

    Args:
        folder: the checkpoint.
        source: the model that it was made from, whose errors the cache may hold.
        out: the folder for the report; the checkpoint's, and its card, by default.
    """
    facts = read_facts(folder, source, notes=out)
    paths = write_page(checkpoint_page(facts), out or folder)
    if out is None:
        names = [path.name for path in paths if path.name != PAGE_FILE]
        pictures = {name: PICTURES[name.removesuffix(".png")] for name in names}
        show_in_card(folder, pictures, facts.measured.figures)
    return paths
