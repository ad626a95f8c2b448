"""What a score is measured on: the text, how it is cut into windows, and how many run at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..base.errors import UsageError
from .protocol import Windows, check_protocol

BATCH_TOKENS = 4096  # at once: keeps the processor busy and memory small


@dataclass(frozen=True)
class Settings:
    """What is scored and how.

    Attributes:
        protocol: `windows` or `llama.cpp`.
        length: tokens a window; None takes the protocol's, or the model's context if shorter.
        windows: number of windows; None takes all.
        seed: chooses the windows at random; None takes the first ones.
        batch: windows at once; None takes what suits their length.
        text: a file; None takes WikiText-2's test split.
        chat: score the source's own replies instead of a text.
        kinds: score them by kind of text, on bundled tasks.

    Raises:
        UsageError: a figure or the protocol is impossible, or has no effect on replies.
    """

    protocol: str = "windows"
    length: int | None = None
    windows: int | None = None
    seed: int | None = None
    batch: int | None = None
    text: str | None = None
    chat: bool = False
    kinds: bool = False

    def __post_init__(self) -> None:
        check_protocol(self.protocol, self.length, self.windows, self.seed)
        if self.batch is not None and self.batch < 1:
            raise UsageError(f"--batch must be 1 or more (got {self.batch})")
        of_a_text = (self.length, self.windows, self.seed, self.text)
        if self.chat and self.kinds:
            raise UsageError("--chat and --kinds score other replies: give one of them")
        option = "--kinds" if self.kinds else "--chat"
        whole = self.chat or self.kinds
        if whole and (self.protocol != "windows" or any(v is not None for v in of_a_text)):
            raise UsageError(
                f"{option} scores the source's own replies, whole: leave --text, --protocol, "
                "--length, --windows and --seed out"
            )

    @property
    def text_name(self) -> str:
        """The text's name, for people."""
        if self.chat:
            return "its own replies"
        if self.kinds:
            return "its own replies by kind"
        return Path(self.text).name if self.text else "WikiText-2 test"

    def batch_for(self, windows: Windows) -> int:
        """Windows at once: as asked for, or about BATCH_TOKENS tokens."""
        return self.batch or max(1, BATCH_TOKENS // windows.tokens.shape[1])
