"""Uploads a finished checkpoint to the Hugging Face Hub, with its model card."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..allocation.plan_file import read_plan
from ..base.errors import MintError, UsageError
from ..base.files import PLAN_FILE, REFINED_FILE, write_text
from ..base.folders import is_checkpoint
from ..base.one_line import listed
from ..base.pictures import is_picture
from ..base.report import Report, Silent
from ..base.side_files import MAX_BYTES
from ..checkpoint.hub import parse_repo
from ..checkpoint.source import load_source
from ..converters.output.card import renamed, with_pictures
from ..converters.output.publish import check_upload
from ..converters.output.publish import upload as send

WORK = ".partial"  # the end of a work folder's name


@dataclass(frozen=True)
class Finished:
    """A checkpoint of ours that can be uploaded.

    Attributes:
        folder: the checkpoint.
        source: the name of the model that it was made from.
    """

    folder: Path
    source: str


def find_finished(checkpoint: str | Path) -> Finished:
    """A finished checkpoint of ours.

    Raises:
        MintError: it is none, or its files don't belong together.
    """
    folder = Path(checkpoint).expanduser()
    if not folder.is_dir():
        raise MintError(f"{checkpoint} is no folder: give one that mint-mlx wrote")
    if folder.name.endswith(WORK):
        raise MintError(f"{folder} is not finished: run the command that makes it again first")
    if not is_checkpoint(folder):
        raise MintError(
            f"{folder} was not written by mint-mlx (it has neither plan nor refinement): upload it "
            "with `hf upload`"
        )
    load_source(str(folder))  # what is damaged, or lacks a shard, is refused
    plan = folder / PLAN_FILE
    if plan.is_file():
        return Finished(folder, read_plan(plan).origin.source)
    return Finished(folder, str(json.loads((folder / REFINED_FILE).read_text())["source"]))


def upload(
    checkpoint: str | Path,
    repo: str,
    *,
    public: bool = False,
    replace: bool = False,
    report: Report | None = None,
) -> str:
    """Upload a finished checkpoint, and return the address of its page.

    Args:
        checkpoint: a folder that mint-mlx wrote.
        repo: `org/name` to upload to; nothing but an earlier upload of mint-mlx is replaced.
        public: make the repository public.
        replace: replace an earlier upload.
        report: receives progress.

    Raises:
        MintError: the folder is none of ours or damaged, nobody is logged in, or the repository
            holds something that would be replaced.
    """
    report = report or Silent()
    if parse_repo(repo) is None:
        raise UsageError(f"{repo!r} is not a repository name: write org/name")
    finished = find_finished(checkpoint)
    replaced = check_upload(repo, finished.source, private=not public)
    if replaced and not replace:
        raise MintError(
            f"{repo} holds an earlier upload ({listed(replaced)}): allow to replace it, or choose "
            "another name"
        )
    report.stage("upload")
    name_card(finished.folder, repo)
    return send(finished.folder, repo, private=not public)


def name_card(folder: Path, repo: str) -> None:
    """Let a checkpoint's card name its repository, and show the pictures beside it.

    A card that mint-mlx didn't write stays as it is.
    """
    card = folder / "README.md"
    if card.is_symlink() or not card.is_file() or card.stat().st_size > MAX_BYTES:
        return
    text = card.read_text(encoding="utf-8", errors="replace")
    pictures = sorted(path.name for path in folder.glob("*.png") if is_picture(path))
    new = with_pictures(renamed(text, repo), {name: name for name in pictures})
    if new != text:
        write_text(card, new)
