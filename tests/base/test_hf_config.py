"""config.json, with its text model at the top or in a table inside."""

from __future__ import annotations

from typing import Any

import pytest

from mint_mlx.base.hf_config import config_tables, edit_text_config, stated_dtype, text_config

PLAIN = {"model_type": "llama", "hidden_size": 8}
NESTED = {"model_type": "llama4", "text_config": PLAIN}


def test_the_text_model_is_the_config_or_a_table_in_it() -> None:
    assert text_config(PLAIN) is PLAIN
    assert text_config(NESTED) is PLAIN
    assert config_tables(PLAIN) == (PLAIN,)
    assert config_tables(NESTED) == (NESTED, PLAIN)


def test_only_a_table_inside_is_edited() -> None:
    def edit(table: dict[str, Any]) -> dict[str, Any]:
        return table | {"hidden_size": 9}

    assert edit_text_config(PLAIN, edit) == PLAIN
    assert edit_text_config(NESTED, edit)["text_config"]["hidden_size"] == 9
    assert PLAIN["hidden_size"] == 8


@pytest.mark.parametrize(
    ("config", "dtype"),
    [
        ({"torch_dtype": "float16"}, "F16"),
        ({"dtype": "torch.bfloat16"}, "BF16"),
        ({"torch_dtype": "float32"}, None),
        ({"text_config": {"dtype": "bfloat16"}}, "BF16"),
        ({}, None),
    ],
)
def test_the_type_that_a_config_states(config: dict[str, Any], dtype: str | None) -> None:
    assert stated_dtype(config) == dtype
