"""Recipes: which candidates, floors and priors a model family gets, each with its reason.

A recipe is a YAML file; `recipes/default.yaml` serves every family that has none of its own. The
right one is found by the checkpoint's `model_type`.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..base.errors import MintError, UsageError
from ..base.hf_config import text_config
from ..base.quant_config import KEEP, MX_MODES, QuantConfig, affine, mx_mode
from ..base.yamlfile import line_of, read_yaml
from ..checkpoint.layers import ROUTER_BITS, Layer
from ..checkpoint.roles import GATES, ROLES
from .objectives import OBJECTIVES

# The bits that `candidates` of a recipe stands for.
CANDIDATE_BITS = {"few": (2, 4, 8), "usual": (2, 3, 4, 6, 8), "all": (2, 3, 4, 5, 6, 8)}


class _Strict(BaseModel):
    """A table whose unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _check_roles(roles: tuple[str, ...]) -> None:
    """Refuse an unknown role (a ValueError, as pydantic wants them)."""
    for role in roles:
        if role not in ROLES:
            raise ValueError(f"no role is called {role!r}; the roles are {', '.join(ROLES)}")


class Rule(_Strict):
    """Limits for the layers of some roles."""

    roles: tuple[str, ...]
    reason: str
    floor: Annotated[int | None, Field(ge=2, le=16)] = None
    ceiling: Annotated[int | None, Field(ge=2, le=16)] = None
    keep: bool = False

    @field_validator("roles")
    @classmethod
    def _known(cls, roles: tuple[str, ...]) -> tuple[str, ...]:
        _check_roles(roles)
        return roles

    @model_validator(mode="after")
    def _possible(self) -> Rule:
        if self.keep and self.ceiling:
            raise ValueError(
                "keep leaves a layer at 16 bits, which a ceiling forbids: remove one of them"
            )
        if (self.floor or 0) > (self.ceiling or 16):
            raise ValueError(
                f"a floor of {self.floor} bits lies above a ceiling of {self.ceiling}: change one "
                "of them"
            )
        return self


Prior = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Priors(_Strict):
    """MINT's protection priors; only the objective `mint` uses them."""

    first_block: Prior = 3.0
    last_block: Prior = 2.0
    roles: dict[str, Prior] = {"embedding": 10.0, "head": 10.0, "router": 8.0}

    @field_validator("roles")
    @classmethod
    def _known(cls, roles: dict[str, float]) -> dict[str, float]:
        _check_roles(tuple(roles))
        return roles


class Reference(_Strict):
    """A published figure for a model of this family, with its source."""

    model: str
    figure: str
    source: str


class Recipe(_Strict):
    """What a recipe file may say."""

    name: str
    about: str
    serves: tuple[str, ...] = ()
    candidates: Literal["few", "usual", "all"] = "all"
    modes: tuple[str, ...] = ()
    sqnr_floor: float = 9.0
    expert_floor: float = 5.0
    objective: str | None = None
    priors: Priors = Priors()
    rules: tuple[Rule, ...] = ()
    references: tuple[Reference, ...] = ()

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        bits = CANDIDATE_BITS[self.candidates] + (KEEP.bits,)
        for role in {role for rule in self.rules for role in rule.roles}:
            floor, ceiling, _ = self.limits(role)
            if not any(floor <= b <= ceiling for b in bits):
                raise ValueError(
                    f"the rules leave no bits for the role {role} (floor {floor}, ceiling "
                    f"{ceiling}): lower the floor or raise the ceiling"
                )
            if role in GATES and ceiling < ROUTER_BITS:
                raise ValueError(
                    f"a ceiling of {ceiling} bits for the role {role} breaks the guard of "
                    f"{ROUTER_BITS}: raise it to {ROUTER_BITS} or more"
                )
        return self

    @field_validator("modes")
    @classmethod
    def _modes(cls, modes: tuple[str, ...]) -> tuple[str, ...]:
        for mode in modes:
            if mode not in MX_MODES:
                raise ValueError(f"no mode is called {mode!r}; the modes are {', '.join(MX_MODES)}")
        return modes

    @field_validator("objective")
    @classmethod
    def _objective(cls, objective: str | None) -> str | None:
        if objective is not None and objective not in OBJECTIVES:
            raise ValueError(
                f"no objective is called {objective!r}; there are {', '.join(OBJECTIVES)}"
            )
        return objective

    @field_validator("sqnr_floor", "expert_floor")
    @classmethod
    def _finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError("the floor must be a number of dB")
        return value

    def limits(self, role: str) -> tuple[int, int, str]:
        """Floor and ceiling in bits for a role (16 means unquantized), and the reasons."""
        floor = 0
        ceiling = 16
        reasons = []
        for rule in self.rules:
            if role in rule.roles:
                floor = max(floor, 16 if rule.keep else rule.floor or 0)
                ceiling = min(ceiling, rule.ceiling or 16)
                reasons.append(rule.reason)
        return floor, ceiling, "; ".join(reasons)


