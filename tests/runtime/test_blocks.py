"""Models whose blocks form no chain."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from families import UNCHAINED, write_family
from helpers import Notes

from mint_mlx.jobs import convert
from mint_mlx.jobs.model import prepare
from mint_mlx.measure.fisher import check_chain
from mint_mlx.runtime.blocks import NoChain


@pytest.mark.parametrize("family", ["gemma4_text", "hunyuan", *UNCHAINED])
def test_a_model_that_is_no_chain_falls_back_to_its_weights(tmp_path: Path, family: str) -> None:
    if family == "bitnet" and mx.metal.is_available():
        pytest.skip("its kernels are here")
    pytest.importorskip(f"mlx_lm.models.{family}")
    folder = write_family(tmp_path / family, family)
    job = prepare(str(folder))
    with pytest.raises(NoChain):  # before it costs time
        check_chain(job.source, job.inventory)
    if family == "afm7":  # mlx-lm can't load it once it is quantized
        return

    source, notes = str(folder), Notes()
    more = {"smoke": False, "report": notes}
    result = convert.convert(source, "9bpw", tmp_path / "out", effort="balanced", **more)
    assert result.plan.objective == "prior"
    assert result.plan.quantizer == "search"
    assert any("cannot be run block by block" in note for note in notes.said)

    # Its kernels exist for Metal only, so that it can't generate a sentence elsewhere.
    if family == "bitnet":
        out = tmp_path / "with-smoke"
        result = convert.convert(source, "9bpw", out, effort="fast", report=notes)
        assert result.sentence is None
        assert any("on a GPU only" in note for note in notes.said)
