"""Writes what was measured into a checkpoint's model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..base.errors import MintError
from ..base.files import write_text
from ..base.side_files import MAX_BYTES
from ..converters.output.card import is_ours, with_pictures, with_results


def find_card(model: str) -> Path:
    """The model card of a checkpoint's folder.

    Raises:
        MintError: there is none that mint-mlx wrote.
    """
    card = Path(model).expanduser() / "README.md"
    readable = card.is_file() and not card.is_symlink() and card.stat().st_size <= MAX_BYTES
    if not readable or not is_ours(card.read_text(encoding="utf-8", errors="replace")):
        raise MintError(f"{model} holds no model card of mint-mlx: leave --card out")
    return card


def write_card(model: str, figures: Mapping[str, Any]) -> Path:
    """Write a table of figures into the card, in place of an earlier one; returns its path.

    Args:
        model: the checkpoint's folder.
        figures: of `evaluate`.

    Raises:
        MintError: there is no card of ours.
    """
    card = find_card(model)
    text = card.read_text(encoding="utf-8", errors="replace")
    write_text(card, with_results(text, result_lines(figures)))
    return card


def show_in_card(
    folder: Path, pictures: Mapping[str, str], figures: Mapping[str, Any] | None
) -> None:
    """Show pictures and figures in the card of a checkpoint, where mint-mlx wrote it.

    Args:
        folder: the checkpoint.
        pictures: by their files' names, what they show.
        figures: of `evaluate`, or None.
    """
    try:
        card = find_card(str(folder))
    except MintError:
        return
    old = card.read_text(encoding="utf-8", errors="replace")
    text = old if figures is None else with_results(old, result_lines(figures))
    text = with_pictures(text, pictures)
    if text != old:
        write_text(card, text)


def result_lines(figures: Mapping[str, Any]) -> list[str]:
    """The figures as lines of Markdown."""
    rows = [("perplexity", _with_error(figures["perplexity"], figures["perplexity_se"]))]
    if "kl" in figures:
        name = f"KL divergence from {figures['source']}, nats a token"
        rows += [
            (name, _with_error(figures["kl"], figures["kl_se"])),
            ("same most likely token", f"{figures['same_top1']:.2%}"),
        ]
    return [
        f"| {figures['text']}, {windows_text(figures)} tokens | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in rows),
    ]


def windows_text(figures: Mapping[str, Any]) -> str:
    """How many windows were scored, and how long they are."""
    length = figures["length"]
    up_to = "up to " if figures.get("shortest", length) < length else ""
    return f"{figures['windows']} windows of {up_to}{length}"


def _with_error(value: float, error: float | None) -> str:
    return f"{value:.4g}" + (f" ± {error:.2g}" if error is not None else "")
