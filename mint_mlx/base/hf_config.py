"""What a checkpoint's config.json says, at its top or in the table of a text model inside it."""

from __future__ import annotations

from typing import Any


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The table of the text model; of a model without a tower the config itself."""
    table: dict[str, Any] = config.get("text_config") or config
    return table


def stated_dtype(config: dict[str, Any]) -> str | None:
    """The 16-bit type that it states, F16 or BF16; None where it states another one or none."""
    tables = (config, text_config(config))
    stated = next(
        (t[key] for t in tables for key in ("dtype", "torch_dtype") if isinstance(t.get(key), str)),
        None,
    )
    return {"float16": "F16", "bfloat16": "BF16"}.get(str(stated).removeprefix("torch."))
