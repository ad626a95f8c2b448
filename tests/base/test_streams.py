"""Each thread has streams of its own."""

from __future__ import annotations

import threading
from pathlib import Path

from helpers import Maker, llama

from mint_mlx.jobs.convert import convert


def test_two_threads_of_a_program_convert(make: Maker, tmp_path: Path) -> None:
    """MLX binds a stream to the thread that made it: a second thread may not get the first's."""
    source = str(make(llama(1)))
    made = []

    def work(number: int) -> None:
        convert(source, "5bpw", tmp_path / str(number), smoke=False)
        made.append((tmp_path / str(number) / "model.safetensors").read_bytes())

    for number in range(2):
        thread = threading.Thread(target=work, args=(number,))
        thread.start()
        thread.join()
    assert len(made) == 2
    assert made[0] == made[1]
