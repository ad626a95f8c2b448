"""Which shards a module needs, and when they come and go."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from fake_hub import FakeHub, serve_hub
from helpers import Maker, Weights, edit_config, edit_weights, llama, qwen3_moe
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten
from released import FAMILIES, known, released

from mint_mlx.checkpoint import hub, low_disk
from mint_mlx.checkpoint.config_file import read_config
from mint_mlx.checkpoint.source import open_model
from mint_mlx.jobs import convert
from mint_mlx.jobs.model import prepare


@given(
    needs=st.dictionaries(
        st.text(min_size=1, max_size=3), st.frozensets(st.sampled_from("abcdef"), min_size=1)
    )
)
def test_every_module_comes_once_with_its_shards_and_all_are_dropped(
    needs: dict[str, frozenset[str]],
) -> None:
    on_disk = set()
    seen = []
    fetched = []
    for file, ready, drop in low_disk.schedule(needs, list(needs)):
        on_disk.add(file)
        fetched.append(file)
        assert all(needs[path] <= on_disk for path in ready)
        seen += ready
        on_disk -= drop
    assert sorted(seen) == sorted(needs)
    assert not on_disk
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
    contents = {file: (folder / file).read_bytes() for file in job.source.headers}
    for wanted in sorted(set(need.values()), key=sorted)[:12]:
        for file, data in contents.items():
            (folder / file).write_bytes(data)
            if file not in wanted:
                hub.drop_shard(folder / file)
        modules = {path for path in need if need[path] == wanted}
        for name, array in tree_flatten(open_model(job.source).parameters()):
            if name.rpartition(".")[0] in modules:
                assert mx.array_equal(array, whole[name], equal_nan=True).item(), name


def _split(folder: Path) -> None:
    """Rewrite a checkpoint as three shards."""
    with mx.stream(mx.cpu):
        tensors = {}
        for file in sorted(folder.glob("model*.safetensors")):
            tensors |= dict(mx.load(str(file)))
        mx.eval(tensors)
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    names = sorted(tensors)
    for shard in range(3):
        file = folder / f"model-{shard + 1:05d}-of-00003.safetensors"
        third = names[shard * len(names) // 3 : (shard + 1) * len(names) // 3]
        mx.save_safetensors(str(file), {n: tensors[n] for n in third}, metadata={"format": "pt"})


def test_a_dropped_shard_is_holes(make: Maker) -> None:
    folder = make(qwen3_moe(1))
    shard = folder / "model.safetensors"
    size, before = shard.stat().st_size, prepare(str(folder)).source.headers
    hub.drop_shard(shard)
    assert shard.stat().st_size == size
    assert prepare(str(folder)).source.headers == before
    assert not any(shard.read_bytes()[-100:])


def test_low_disk_has_a_shard_or_two_at_a_time_and_writes_the_same(
    hub: FakeHub, tmp_path: Path
) -> None:
    whole, low, planned = (tmp_path / name for name in ("whole", "low", "planned"))
    command = ("convert", "org/tiny", "--low-disk", "--no-smoke")
    shards = {f.name: f.stat().st_size for f in hub.folder.glob("*.safetensors")}
    size = sum(shards.values())

    # To profile and to write: each shard is downloaded twice (and headers), and none stays.
    fast = hub.run(*command, "--budget", "5bpw", "-o", str(low))
    assert fast.returncode == 0, fast.stderr
    assert "downloaded twice" in fast.stderr
    assert sum(hub.bytes_sent.get(name, 0) for name in shards) <= 2.5 * size
    assert not list((hub.home / "hub").rglob("*.safetensors"))

    # With a plan, or the profile that is known by now: once.
    hub.bytes_sent.clear()
    done = hub.run(*command, "--plan", str(low / "mint-plan.yaml"), "-o", str(planned))
    assert done.returncode == 0, done.stderr
    assert "downloaded once" in done.stderr, done.stderr
    assert sum(hub.bytes_sent.get(name, 0) for name in shards) <= 1.5 * size
    known = hub.run(*command, "--budget", "6bpw")
    assert known.returncode == 0, known.stderr
    assert "downloaded once" in known.stderr, known.stderr

    convert.convert(str(hub.folder), plan=low / "mint-plan.yaml", out=whole, smoke=False)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        files = [(folder / name).read_bytes() for folder in (whole, low, planned)]
        assert files[0] == files[1] == files[2]


def test_low_disk_is_refused_where_the_model_is_run(hub: FakeHub) -> None:
    done = hub.run("convert", "org/tiny", "--budget", "5bpw", "--low-disk", "--quantizer", "gptq")
    assert done.returncode == 2
    assert "--effort fast" in done.stderr


@pytest.mark.slow  # tests/checkpoint/test_tied_head.py has a short one
def test_a_head_that_differs_from_the_embedding_is_read_from_the_hub(
    make: Maker, tmp_path: Path
) -> None:
    folder = make(llama(1))

    def with_head(weights: Weights) -> Weights:
        return weights | {"lm_head.weight": weights["model.embed_tokens.weight"][::-1]}

    edit_weights(folder, with_head)
    edit_config(folder, tie_word_embeddings=True)
    out = tmp_path / "out"
    (tmp_path / "home").mkdir()
    with serve_hub(folder, tmp_path / "home") as served:
        done = served.run(
            "convert", "org/tiny", "--uniform", "keep", "--low-disk", "--no-smoke", "-o", str(out)
        )
    assert done.returncode == 0, done.stderr
    assert read_config(out)["tie_word_embeddings"] is False
    written = mx.load(str(out / "model.safetensors"))
    assert mx.array_equal(written["lm_head.weight"], written["model.embed_tokens.weight"][::-1])
    assert not list(out.glob("scratch-*"))
