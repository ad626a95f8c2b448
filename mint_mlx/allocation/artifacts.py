"""The plan, profile and sensitivity that a checkpoint holds beside its weights.

With them another size needs no new measurements. They are read from a folder, or from a repository
on the Hub. (MLX is only imported when a sensitivity is read.)"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..base.files import PLAN_FILE
from ..checkpoint.hub import MissingFile, download_file, parse_repo

if TYPE_CHECKING:
    from ..measure.sensitivity import Sensitivity

PROFILE_FILE = "mint-profile.json"
SENSITIVITY_FILE = "mint-sensitivity.npz"
ARTIFACTS = (PLAN_FILE, PROFILE_FILE, SENSITIVITY_FILE)


def find_artifact(place: str | Path, name: str) -> Path:
    """The path of such a file: the place itself, or the file of this name in it.

    Args:
        place: a file, a folder, or a repository `org/name[@revision]`, from which it is downloaded.
        name: one of ARTIFACTS.

    Raises:
        MissingFile: the folder or the repository has none. (A path that doesn't exist is returned:
            its reader says what it should have been.)
    """
    path = Path(place)
    if path.is_dir():
        if not (path / name).is_file():
            raise MissingFile(
                f"{path} holds no {name}: give a file, or a checkpoint that mint-mlx wrote with one"
            )
        return path / name

    # A path wins over a repository of the same name, also where only its folder exists.
    repo = parse_repo(str(place))
    if path.exists() or repo is None or Path(repo.name).parent.is_dir():
        return path
    return download_file(repo, name)


def find_sensitivity(profile: str | Path, given: str | Path | None = None) -> Sensitivity | None:
    """The sensitivity that goes with a profile, or None.

    Args:
        profile: where the profile was read from; a checkpoint or a repository may hold a
            sensitivity too.
        given: the place of a sensitivity, which comes first.

    Raises:
        MintError: the file is damaged, or there is none at the given place.
    """
    return read_sensitivity(given) if given is not None else sensitivity_beside(profile)


def sensitivity_beside(place: str | Path) -> Sensitivity | None:
    """The sensitivity that a checkpoint or repository holds; None where it has none, or for a file.

    Raises:
        MintError: it is damaged.
    """
    if Path(place).is_file():
        return None
    try:
        return read_sensitivity(place)
    except MissingFile:  # the effort level `fast` measures none
        return None


def read_sensitivity(place: str | Path) -> Sensitivity:
    """The sensitivity in a file, a folder or a repository.

    Raises:
        MintError: there is none, or it is damaged.
    """
    from ..measure.sensitivity_file import load_sensitivity  # (it imports MLX)

    return load_sensitivity(find_artifact(place, SENSITIVITY_FILE))
