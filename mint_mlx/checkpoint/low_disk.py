"""`--low-disk`: the shards of a Hub model are fetched one at a time, and dropped once every layer
in them is done.

The skeleton that stands for a model which isn't here (hub.headers) has a file of holes for every
shard; one after the other becomes the real shard for a while.
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
from .mlxlm import straight_parameters
from .source import Source

Waves = Callable[[Sequence[str]], Iterator[Sequence[str]]]


def needed(source: Source, inventory: Inventory) -> dict[str, frozenset[str]]:
    """The shards that each module's tensors lie in.

    Where they come straight from the files, those files; else all that hold a part of the module's
    block, since no family's tensors move from one block to another.
    """
    straight = straight_parameters(source.path)
    by_block: dict[int | None, set[str]] = defaultdict(set)
    for file, table in source.headers.items():
        for name in table:
            by_block[block_of(name)].add(file)
    stored = {
        layer.path for layer in inventory.layers if layer.stored
    }  # these have more tensors than they are made of
    found = {}
    for path, specs in inventory.units({}):
        origins = [straight.get(spec.name, []) for spec in specs]
        exact = all(origins) and path not in stored
        files = (
            {file for origin in origins for file, _ in origin}
            if exact
            else by_block[block_of(f"{path}.")] or set(source.headers)
        )
        found[path] = frozenset(files)
    return found


def steps(
    need: Mapping[str, frozenset[str]], todo: Sequence[str]
) -> Iterator[tuple[str, list[str], set[str]]]:
    """Shard after shard: its name, the modules that can be done once it is here, and the shards to
    drop after them.
    """
    left, present = list(todo), set[str]()
    for file in sorted(set().union(*need.values())):
        if not any(file in need[path] for path in left):
            continue
        present.add(file)
        ready = [path for path in left if need[path] <= present]
        left = [path for path in left if not need[path] <= present]
        drop = {old for old in present if not any(old in need[path] for path in left)}
        present -= drop
        yield file, ready, drop


def peak(need: Mapping[str, frozenset[str]], sizes: Mapping[str, int]) -> int:
    """Bytes of the shards that are here at once, at most."""
    here, most = set[str](), 0
    for file, _, drop in steps(need, list(need)):
        here.add(file)
        most = max(most, sum(sizes[name] for name in here))
        here -= drop
    return most


def room(source: Source, need: Mapping[str, frozenset[str]]) -> int:
    """Bytes of the shards of a model that isn't here that are needed at once, at most; `need` as of
    `needed`.
    """
    return peak(need, {file: (source.path / file).stat().st_size for file in source.headers})


def shard_by_shard(source: Source, inventory: Inventory, profiled: bool, report: Report) -> Waves:
    """What hands over the modules of a model that isn't here as it fetches their shards.

    Args:
        source: its skeleton; the small files are completed.
        inventory: its layers.
        profiled: whether it is read for a profile first, and so downloaded twice.
        report: is told what will be downloaded, and each shard.

    Raises:
        MintError: the disk hasn't room for the shards that are needed at once.
    """
    hub.fetch_small_files(source.name, source.revision, source.path)
    need = needed(source, inventory)
    most = room(source, need)
    check_space(source.path, most, "choose another folder with --work-dir")
    times = "twice, for the profile and for the result (a --plan needs one)" if profiled else "once"
    where = f"at most {both(most)} of them in {source.path.parent} at once"
    report.note(f"{both(source.weight_bytes)} are downloaded {times}, {where}")

    def run(todo: Sequence[str]) -> Iterator[Sequence[str]]:
        for file, ready, drop in steps(need, todo):
            report.stage(f"fetch {file}")
            hub.fetch_shard(source.name, source.revision, file, source.path)
            yield ready
            for old in drop:
                hub.drop_shard(source.path / old)

    return run


def at_once(todo: Sequence[str]) -> Iterator[Sequence[str]]:
    """The waves of a source whose weights are all here."""
    yield todo
