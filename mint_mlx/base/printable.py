"""No control character of a stranger's name or text reaches the terminal: one funnel for all.

A model's name, a tensor's, a message of another library may hold what moves the cursor, sets the
window's title or hides text. What this program prints itself is cleaned by `printable`; what others
print while a command runs goes through `guard_streams`.
"""

from __future__ import annotations

import sys
from typing import Any, TextIO, cast

_BAD = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode's controls, formats, surrogates, line separators
_JOINERS = "\u200c\u200d\u00ad"  # in words of some scripts and in emoji; a soft hyphen


def printable(text: str, keep: str = "") -> str:
    """A text with its control characters written out, as `\\x1b`.

    Args:
        text: of anyone.
        keep: control characters that stay.
    """
    if text.isprintable():
        return text
    return "".join(c if c in keep or not _is_control(c) else _escaped(c) for c in text)


def _is_control(character: str) -> bool:
    """Whether a character is more than ink: a control, a format, half a pair."""
    import unicodedata

    return unicodedata.category(character) in _BAD and character not in _JOINERS


def _escaped(character: str) -> str:
    return ascii(character)[1:-1]


class _Guarded:
    """A text stream that writes control characters out, except those of lines and tqdm's bars."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> int:
        # tqdm goes up a line for a bar below another one.
        lines = [printable(line, "\n\r\t") for line in text.split("\x1b[A")]
        self.stream.write("\x1b[A".join(lines))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_streams() -> None:
    """From here on nothing that is printed in this process moves the cursor or colours text.

    For a command line's process: `unguarded` gives the streams that its own tables and bars go to.
    """
    sys.stdout = cast(TextIO, _Guarded(unguarded(sys.stdout)))
    sys.stderr = cast(TextIO, _Guarded(unguarded(sys.stderr)))


def unguarded(stream: TextIO) -> TextIO:
    """The stream behind a guarded one."""
    return stream.stream if isinstance(stream, _Guarded) else stream
