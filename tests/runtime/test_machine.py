"""What a user may say of the machine that a model must run on."""

from __future__ import annotations

import pytest

from mint_mlx.base.errors import UsageError
from mint_mlx.runtime.machine import KV_BITS, Machine, check_context, parse_machine


def test_a_machine_is_this_one_or_an_amount_of_memory() -> None:
    assert parse_machine("this-mac") == Machine("this-mac", None)
    assert parse_machine("32GiB") == Machine("32GiB", 32 * 2**30)
    assert parse_machine("16") == Machine("16", 16 * 2**30)


@pytest.mark.parametrize("text", ["huge", "4.5bpw", "smallest", "0", ""])
def test_any_other_word_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="this-mac, or a memory size"):
        parse_machine(text)


def test_a_context_has_a_token_and_a_cache_the_bits_of_mlx() -> None:
    for bits in (None, *KV_BITS):
        check_context(1, bits)
    with pytest.raises(UsageError, match="context of 0 tokens"):
        check_context(0, None)
    with pytest.raises(UsageError, match=r"\(got 7\)"):
        check_context(1, 7)
