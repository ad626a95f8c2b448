"""Which value of a config.json makes everything fail that reads it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from ..base.errors import MintError
from ..base.hf_config import edit_text_config, text_config

Table = dict[str, Any]
# The exceptions that values of unexpected types lead to.
MALFORMED = (TypeError, ValueError, AttributeError, KeyError, ArithmeticError)


def bad_value(config: Table, use: Callable[[Table], Any], error: BaseException) -> MintError:
    """The refusal of a config with a value that no model has.

    It names the key where the failure goes with one alone, else it has the error's words.

    Args:
        config: config.json.
        use: what failed on it.
        error: with which it failed.
    """
    table = text_config(config)
    guilty = [key for key in table if key != "model_type" and _works(use, _without(config, key))]
    what = str(error)
    if len(guilty) == 1:
        value = json.dumps(table[guilty[0]])
        what = f"{guilty[0]} is {value if len(value) <= 60 else f'{value[:57]}...'}"
    return MintError(
        f"config.json holds a value that no model has ({what}): download it again, or correct it"
    )


def _without(config: Table, key: str) -> Table:
    """A config whose text model's table lacks a key."""

    def reduced(table: Table) -> Table:
        return {name: value for name, value in table.items() if name != key}

    is_flat = text_config(config) is config
    return reduced(config) if is_flat else edit_text_config(config, reduced)


def _works(use: Callable[[Table], Any], config: Table) -> bool:
    try:
        use(config)
    except MALFORMED:
        return False
    except MintError:
        return True
    return True
