"""`convert --upload-repo`: what will be replaced is shown and asked for before the work begins."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..base.errors import MintError, UsageError
from ..base.one_line import listed
from ..base.printable import printable

if TYPE_CHECKING:
    from .output import Output

SHOWN = 12  # files that are named


def check_words(repo: str | None, public: bool, yes: bool) -> None:
    """Refuse options of an upload that are wrong in themselves (a UsageError)."""
    from ..checkpoint.hub import parse_repo

    if (public or yes) and not repo:
        option = "--public" if public else "--yes"
        raise UsageError(f"{option} says how --upload-repo uploads: give that too")
    if repo and parse_repo(repo) is None:
        raise UsageError(f"{repo!r} is not a repository name: write org/name")


def prepare_upload(repo: str, source: str, public: bool, yes: bool, output: Output) -> None:
    """Refuse an upload that can't be, and ask where files of an earlier one will be replaced.

    Args:
        repo: `org/name` to upload to.
        source: the model's name.
        public: whether the repository shall be public.
        yes: don't ask.
        output: where the files are listed.

    Raises:
        MintError: it can't be, or the answer is no.
    """
    from ..converters.output.publish import check_upload

    replaced = check_upload(repo, source, private=not public)
    if not replaced:
        return
    output.note(f"the upload replaces or deletes in {repo}: {listed(replaced, SHOWN)}")
    if yes:
        return
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise MintError(
            f"{repo} holds an earlier upload, and there is no terminal to ask whether it may be "
            "replaced: give --yes, or choose another name"
        )
    if not typer.confirm(printable(f"Replace them in {repo} when the result is ready?"), err=True):
        raise MintError(f"{repo} stays as it is: choose another name for --upload-repo")


def upload_result(folder: Path, repo: str, source: str, public: bool, output: Output) -> str:
    """Upload a result; returns its address.

    Raises:
        MintError: somebody else's weights have appeared in the repository meanwhile.
    """
    from ..converters.output.publish import check_upload, upload

    output.stage("upload")
    try:
        check_upload(repo, source, private=not public)
        address = upload(folder, repo, private=not public)
    except MintError:
        output.note(f"{folder} is complete, and was not uploaded")
        raise
    except Exception:
        output.note(
            f"{folder} is complete; upload it with: hf upload {repo} {shlex.quote(str(folder))}"
        )
        raise
    output.line(f"uploaded to {address}")
    return address
