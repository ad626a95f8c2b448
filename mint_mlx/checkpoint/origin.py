"""Which weights a profile, a sensitivity or a plan was made from."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Origin:
    """Names a checkpoint's weights, so that what was made from them is not used with others.

    Attributes:
        source: the Hub id, or the folder's name; '' where it is unknown.
        revision: the commit on the Hub, or None for a folder.
        structure: hash of the config and of all headers.
        content: hash of the weights; '' where it is unknown, as in a plan written by hand.
    """

    source: str = ""
    revision: str | None = None
    structure: str = ""
    content: str = ""

    @property
    def fingerprint(self) -> str:
        """Names the weights in file names."""
        return f"{self.structure}-{self.content}"

    def matches(self, other: Origin) -> bool:
        """Whether both are the same weights; where either is unknown nothing speaks against it."""
        if not self.content or not other.content:
            return True
        return (self.structure, self.content) == (other.structure, other.content)
