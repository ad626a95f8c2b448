"""Each thread reads and computes on MLX streams of its own."""

from __future__ import annotations

import threading
from pathlib import Path

from helpers import Maker, llama

from mint_mlx.jobs.convert import convert


def test_two_threads_of_a_program_convert(make: Maker, tmp_path: Path) -> None:
    """MLX binds a stream to the thread that made it: a second thread may not get the first's."""
    source = str(make(llama(1)))
    files = []

    def work(number: int) -> None:
        convert(source, "5bpw", tmp_path / str(number), smoke=False)
        files.append((tmp_path / str(number) / "model.safetensors").read_bytes())

    for number in range(2):
        thread = threading.Thread(target=work, args=(number,))
        thread.start()
        thread.join()
    assert len(files) == 2
    assert files[0] == files[1]
