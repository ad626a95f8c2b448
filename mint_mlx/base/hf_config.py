"""Reads a checkpoint's config.json, at its top or in the table of the text model inside it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

HALVES = {"float16": "F16", "bfloat16": "BF16"}  # safetensors codes of the 16-bit types
_DTYPE_KEYS = ("dtype", "torch_dtype")


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The table of the text model; in a model without a tower the config itself."""
    table: dict[str, Any] = config.get("text_config") or config
    return table


def config_tables(config: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """The config, and after it the table of its text model where it has one."""
    text = text_config(config)
    return (config,) if text is config else (config, text)


def edit_text_config(
    config: dict[str, Any], edit: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """The config with the table of its text model edited; as it is where it has none."""
    text = config.get("text_config")
    return config | {"text_config": edit(text)} if isinstance(text, dict) else config


def stated_dtype(config: dict[str, Any]) -> str | None:
    """The 16-bit type that a config states, F16 or BF16; None where it states another or none."""
    for table in config_tables(config):
        for key in _DTYPE_KEYS:
            if isinstance(table.get(key), str):
                return HALVES.get(table[key].removeprefix("torch."))
    return None


def with_stated_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The config with another 16-bit type, wherever it states one."""

    def stated(table: dict[str, Any]) -> dict[str, Any]:
        return table | {key: dtype for key in _DTYPE_KEYS if key in table}

    edited = edit_text_config(stated(config), stated)
    return edited if any(key in edited for key in _DTYPE_KEYS) else edited | {"torch_dtype": dtype}
