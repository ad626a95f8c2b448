"""A model's own text: the tokens that all measuring goes by."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Text:
    """Tokens that a model wrote, some of them after a prompt that it was given.

    Attributes:
        tokens: int32 (windows, length).
        how: how they were written, in words (self_text.py).
        given: int32 (windows,), how many tokens at the start of each window the model was given:
            the first one at least, and a conversation where the window begins with one.
    """

    tokens: np.ndarray
    how: str = ""
    given: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int32))

    def __post_init__(self) -> None:
        if not len(self.given):
            object.__setattr__(self, "given", np.ones(len(self.tokens), dtype=np.int32))

    @property
    def counted(self) -> np.ndarray:
        """Whether what is predicted after a token is measured: bool (windows, length).

        A prompt conditions what the model writes; how well it is predicted itself tells nothing.
        """
        return np.arange(self.tokens.shape[1]) >= self.given[:, None] - 1

    def __getitem__(self, windows: slice) -> Text:
        """Some windows alone."""
        return Text(self.tokens[windows], self.how, self.given[windows])

    def __add__(self, other: Text) -> Text:
        """These windows and others."""
        pairs = (self.tokens, other.tokens), (self.given, other.given)
        tokens, given = (np.concatenate(pair) for pair in pairs)
        return Text(tokens, self.how, given)
