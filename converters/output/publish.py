"""Uploads a checkpoint to the Hugging Face Hub, over nothing but an earlier upload of ours."""

from __future__ import annotations

from glob import escape
from pathlib import Path
from typing import Any

from ...allocation.artifacts import ARTIFACTS
from ...allocation.plan_file import read_plan
from ...base.errors import MintError
from ...base.files import PLAN_FILE, REFINED_FILE
from ...base.folders import CHECKPOINT, SHARDS
from ...base.remove import known_files
from ...base.safetensors_header import INDEX
from ...base.side_files import matches

# Files of an earlier upload are deleted unless they are replaced: mlx-lm would load shards of
# another size as well.
DELETED = (*SHARDS, INDEX, *ARTIFACTS, REFINED_FILE)
WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth", "*.ckpt", "*.npz", "*.h5", "*.onnx")


def check_upload(repo: str, source: str, private: bool) -> list[str]:
    """Refuse an upload that would fail or destroy something, before the work is done.

    Args:
        repo: `org/name` to upload to.
        source: the model that is converted, as a Hub id or a folder's name.
        private: whether the repository shall be private.

    Returns:
        The files that lie there and will be replaced or deleted, in order.

    Raises:
        MintError: nobody is logged in; the repository is the source's own, or holds weights that
            this program didn't make; or it is public where a private one is wanted, or the other
            way round. (Errors of huggingface_hub pass through.)
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError, RepositoryNotFoundError

    if repo.casefold() == source.casefold():
        raise MintError(
            f"{repo} is the source itself, whose weights would be replaced: give another name"
        )
    api = HfApi()
    try:
        api.whoami()
    except LocalTokenNotFoundError:
        raise MintError("an upload needs a login: run `hf auth login` first") from None
    try:
        existing = api.repo_info(repo)
    except RepositoryNotFoundError:
        return []

    if private and not existing.private:
        raise MintError(f"{repo} exists and is public: give --public, or choose another name")
    if existing.private and not private:
        raise MintError(
            f"{repo} exists and is private: leave --public out, or make it public on its page first"
        )
    return _replaced(repo, existing)


def _replaced(repo: str, existing: Any) -> list[str]:
    """The files of a repository that an upload replaces or deletes.

    Raises:
        MintError: it holds weights that this program didn't make.
    """
    names = sorted(sibling.rfilename for sibling in existing.siblings or [])
    weights = [name for name in names if matches(name.rpartition("/")[2], WEIGHTS)]
    ours = PLAN_FILE in names and _has_our_plan(repo)
    foreign = [name for name in weights if not (ours and matches(name, DELETED))]
    if foreign:
        raise MintError(
            f"{repo} holds {foreign[0]}, which mint-mlx did not upload: choose another name"
        )
    return [name for name in names if matches(name, (*DELETED, *CHECKPOINT.files))]


def _has_our_plan(repo: str) -> bool:
    """Whether a repository's plan is one of ours."""
    from huggingface_hub import hf_hub_download

    try:
        read_plan(hf_hub_download(repo, PLAN_FILE))
    except MintError:
        return False
    return True


def upload(folder: Path, repo: str, private: bool) -> str:
    """Upload a written checkpoint and return the URL of its page.

    Data that arrived before an interruption is not sent again. Only files that this program wrote
    are sent, and files of an earlier upload that are not replaced are deleted (DELETED).
    """
    from huggingface_hub import HfApi

    api = HfApi()
    url = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(
        repo_id=repo,
        repo_type="model",
        folder_path=folder,
        allow_patterns=[escape(name) for name in known_files(folder, CHECKPOINT)],
        delete_patterns=[*DELETED],
    )
    return str(url)
