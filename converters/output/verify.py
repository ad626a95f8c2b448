"""The last step of a conversion: what was written is loaded with stock mlx-lm and held against the
plan.
"""

from __future__ import annotations

from pathlib import Path

from mlx.utils import tree_flatten

from ...allocation.plan import Plan
from ...checkpoint import mlxlm
from ...checkpoint.layers import MLX_DTYPES, Inventory
from ...checkpoint.layout import Layout


class VerificationError(RuntimeError):
    """The written checkpoint differs from the plan: a bug here, or a disk that lost bytes."""


def rehearse(folder: Path, config: str, plan: Plan, inventory: Inventory, layout: Layout) -> None:
    """Let mlx-lm load the checkpoint before it is made: its config, and shards that hold headers
    and holes.

    Args:
        folder: an empty one; nothing else than these files is made in it.

    Raises:
        MintError: mlx-lm can't load such a checkpoint.
    """
    (folder / "config.json").write_text(config, encoding="utf-8")
    for name, size, header in zip(layout.names, layout.sizes, layout.headers, strict=True):
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(size)
    verify(folder, plan, inventory, layout)


def verify(folder: Path, plan: Plan, inventory: Inventory, layout: Layout) -> None:
    """Check file sizes, and every parameter's shape, type and configuration as mlx-lm loads them
    (lazily).

    Raises:
        VerificationError: anything differs.
        MintError: mlx-lm can't load the folder.
    """
    for name, size in zip(layout.names, layout.sizes, strict=True):
        if (folder / name).stat().st_size != size:
            raise VerificationError(
                f"{name} has {(folder / name).stat().st_size} bytes instead of {size}"
            )
    carried = set(inventory.carried)
    model = mlxlm.build_model(folder)
    loaded = {
        name: (str(array.dtype), tuple(array.shape))
        for name, array in tree_flatten(model.parameters())
    }
    wanted = {
        spec.name: (f"mlx.core.{MLX_DTYPES[spec.dtype]}", spec.shape)
        for owner, specs in inventory.units(plan.choice)
        if owner not in carried  # mlx-lm drops those again
        for spec in specs
    }
    if loaded != wanted:
        name = next(
            n for n in sorted(loaded.keys() | wanted.keys()) if loaded.get(n) != wanted.get(n)
        )
        raise VerificationError(
            f"{name} was loaded as {loaded.get(name)}, the plan says {wanted.get(name)}"
        )
    modules = dict(model.named_modules())
    for path, config in plan.choice.items():
        module = modules[path]
        found = (
            (module.bits, module.group_size, module.mode)
            if hasattr(module, "bits")
            else (16, 0, "keep")
        )
        if found != (config.bits, config.group_size, config.mode):
            raise VerificationError(f"{path} was loaded as {found}, the plan says {config}")
