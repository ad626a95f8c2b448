"""Fixtures of all tests: an empty cache, the demo model, random checkpoints, the command line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mint_mlx.base.blas import use_fast_blas

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # tests run side by side already
use_fast_blas()  # where there is one: the trained models' tests take several times as long without

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from fake_hub import FakeHub, serve_hub  # noqa: E402
from helpers import DEMO, Cli, Maker, Model, Ran, qwen3_moe, write_checkpoint  # noqa: E402

from mint_mlx.allocation.allocate import allocate  # noqa: E402
from mint_mlx.allocation.plan import Plan  # noqa: E402
from mint_mlx.allocation.search_space import SearchSpace  # noqa: E402
from mint_mlx.base.units import parse_budget  # noqa: E402
from mint_mlx.cli import main  # noqa: E402
from mint_mlx.converters.quantizers import latents  # noqa: E402
from mint_mlx.jobs import measurements  # noqa: E402
from mint_mlx.jobs.model import Job, prepare  # noqa: E402
from mint_mlx.measure.profile import Profile  # noqa: E402
from mint_mlx.measure.self_text import random_windows, write_tokens  # noqa: E402
from mint_mlx.rules import efforts  # noqa: E402
from mint_mlx.runtime.device import on_cpu  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def _session_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What several tests share is not cached among the user's files either."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINT_MLX_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(autouse=True)
def _isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has an empty cache, no network, and settings that cost little time."""
    monkeypatch.setenv("MINT_MLX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    # The levels that use the model's own text have tests of their own, on few tokens; shorter
    # windows are sampled side by side, in a quarter of the steps.
    monkeypatch.setattr(efforts, "DEFAULT", "fast")
    monkeypatch.setattr(efforts, "TOKENS", 512)
    monkeypatch.setattr("mint_mlx.measure.self_text.LENGTH", 64)
    monkeypatch.setattr("mint_mlx.converters.quantizers.learn_block.STEPS", 2)
    monkeypatch.setattr("mint_mlx.converters.quantizers.learn_block.TOKENS", 256)
    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.STEPS", 4)
    monkeypatch.setattr("mint_mlx.converters.quantizers.distil.TOKENS", 256)
    monkeypatch.setattr("mint_mlx.eval.text.TELLING", 10_000)


@pytest.fixture
def like_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Quantized layers run as on a GPU, in bfloat16 (dense layers only: `gather_mm` can't)."""
    if on_cpu():
        stream = mx.default_stream(mx.cpu)
        monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu, 0))
        monkeypatch.setattr(mx, "default_stream", lambda device: stream)
        # Compiling takes a CPU seconds.
        for name in ("step", "dense"):
            plain = getattr(latents, f"_{name}_of_arrays")
            monkeypatch.setattr(latents, f"_compiled_{name}", plain)


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """What replaces parts of the CPU backend is tested on the CPU, on a Mac as well."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@pytest.fixture
def demo_model() -> Path:
    """The trained 2.3 M Mixture-of-Experts model that comes with the package."""
    return DEMO


@pytest.fixture(scope="session")
def demo_text() -> np.ndarray:
    """2,048 tokens of the demo model in windows of 64, of another seed than conversions use."""
    windows = random_windows(2048, 2048, seed=5, length=64)
    return write_tokens(prepare(str(DEMO)).source, windows, seed=5)[0]


@pytest.fixture
def make(tmp_path: Path) -> Maker:
    """make(llama(2), ...) writes a random checkpoint and returns its folder."""

    def write(model: Model, name: str = "model", **more: Any) -> Path:
        return write_checkpoint(tmp_path / name, model, **more)

    return write


@pytest.fixture
def job(make: Maker) -> Job:
    """A random Qwen3-MoE of two blocks, opened."""
    return prepare(str(make(qwen3_moe(2))))


@pytest.fixture
def curves(job: Job) -> Profile:
    """The profile of `job`."""
    return measurements.get_profile(job)


@pytest.fixture
def plan(job: Job, curves: Profile) -> Plan:
    """The plan of `job` at 4.5 bits per weight."""
    return allocate(curves, parse_budget("4.5bpw"), SearchSpace(job.inventory, job.recipe))


@pytest.fixture
def hub(make: Maker, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub of one repository, org/tiny: a Qwen3-MoE in two shards."""
    (tmp_path / "home").mkdir()
    with serve_hub(make(qwen3_moe(2), shards=2), tmp_path / "home") as server:
        yield server


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """cli("convert", folder, ...) runs the command line in this process."""

    def run(*args: str | Path) -> Ran:
        capsys.readouterr()  # drops what was printed before
        monkeypatch.setattr(sys, "argv", ["mint-mlx", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            main.main()
        return Ran(int(stopped.value.code or 0), *capsys.readouterr())

    return run
