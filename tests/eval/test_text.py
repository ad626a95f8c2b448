"""The text that is scored."""

from __future__ import annotations

from pathlib import Path

import pytest

from mint_mlx.base.errors import MintError
from mint_mlx.eval import text


def test_wikitext_is_the_real_test_split(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(text.wikitext().encode()) == 1_290_590
    monkeypatch.setattr(text, "WIKITEXT_SHA256", "0" * 64)
    with pytest.raises(MintError, match="damaged"):
        text.wikitext()


def test_texts_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"\xe9\xe9")
    with pytest.raises(MintError, match="UTF-8"):
        text.read_text(str(tmp_path / "latin.txt"))
    with pytest.raises(MintError, match="no text file"):
        text.read_text(str(tmp_path / "none.txt"))
