"""Which shards a module needs, and when they come and go."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from helpers import Maker, qwen3_moe
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from released import FAMILIES, known, released

from mint_mlx.checkpoint import hub, low_disk
from mint_mlx.checkpoint.source import open_model
from mint_mlx.jobs.model import prepare


@given(
    needs=st.dictionaries(
        st.text(min_size=1, max_size=3), st.frozensets(st.sampled_from("abcdef"), min_size=1)
    )
)
def test_every_module_comes_once_with_its_shards_and_all_are_dropped(
    needs: dict[str, frozenset[str]],
) -> None:
    here, seen, fetched = set(), [], []
    for file, ready, drop in low_disk.schedule(needs, list(needs)):
        here.add(file)
        fetched.append(file)
        assert all(needs[path] <= here for path in ready)
        seen += ready
        here -= drop
    assert sorted(seen) == sorted(needs) and not here
    assert len(fetched) == len(set(fetched))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_is_the_same_without_the_shards_that_it_does_not_need(
    family: str, tmp_path: Path
) -> None:
    if not known(family):
        pytest.skip("mlx-lm is older than this family")
    folder = released(family, tmp_path / family)
    _split(folder)
    job = prepare(str(folder))
    need = low_disk.shards_needed(job.source, job.inventory)
    whole = dict(tree_flatten(open_model(job.source).parameters()))
    mx.eval(whole)
    kept = {file: (folder / file).read_bytes() for file in job.source.headers}
    for wanted in sorted(set(need.values()), key=sorted)[:12]:
        for file, data in kept.items():
            (folder / file).write_bytes(data)
            if file not in wanted:
                hub.drop_shard(folder / file)
        modules = {path for path in need if need[path] == wanted}
        for name, array in tree_flatten(open_model(job.source).parameters()):
            if name.rpartition(".")[0] in modules:
                assert mx.array_equal(array, whole[name], equal_nan=True).item(), name


def _split(folder: Path) -> None:
    """Put each third tensor of a checkpoint into a shard of its own kind."""
    with mx.stream(mx.cpu):
        tensors = {}
        for file in sorted(folder.glob("model*.safetensors")):
            tensors |= dict(mx.load(str(file)))
        mx.eval(tensors)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    for part in range(3):
        mx.save_safetensors(
            str(folder / f"model-{part + 1:05d}-of-00003.safetensors"),
            {
                name: tensors[name]
                for name in names[part * len(names) // 3 : (part + 1) * len(names) // 3]
            },
            metadata={"format": "pt"},
        )


def test_a_dropped_shard_is_holes(make: Maker) -> None:
    folder = make(qwen3_moe(1))
    shard = folder / "model.safetensors"
    size, before = shard.stat().st_size, prepare(str(folder)).source.headers
    hub.drop_shard(shard)
    assert shard.stat().st_size == size and prepare(str(folder)).source.headers == before
    assert not any(shard.read_bytes()[-100:])
