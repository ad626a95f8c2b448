"""The last step of a conversion: the result is loaded with mlx-lm and compared with the plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mlx.utils import tree_flatten

from ...allocation.plan import Plan
from ...base.safetensors_header import read_header
from ...checkpoint import mlxlm
from ...checkpoint.layers import MLX_DTYPES, Inventory
from ...checkpoint.layout import Layout
from ...checkpoint.source import Source
from .journal import hash_of
from .read_back import VerificationError, check_hash
from .verify_values import Rows, source_rows, wrong_layer


def rehearse(folder: Path, config: str, plan: Plan, inventory: Inventory, layout: Layout) -> None:
    """Let mlx-lm load the checkpoint before it is made, from its config and shards without data.

    Args:
        folder: an empty one, in which these files are made.
        config: the text of config.json.
        plan: what will be carried out.
        inventory: the model's layers.
        layout: the shards.

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
    """Check file sizes, and each parameter's shape, type and configuration as mlx-lm loads it.

    No weight is read.

    Raises:
        VerificationError: anything differs.
        MintError: mlx-lm can't load the folder.
    """
    for name, size in zip(layout.names, layout.sizes, strict=True):
        actual = (folder / name).stat().st_size
        if actual != size:
            raise VerificationError(f"{name} has {actual} bytes instead of {size}")

    # mlx-lm drops the tensors that are only carried along.
    model = mlxlm.build_model(folder, keep_nvfp4=True)
    loaded = {
        name: (str(array.dtype), tuple(array.shape))
        for name, array in tree_flatten(model.parameters())
    }
    carried = set(inventory.carried)
    wanted = {
        spec.name: (f"mlx.core.{MLX_DTYPES[spec.dtype]}", spec.shape)
        for owner, specs in inventory.units(plan.choice)
        if owner not in carried
        for spec in specs
    }
    for name in sorted(loaded.keys() | wanted.keys()):
        if loaded.get(name) != wanted.get(name):
            raise VerificationError(
                f"{name} was loaded as {loaded.get(name)}, the plan says {wanted.get(name)}"
            )

    modules = dict(model.named_modules())
    for path, config in plan.choice.items():
        module = modules[path]
        actual_config = (16, 0, "keep")
        if hasattr(module, "bits"):
            actual_config = (module.bits, module.group_size, module.mode)
        if actual_config != (config.bits, config.group_size, config.mode):
            raise VerificationError(f"{path} was loaded as {actual_config}, the plan says {config}")


def verify_copy(folder: Path, original: Path, replaced: Mapping[str, str]) -> None:
    """Read every tensor of a changed copy back and compare it with the original's.

    Args:
        folder: the copy.
        original: the checkpoint that it was copied from.
        replaced: SHA-256 of each tensor that was written in place of the original's, by name.

    Raises:
        VerificationError: a shard's header differs from the original's.
        MintError: the disk holds other bytes.
    """
    for shard in sorted(original.glob("*.safetensors")):
        copy = folder / shard.name
        table, start = read_header(shard)
        if read_header(copy) != (table, start):
            raise VerificationError(f"the header of {copy} is not that of {shard}")
        with shard.open("rb") as before, copy.open("rb") as after:
            for tensor, info in table.items():
                place = (start + info.start, info.end - info.start)
                wanted = replaced.get(tensor) or hash_of(before.fileno(), *place)
                check_hash(tensor, copy, hash_of(after.fileno(), *place), wanted)


def verify_values(
    source: Source,
    folder: Path,
    plan: Plan,
    inventory: Inventory,
    rows: Iterable[tuple[str, Rows]] | None = None,
) -> None:
    """Check that some rows of each layer are those of the source.

    Args:
        source: the checkpoint that was converted.
        folder: the result.
        plan: that was carried out.
        inventory: the source's layers.
        rows: the source's (verify_values.source_rows), where its shards were dropped after use.

    Raises:
        VerificationError: anything differs.
    """
    if rows is None:
        rows = source_rows(source, inventory, inventory.order)
    problem = wrong_layer(rows, folder, plan.choice, inventory)
    if problem is not None:
        raise VerificationError(problem)
