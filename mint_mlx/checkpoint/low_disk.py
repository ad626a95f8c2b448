"""`--low-disk`: fetches the shards of a Hub model one at a time, and drops each after its last use.

A model whose weights are on the Hub has a sparse file for every shard (hub.Skeleton); one after
the other is replaced by the real shard while its layers are read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

from ..base.report import Report
from ..base.targets import check_space
from ..base.units import both
from . import hub
from .block_path import block_of
from .layers import Inventory
from .source import Source
from .straight import source_parameters

# Hands over module paths in groups, each once the shards of its modules are on the disk.
Waves = Callable[[Sequence[str]], Iterator[Sequence[str]]]


def shards_needed(source: Source, inventory: Inventory) -> dict[str, frozenset[str]]:
    """The shards that each module's tensors lie in, by module path.

    Where the tensors come straight from the files, these are those files; else all files that hold
    a tensor of the module's block, since no family moves tensors from one block to another; all
    files where none of them names that block.
    """
    straight = source_parameters(source.path, source.structure)
    by_block: dict[int | None, set[str]] = defaultdict(set)
    for file, table in source.headers.items():
        for name in table:
            by_block[block_of(name)].add(file)

    # A quantized layer is made of more tensors than are listed here, so its whole block counts.
    quantized = {layer.path for layer in inventory.layers if layer.stored}
    needed = {}
    for path, specs in inventory.units({}):
        origins = [straight.get(spec.name, []) for spec in specs]
        if all(origins) and path not in quantized:
            files = {piece.file for origin in origins for piece in origin}
        else:
            files = by_block[block_of(f"{path}.")] or set(source.headers)
        needed[path] = frozenset(files)
    return needed


def schedule(
    needed: Mapping[str, frozenset[str]], todo: Sequence[str]
) -> Iterator[tuple[str, list[str], set[str]]]:
    """Go through the shards in order of their names.

    Args:
        needed: the shards of each module.
        todo: the modules to be read.

    Yields:
        A shard to fetch, the modules that can be read then, and the shards to drop after them.
    """
    waiting = list(todo)
    present = set[str]()
    for file in sorted(set().union(*needed.values())):
        if not any(file in needed[path] for path in waiting):
            continue
        present.add(file)
        ready = [path for path in waiting if needed[path] <= present]
        waiting = [path for path in waiting if not needed[path] <= present]
        drop = {old for old in present if not any(old in needed[path] for path in waiting)}
        present -= drop
        yield file, ready, drop


def peak_bytes(source: Source, needed: Mapping[str, frozenset[str]]) -> int:
    """The most bytes of shards that are on the disk at once; `needed` as from `shards_needed`."""
    sizes = {file: (source.path / file).stat().st_size for file in source.headers}
    present = set[str]()
    most = 0
    for file, _, drop in schedule(needed, list(needed)):
        present.add(file)
        most = max(most, sum(sizes[name] for name in present))
        present -= drop
    return most


def shard_by_shard(source: Source, inventory: Inventory, profiled: bool, report: Report) -> Waves:
    """The waves of a model on the Hub: fetches each shard, hands over its modules, drops it.

    Args:
        source: the model; its small files are downloaded at once.
        inventory: its layers.
        profiled: whether it is read for a profile first, and so downloaded twice.
        report: is told how much will be downloaded, and each shard.

    Raises:
        MintError: the disk has too little space for the shards that are needed at once.
    """
    hub.fetch_small_files(source.name, source.revision, source.path)
    needed = shards_needed(source, inventory)
    most = peak_bytes(source, needed)
    check_space(source.path, most, "choose another folder with --work-dir")
    times = "twice, for the profile and for the result (a --plan needs one)" if profiled else "once"
    where = f"at most {both(most)} of them in {source.path.parent} at once"
    report.note(f"{both(source.weight_bytes)} are downloaded {times}, {where}")

    def waves(todo: Sequence[str]) -> Iterator[Sequence[str]]:
        for file, ready, drop in schedule(needed, todo):
            report.stage(f"fetch {file}")
            hub.fetch_shard(source.name, source.revision, file, source.path)
            yield ready
            for old in drop:
                hub.drop_shard(source.path / old)

    return waves


def at_once(todo: Sequence[str]) -> Iterator[Sequence[str]]:
    """The one wave of a source whose weights are all on this machine."""
    yield todo
