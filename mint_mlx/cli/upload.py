"""`mint-mlx upload`, and `convert --upload-repo`, which asks before the work begins."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..base.errors import MintError, UsageError
from ..base.one_line import listed
from ..base.printable import printable
from .options import JsonOpt, start

if TYPE_CHECKING:
    from .output import Output

SHOWN = 12  # files that are named


def upload(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CHECKPOINT", help="A folder that mint-mlx wrote.")
    ],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="Where to upload it.")],
    public: Annotated[
        bool, typer.Option("--public", help="Make the repository public; it is private otherwise.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Replace an earlier upload unasked.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Upload a finished checkpoint to the Hugging Face Hub, with its model card.

    Nothing but an earlier upload of mint-mlx is replaced. (`mlx_lm.upload` would overwrite the
    card.)
    """
    output = start(as_json, long=True)
    check_words(repo, public, yes)
    from ..jobs.upload import find_finished, name_card

    finished = find_finished(checkpoint)
    prepare_upload(repo, finished.source, public, yes, output)
    name_card(finished.folder, repo)
    address = upload_result(finished.folder, repo, finished.source, public, output)
    output.close()
    output.result({"path": str(finished.folder), "uploaded": address})


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
    if not typer.confirm(printable(f"Replace them in {repo}?"), err=True):
        raise MintError(f"{repo} stays as it is: choose another name")


def upload_result(folder: Path, repo: str, source: str, public: bool, output: Output) -> str:
    """Upload a result; returns its address.

    Raises:
        MintError: somebody else's weights have appeared in the repository meanwhile.
    """
    from ..converters.output import publish

    output.stage("upload")
    try:
        publish.check_upload(repo, source, private=not public)
        address = publish.upload(folder, repo, private=not public)
    except MintError:
        output.note(f"{folder} is complete, and was not uploaded")
        raise
    except Exception:
        output.note(
            f"{folder} is complete; upload it with: mint-mlx upload {shlex.quote(str(folder))} "
            f"{repo}"
        )
        raise
    output.line(f"uploaded to {address}")
    return address
