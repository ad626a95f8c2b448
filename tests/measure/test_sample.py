"""What --sample may say."""

from __future__ import annotations

import pytest

from mint_mlx.base.errors import UsageError
from mint_mlx.measure.sample import parse_sample


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "all", "nan", ""])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="share"):
        parse_sample(text)
