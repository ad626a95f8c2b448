"""Which keys of a config.json mlx-lm's classes read: the fields of their classes of arguments.

A class of arguments is a dataclass whose `from_dict` takes the keys that are its fields and drops
all others in silence.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import inspect
import io
import re
import sys
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any, get_args, get_type_hints

from ..base.hf_config import text_config

PACKAGE = "mlx_lm.models"
REQUIRED = dataclasses.MISSING
# What mlx-lm's modules call the class of the text model's arguments inside a larger model.
TEXT_CLASSES = ("TextArgs", "TextConfig", "TextModelArgs")


@dataclass(frozen=True)
class ModelClass:
    """One of mlx-lm's classes of arguments, which reads one table of a config.

    Attributes:
        name: of its module in mlx_lm.models.
        defaults: the keys that it reads, with what stands in for each; REQUIRED where nothing does.
        numbers: those of them that are declared as numbers.
        code: the source text of its module.
    """

    name: str
    defaults: dict[str, Any]
    numbers: frozenset[str]
    code: str = dataclasses.field(repr=False)

    @property
    def keys(self) -> frozenset[str]:
        """The keys that it reads."""
        return frozenset(self.defaults)

    @property
    def required(self) -> frozenset[str]:
        """The keys that it can't be made without."""
        return frozenset(key for key, value in self.defaults.items() if value is REQUIRED)

    @property
    def nested(self) -> bool:
        """Whether it reads the text model's keys in a table of their own."""
        return "text_config" in self.keys

    def says(self, word: str) -> bool:
        """Whether its module's text holds this string."""
        return f'"{word}"' in self.code or f"'{word}'" in self.code


def is_known(model_type: str) -> bool:
    """Whether mlx-lm has a module for a `model_type`."""
    from mlx_lm.utils import MODEL_REMAPPING

    name = MODEL_REMAPPING.get(model_type, model_type)
    plain = re.fullmatch(r"[\w-]+", name) is not None
    return plain and importlib.util.find_spec(f"{PACKAGE}.{name}") is not None


def model_class(config: dict[str, Any]) -> ModelClass | None:
    """The class that reads a config's top level; None where mlx-lm has none."""
    classes = _classes(config)
    return None if classes is None else _described(classes[1])


def text_class(config: dict[str, Any]) -> ModelClass | None:
    """The class that reads the text model's keys; that of the top level where it has no other."""
    classes = _classes(config)
    if classes is None:
        return None
    arguments = classes[1]
    if not _described(arguments).nested:
        return _described(arguments)
    text_type = text_config(config).get("model_type")
    nested = _text_arguments(sys.modules[arguments.__module__], str(text_type))
    return None if nested is None else _described(nested)


def _classes(config: dict[str, Any]) -> tuple[type, type] | None:
    """mlx-lm's model class for a config and the class of its arguments, or None."""
    from mlx_lm.utils import _get_classes

    if not isinstance(config.get("model_type"), str):
        return None

    # Some of mlx-lm's modules print when they are imported, and olmo's ends the program where a
    # package is missing.
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            model, arguments = _get_classes(config)
    except (ValueError, AttributeError, SystemExit):
        return None
    if not isinstance(arguments, type) or not dataclasses.is_dataclass(arguments):
        return None
    return model, arguments


def _text_arguments(module: ModuleType, text_type: str) -> type | None:
    """The class of the text model's arguments that a module defines or imports."""
    from mlx_lm.utils import MODEL_REMAPPING

    for name in TEXT_CLASSES:
        if dataclasses.is_dataclass(vars(module).get(name)):
            defined: type = vars(module)[name]
            return defined

    # Else it is that of another module, from which the text model is taken as a whole.
    others = {_short(other.__name__): other for other in _imported(module)}
    wanted = MODEL_REMAPPING.get(text_type, text_type)
    for name in (wanted, "llama", *others):
        if name in others and (arguments := vars(others[name]).get("ModelArgs")) is not None:
            inner: type = arguments
            return _text_arguments(others[name], text_type) if _described(inner).nested else inner
    return None


def _imported(module: ModuleType) -> list[ModuleType]:
    """The modules of other models that a module imports, whole or a `Model` of them."""
    others: list[ModuleType] = []
    for value in vars(module).values():
        if inspect.isclass(value) and value.__name__ in ("Model", "TextModel"):
            value = sys.modules[value.__module__]
        if (
            inspect.ismodule(value)
            and value is not module
            and value.__name__.startswith(f"{PACKAGE}.")
            and hasattr(value, "ModelArgs")
        ):
            others.append(value)
    return others


@cache
def _described(arguments: type) -> ModelClass:
    defaults: dict[str, Any] = {}
    for field in dataclasses.fields(arguments):
        if field.default_factory is not dataclasses.MISSING:
            defaults[field.name] = field.default_factory()
        else:
            defaults[field.name] = field.default
    module = sys.modules[arguments.__module__]
    hints = get_type_hints(arguments, vars(module))
    numbers = frozenset(key for key in defaults if _is_number(hints.get(key)))
    return ModelClass(_short(arguments.__module__), defaults, numbers, inspect.getsource(module))


def _is_number(hint: Any) -> bool:
    """Whether a field's type is a number, or a number or None."""
    kinds = set(get_args(hint)) or {hint}
    return kinds <= {int, float, type(None)} and kinds != {type(None)}


def _short(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.")
