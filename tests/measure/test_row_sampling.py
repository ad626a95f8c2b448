"""Profiling by sampled rows: unbiased, as exact as promised, and good enough to plan on."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from helpers import Cli, Maker, Model, llama, qwen3_moe, spoil_weight, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st

from mint_mlx.allocation.allocate import _fisher, allocate
from mint_mlx.allocation.plan import Plan
from mint_mlx.allocation.search_space import SearchSpace
from mint_mlx.base.errors import MintError
from mint_mlx.base.quant_config import QuantConfig
from mint_mlx.base.units import parse_budget
from mint_mlx.checkpoint import row_reader
from mint_mlx.jobs import convert, measurements, steps
from mint_mlx.jobs.model import prepare
from mint_mlx.measure import row_sampling
from mint_mlx.measure.distortion import measure
from mint_mlx.measure.profile import Profile
from mint_mlx.measure.profile_file import load_profile
from mint_mlx.measure.row_sampling import measure_sample
from mint_mlx.measure.sample import AUTO
from mint_mlx.measure.sensitivity import Sensitivity
from mint_mlx.rules.objectives import Context, find_objective

CONFIGS = (QuantConfig(2, 64), QuantConfig(4, 32), QuantConfig(4, 128), QuantConfig(8, 64))


def heavy(experts: int, count: int, columns: int, seed: int = 0) -> mx.array:
    """Weights with heavy tails (t with six degrees of freedom), rows of uneven size."""
    rng = np.random.default_rng(seed)
    size = np.exp(0.1 * rng.standard_normal((experts, count, 1)))
    weight = rng.standard_t(6, (experts, count, columns)) * size
    return mx.array(weight.astype(np.float32)).astype(mx.bfloat16)


@given(count=st.integers(2, 400), drawn=st.integers(1, 100), seed=st.integers(0, 1000))
def test_every_stratum_is_drawn_from_once_and_no_row_twice(
    count: int, drawn: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    drawn = max(1, min(drawn, count // 4))
    rows = row_sampling._strata(count, drawn, 3, rng)
    while 4 * drawn <= count:
        more = row_sampling._other_halves(rows, count, rng)
        rows = np.sort(np.concatenate([rows, more], axis=1), axis=1)
        drawn *= 2
        edges = row_sampling._edges(count, drawn)
        assert rows.shape == (3, drawn)
        assert (rows >= edges[:-1]).all()
        assert (rows < edges[1:]).all()


def test_estimates_lie_within_their_standard_errors() -> None:
    shape = (4, 1600, 512)
    weight = heavy(*shape)
    true, energy = measure(weight, CONFIGS)
    read = partial(row_reader.select_rows, weight)
    deviations = []
    for seed in range(8):
        sampled = measure_sample(read, shape, CONFIGS, AUTO, np.random.default_rng(seed))
        assert sampled.error <= row_sampling.tolerance(4)
        assert sampled.share < 0.4
        assert np.abs(sampled.energy / energy - 1).max() < 0.2
        deviations.append(sampled.nmse / true - 1)

    # Each one's spread over the draws, and no bias over all.
    spread = np.stack(deviations)
    assert np.sqrt((spread**2).mean(axis=0)).max() < 2 * row_sampling.tolerance(4)
    assert abs(spread.mean()) < 0.005


def test_a_share_is_drawn_as_it_is_and_a_whole_one_is_exact() -> None:
    weight = heavy(2, 100, 128)
    read = partial(row_reader.select_rows, weight)
    rng = np.random.default_rng(0)
    tenth = measure_sample(read, (2, 100, 128), CONFIGS, "0.1", rng)
    assert tenth.share == pytest.approx(0.1)
    assert tenth.error > 0.02
    whole = measure_sample(read, (2, 100, 128), CONFIGS, "1", rng)
    assert whole.share == 1
    assert whole.error == 0
    np.testing.assert_allclose(whole.nmse, measure(weight, CONFIGS)[0])


def test_an_expert_whose_rows_are_all_drawn_draws_no_more() -> None:
    """One of them is sure while the sum over both isn't: what is left to draw is the other's."""
    rng = np.random.default_rng(0)
    rows, columns = 31, 32768
    weight = rng.normal(size=(2, rows, columns)).astype(np.float32)
    weight *= 0.02 / np.sqrt(np.square(weight).mean(-1, keepdims=True))
    weight[0, 1::2] = np.sign(weight[0, 1::2]) * 0.02  # the same energy, other ranges
    weight[0, 3::4] *= 1e-3
    weight[1] *= np.sqrt(1 + 0.062 * rng.normal(size=(rows, 1))).astype(np.float32)

    def read(experts: np.ndarray, places: np.ndarray) -> mx.array:
        return mx.array(weight[experts[:, None], places])

    rng = np.random.default_rng(6)
    sampled = measure_sample(read, weight.shape, [QuantConfig(4, 64)], AUTO, rng)
    assert np.isfinite(sampled.nmse).all()


def test_an_expert_of_zeros_is_no_trouble() -> None:
    weight = mx.concatenate([mx.zeros((1, 2000, 128), mx.bfloat16), heavy(1, 2000, 128)])
    read = partial(row_reader.select_rows, weight)
    sampled = measure_sample(read, (2, 2000, 128), CONFIGS, AUTO, np.random.default_rng(0))
    assert (sampled.nmse[:, 0] == 0).all()
    assert (sampled.nmse[:, 1] > 0).all()


def wide_moe(inner: int = 1024) -> Model:
    """A Qwen3-MoE whose experts have rows enough to draw from."""
    config, shapes = qwen3_moe(2, 2)
    for name, shape in shapes.items():
        if ".experts." in name:
            shapes[name] = (shape[0], inner) if "down_proj" in name else (inner, shape[1])
    return config | {"moe_intermediate_size": inner}, shapes


def test_plans_from_a_sample_lose_less_than_half_a_percent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("helpers.HIDDEN", 512)
    for name, value in (("WHOLE", 1 << 12), ("FIRST", 1 << 13), ("FIRST_OF_LAYER", 1 << 13)):
        monkeypatch.setattr(row_sampling, name, value)
    folder = write_checkpoint(tmp_path / "m", wide_moe())
    _add_tails(folder)
    job = prepare(str(folder))
    drawn, exact = (measurements.get_profile(job, sample=how) for how in ("auto", "1"))
    assert sum(curve.share < 0.6 for curve in drawn.curves.values()) >= 3
    assert exact.sampled == ""
    for layer in job.inventory.layers:
        assert drawn.curves[layer.path].error <= row_sampling.tolerance(layer.experts)

    # By exact errors, plans from the sample lose next to nothing against those from all rows.
    sensitivity = measurements.get_sensitivity(job)
    assert sensitivity is not None
    space = SearchSpace(job.inventory, job.recipe)
    for objective in ("nmse", "mint", "prior", "fisher"):
        known = sensitivity if objective == "fisher" else None
        for bits in ("3.5bpw", "4.25bpw", "5bpw", "6bpw"):
            size = parse_budget(bits)
            best, plan = (
                allocate(profile, size, space, objective, sensitivity=known)
                for profile in (exact, drawn)
            )
            least, loss = (_loss(exact, p, sensitivity) for p in (best, plan))
            assert loss <= 1.005 * least, (objective, bits, loss / least)


def _loss(exact: Profile, plan: Plan, weights: Sensitivity) -> float:
    """A plan's objective by exact errors."""
    inventory = exact.inventory
    priors = exact.recipe.priors.model_dump()
    context = Context(inventory.blocks, **priors, fisher=_fisher(exact, weights))
    objective = find_objective(plan.objective or "")
    loss = 0.0
    for layer in inventory.layers:
        errors = exact.curves[layer.path].of(plan.choice[layer.path])
        loss += float(objective.loss(layer, errors[None], context)[0])
    return loss


