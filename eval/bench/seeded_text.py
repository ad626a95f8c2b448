"""Measures how sensitive a model is on another text of its own than the one with seed 0.

    python eval/bench/seeded_text.py MODEL SEED FILE

The program itself always writes with seed 0. `mint-mlx convert MODEL --effort best --sensitivity
FILE` takes the file, so that a level is measured by two texts (docs/results.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mint_mlx.base.blas import use_fast_blas

use_fast_blas()  # before anything imports mlx

from mint_mlx.base.report import Silent  # noqa: E402
from mint_mlx.jobs.measurements import first_token, text_start, vocabulary  # noqa: E402
from mint_mlx.jobs.model import prepare  # noqa: E402
from mint_mlx.measure import rounds  # noqa: E402
from mint_mlx.measure.self_text import random_windows, write_tokens  # noqa: E402
from mint_mlx.measure.sensitivity_file import save_sensitivity  # noqa: E402
from mint_mlx.measure.text import Text  # noqa: E402
from mint_mlx.rules.efforts import EFFORTS  # noqa: E402


def main() -> None:
    """Parse the command line, measure, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("seed", type=int)
    parser.add_argument("file", type=Path)
    parser.add_argument("--effort", default="best", choices=EFFORTS)
    parser.add_argument("--plain", action="store_true", help="no conversations")
    asked = parser.parse_args()

    job = prepare(asked.model)
    count = EFFORTS[asked.effort].tokens
    if asked.plain:
        windows = random_windows(vocabulary(job), count, first_token(job), asked.seed)
        text = Text(*write_tokens(job.source, windows, asked.seed))
    else:
        windows, given = text_start(job, count, Silent(), asked.seed)
        text = Text(*write_tokens(job.source, windows, asked.seed, given=given), given)
    save_sensitivity(rounds.measure(job.source, job.inventory, text), asked.file)


if __name__ == "__main__":
    main()
