"""What a checkpoint keeps of its making, so that the hours are spent once: its plan, profile and
sensitivity.

Whoever wants another size of the same model takes them from there: from a folder, or from a
repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from ..base.files import PLAN_FILE
from ..checkpoint.hub import MissingFile, download_file, parse_repo
from ..measure.sensitivity import Sensitivity
from ..measure.sensitivity_file import load_sensitivity

PROFILE_FILE = "mint-profile.json"
SENSITIVITY_FILE = "mint-sensitivity.npz"
ARTIFACTS = (PLAN_FILE, PROFILE_FILE, SENSITIVITY_FILE)


def find_artifact(place: str | Path, name: str) -> Path:
    """A file of this name: the file itself, the one in a folder, or the one in a repository
    `org/name[@revision]`.

    Raises:
        MissingFile: the folder or the repository has none. (A missing folder is
            refused by its reader.)
    """
    path = Path(place)
    if path.is_dir():
        if not (path / name).is_file():
            raise MissingFile(
                f"{path} holds no {name}: give a file, or a checkpoint that mint-mlx wrote with one"
            )
        return path / name
    repo = parse_repo(str(place))
    if path.exists() or repo is None or Path(repo.name).parent.is_dir():
        return path
    return download_file(repo, name)


def find_sensitivity(profile: str | Path, given: str | Path | None = None) -> Sensitivity | None:
    """The sensitivity that is given, else the one that a checkpoint or repository keeps beside its
    profile, else None.

    Args:
        profile: such a checkpoint or repository, or a profile's file, which stands for itself
            alone.
        given: the same of a sensitivity.

    Raises:
        MintError: the file is damaged, or what is given isn't there.
    """
    if given is not None:
        return load_sensitivity(find_artifact(given, SENSITIVITY_FILE))
    return sensitivity_beside(profile)


def sensitivity_beside(place: str | Path) -> Sensitivity | None:
    """The sensitivity that a checkpoint or repository keeps; None where it has none, or for a file.

    Raises:
        MintError: it is damaged.
    """
    if Path(place).is_file():
        return None
    try:
        return load_sensitivity(find_artifact(place, SENSITIVITY_FILE))
    except MissingFile:  # a checkpoint of the level `fast` keeps none
        return None
