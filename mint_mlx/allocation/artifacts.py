"""What a checkpoint keeps of its making, so that the hours are spent once: its plan, profile and
sensitivity.

Whoever wants another size of the same model takes them from there: from a folder, or from a
repository on the Hub."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..base.files import PLAN_FILE
from ..checkpoint.hub import MissingFile, download_file, parse_repo
from ..measure.sensitivity import Sensitivity
from ..measure.sensitivity_file import load_sensitivity

PROFILE_FILE = "mint-profile.json"
SENSITIVITY_FILE = "mint-sensitivity.npz"
KEPT = (PLAN_FILE, PROFILE_FILE, SENSITIVITY_FILE)


def find_kept(place: str | Path, name: str) -> Path:
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


def kept_sensitivity(profile: str | Path, given: str | Path | None = None) -> Sensitivity | None:
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
        return load_sensitivity(find_kept(given, SENSITIVITY_FILE))[1]
    found = kept_with(profile)
    return found[1] if found else None


def kept_with(place: str | Path) -> tuple[np.ndarray, Sensitivity] | None:
    """The sensitivity, with its tokens, that a checkpoint or repository keeps; None where it has
    none, or for a file.

    Raises:
        MintError: it is damaged.
    """
    if Path(place).is_file():
        return None
    try:
        return load_sensitivity(find_kept(place, SENSITIVITY_FILE))
    except MissingFile:  # a checkpoint of the level `fast` keeps none
        return None
