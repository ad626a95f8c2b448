"""The Hugging Face Hub: headers first, download later, a sentence for each fault."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fake_hub import COMMIT, FakeHub

from mint_mlx.checkpoint.hub import RepoId, cached
from mint_mlx.jobs.convert import convert


def weights_sent(hub: FakeHub) -> int:
    return sum(n for name, n in hub.bytes_sent.items() if name.endswith(".safetensors"))


def test_sizes_and_refusals_cost_headers_only(hub: FakeHub) -> None:
    total = sum(f.stat().st_size for f in hub.folder.glob("*.safetensors"))
    table = hub.run("convert", "org/tiny", "--json")
    assert table.returncode == 2, table.stderr
    assert json.loads(table.stdout)["sizes"][-1]["label"] == "(unquantized)"

    # Without a profile both shards are downloaded twice, but are on the disk once.
    dry = hub.run("convert", "org/tiny", "--budget", "5bpw", "--dry-run", "--low-disk", "--json")
    assert dry.returncode == 0, dry.stderr
    said = json.loads(dry.stdout)
    assert 1.9 * total < said["download"] < 2.1 * total
    assert said["disk"] <= said["bytes"] + 1.01 * total
    refused = hub.run("convert", "org/tiny", "--budget", "10KB")
    assert refused.returncode == 1
    assert "too small" in refused.stderr

    # huggingface_hub reads the first 100 kB of each shard, three times here.
    assert weights_sent(hub) <= 3 * 2 * 100_001
    assert total > 2 * 100_001
    assert not any((hub.home / "hub").rglob("*.safetensors"))


def test_a_hub_model_is_converted_and_its_profile_found_again(hub: FakeHub) -> None:
    (hub.folder / "pytorch_model.bin").write_bytes(bytes(1000))
    (hub.folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nthe original's page")
    done = hub.run("convert", "org/tiny", "--budget", "5bpw", "--json")
    assert done.returncode == 0, done.stderr

    # The folder's name says what the plan reaches, to two places.
    data = json.loads(done.stdout)
    name = "tiny-mint-5bpw"
    assert data["path"] == name
    assert 4.995 < data["bits_per_weight"] < 5
    assert data["revision"] == COMMIT
    assert "pytorch_model.bin" not in hub.bytes_sent

    # The card names the original, whose own page it isn't.
    card = (hub.home / name / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "the original's page" not in card
    assert "base_model: org/tiny" in card
    assert "base_model_relation: quantized" in card
    assert COMMIT in card

    # The next run has profile and weights, without a network too.
    again = hub.run("convert", "org/tiny", "--json")
    assert json.loads(again.stdout)["sizes"][0]["loss"] is not None
    offline = hub.run("convert", "org/tiny", "--budget", "6bpw", "--json", HF_HUB_OFFLINE="1")
    assert offline.returncode == 0, offline.stderr


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("GatedRepo", "gated"),
        ("RepoNotFound", "no such model"),
        ("RevisionNotFound", "revision does not exist"),
    ],
)
def test_a_refusal_of_the_hub_is_one_sentence(hub: FakeHub, fault: str, sentence: str) -> None:
    hub.fault = fault
    done = hub.run("convert", "org/tiny@v9", "--budget", "5bpw")
    assert done.returncode == 1, done.stderr
    assert sentence in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_offline_and_unreachable_are_one_sentence(hub: FakeHub) -> None:
    for env in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        done = hub.run("convert", "org/tiny", "--budget", "5bpw", **env)
        assert done.returncode == 1, done.stderr
        assert "cannot be reached and org/tiny is not complete" in done.stderr, done.stderr
        assert "or give a folder" in done.stderr, done.stderr
        assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_cache_without_a_tokenizer_is_completed(hub: FakeHub) -> None:
    """Another program may have left config and weights only; who has all needs no network."""
    snapshot = hub.fill_cache()
    examined = hub.run("doctor", "org/tiny", HF_HUB_OFFLINE="1")
    assert examined.returncode == 1
    assert "not in mlx-lm's layout" in examined.stderr
    for file in snapshot.glob("tokenizer*.json"):
        file.unlink()
    done = hub.run("convert", "org/tiny", "--budget", "5bpw")
    assert done.returncode == 0, done.stderr


def test_a_damaged_index_in_the_cache_is_one_sentence(hub: FakeHub) -> None:
    (hub.fill_cache() / "model.safetensors.index.json").write_text("{")
    done = hub.run("convert", "org/tiny", "--budget", "5bpw")
    assert done.returncode == 1, done.stderr
    assert "is not a safetensors index" in done.stderr, done.stderr


def test_files_that_the_index_does_not_tell_of(hub: FakeHub) -> None:
    """A second copy of the weights (before the download), and shards without an index."""
    shard = next(hub.folder.glob("*.safetensors"))
    shutil.copyfile(shard, hub.folder / "model.fp32-copy.safetensors")
    done = hub.run("convert", "org/tiny", "--budget", "5bpw", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "model.fp32-copy.safetensors holds a second copy" in done.stderr, done.stderr
    (hub.folder / "model.fp32-copy.safetensors").unlink()
    (hub.folder / "model.safetensors.index.json").unlink()
    done = hub.run("convert", "org/tiny", "--budget", "5bpw")
    assert done.returncode == 1, done.stderr
    assert "have no index" in done.stderr, done.stderr


def test_a_half_downloaded_model_is_one_sentence(hub: FakeHub) -> None:
    (hub.fill_cache() / "model-00002-of-00002.safetensors").unlink()
    done = hub.run("convert", "org/tiny", "--budget", "5bpw", HF_HUB_OFFLINE="1")
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "not complete in the local cache" in done.stderr


def test_a_cache_without_refs_serves_who_names_the_commit(
    hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = hub.fill_cache()
    (snapshot.parents[1] / "refs" / "main").unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub.home / "hub"))
    assert cached(RepoId("org/tiny", None)) is None
    assert cached(RepoId("org/tiny", COMMIT)) == snapshot


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "download"), [((), 1), (("--low-disk",), 1), (("--low-disk",), 2)]
)
def test_a_killed_download_goes_on(
    hub: FakeHub, tmp_path: Path, options: tuple[str, ...], download: int
) -> None:
    shards = sorted(f.name for f in hub.folder.glob("*.safetensors"))
    out = tmp_path / "out"
    command = ("convert", "org/tiny", "--budget", "5bpw", "--no-smoke", *options, "-o", str(out))
    hub.killed_at = (shards[1], download)
    killed = hub.run(*command)
    assert killed.returncode == -9, killed.stderr
    assert not out.exists()

    # What was downloaded whole is not downloaded again, unless it was dropped after its use.
    hub.killed_at = None
    hub.downloads.clear()
    again = hub.run(*command)
    assert again.returncode == 0, again.stderr
    at_most = (3 - download) if options else 1
    assert max(hub.downloads.get(name, 0) for name in shards) <= at_most
    assert options or shards[0] not in hub.downloads
    assert not list(tmp_path.glob("out.*"))

    convert(str(hub.folder), "5bpw", tmp_path / "whole", smoke=False)
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