def candidates(
    layer: Layer, recipe: Recipe, ignore_guards: bool = False
) -> tuple[QuantConfig, ...]:
    """The configurations that a layer may get, `keep` last.

    Each divides the layer's rows and obeys the recipe's rules, and the guards unless they are
    ignored. A layer that is quantized in the source gets a smaller configuration or stays as it is,
    since more bits gain nothing.
    """
    floor, ceiling, _ = recipe.limits(layer.role)

    def allowed(config: QuantConfig) -> bool:
        return config.bits <= ceiling and (ignore_guards or not layer.objection(config))

    configs = affine(CANDIDATE_BITS[recipe.candidates]) + tuple(mx_mode(m) for m in recipe.modes)
    usable = tuple(
        c for c in configs if c.divides(layer.shape[-1]) and floor <= c.bits and allowed(c)
    )
    stored = layer.stored
    if stored and allowed(stored):
        stored_bytes = layer.bytes(stored)
        smaller = (c for c in usable if c != stored and layer.bytes(c) < stored_bytes)
        return (*smaller, stored)
    return (*usable, KEEP) if ceiling >= KEEP.bits or not usable else usable


def read_recipe(path: Path) -> Recipe:
    """Read and check a recipe file.

    Raises:
        MintError: with file and line, for anything that a recipe can't say.
    """
    data, node = read_yaml(path, "recipe")
    if not isinstance(data, dict):
        raise MintError(
            f"{path} is not a recipe: write a table (`mint-mlx recipes default` shows one)"
        )
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = [step for step in first["loc"] if isinstance(step, (str, int))]
        problem = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            problem = "a recipe has no such key: remove it"
        line = line_of(node, location)
        key = ".".join(map(str, location))
        raise MintError(f"{path}, line {line}: {key}: {problem}") from None


@lru_cache(maxsize=1)
def bundled() -> dict[str, Path]:
    """The recipes that come with the program, by name."""
    folder = Path(__file__).parent.parent / "recipes"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_recipe(name: str | None, config: dict[str, Any]) -> Recipe:
    """The recipe for a model.

    Args:
        name: of a bundled recipe, or a file; None for the one that serves the config's model_type,
            or `default` where none does.
        config: the model's config.json.

    Raises:
        MintError: there is no such recipe.
    """
    known = bundled()
    if name is not None:
        if name in known:
            return read_recipe(known[name])
        if name.endswith((".yaml", ".yml")) or "/" in name:
            return read_recipe(Path(name).expanduser())
        raise UsageError(
            f"no recipe is called {name!r}: there are {', '.join(known)}, or give a YAML file"
        )
    types = {config.get("model_type"), text_config(config).get("model_type")}
    for path in known.values():
        recipe = read_recipe(path)
        if types & set(recipe.serves):
            return recipe
    return read_recipe(known["default"])