def _add_tails(folder: Path) -> None:
    """Replace the weights by ones with heavy tails and a size for each row."""
    with mx.stream(mx.cpu):
        tensors = dict(mx.load(str(folder / "model.safetensors")))
        mx.eval(tensors)
    for number, (name, array) in enumerate(tensors.items()):
        if array.ndim == 2:
            tensors[name] = heavy(1, *array.shape, seed=number)[0] * 0.05
    mx.save_safetensors(str(folder / "model.safetensors"), tensors, metadata={"format": "pt"})


def test_the_profile_tells_what_it_was_measured_on(cli: Cli, make: Maker, tmp_path: Path) -> None:
    folder = str(make(qwen3_moe(1)))
    file = tmp_path / "p.json"
    profiled = cli("profile", folder, "-o", file, "--sample", "0.25")
    assert profiled.code == 0
    assert "% of the weights (standard errors up to" in profiled.out
    read = load_profile(file)
    assert read.sample == "0.25"
    assert read.seed == row_sampling.SEED
    assert read.sampled

    _, again = steps.write_profile(folder, tmp_path / "again.json", sample="0.25")
    for path, curve in read.curves.items():
        assert np.array_equal(curve.nmse, again.curves[path].nmse)


def test_a_row_that_is_not_finite_is_refused_unless_allowed(cli: Cli, make: Maker) -> None:
    folder = make(qwen3_moe(1))
    spoil_weight(folder, "model.layers.0.self_attn.o_proj.weight", float("nan"))
    job = prepare(str(folder))
    for how in ("1", "auto"):
        with pytest.raises(MintError, match=r"o_proj\.weight holds NaN"):
            measurements.get_profile(job, sample=how)

    # Where it is allowed, nothing is cached: it would hide the row from the next run.
    allowed = measurements.get_profile(job, sample="1", allow_nonfinite=True)
    assert measurements.known_profile(job, "1") is None
    assert all(np.isfinite(curve.nmse).all() for curve in allowed.curves.values())

    # A model with such a row cannot be run, so that only `fast` converts it.
    command = ("convert", folder, "--budget", "5bpw", "-o", folder.parent / "out", "--no-smoke")
    refused = cli(*command, "--effort", "balanced", "--allow-nonfinite")
    assert refused.code
    assert "--effort fast" in refused.err
    assert cli(*command, "--effort", "fast", "--allow-nonfinite").code == 0


def test_a_source_with_nothing_left_to_measure_is_sampled_too(make: Maker, tmp_path: Path) -> None:
    """Fewer than its two bits there are none: what a layer has is its only candidate."""
    convert.convert(str(make(llama(1))), uniform="2bit-g128", out=tmp_path / "two", smoke=False)
    profile = measurements.get_profile(prepare(str(tmp_path / "two")), sample="0.5")
    assert any(curve.configs == (QuantConfig(2, 128),) for curve in profile.curves.values())
