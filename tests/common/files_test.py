"""Files are whole or as they were."""

import os
import threading

from esm1nv_jax.common import files


def test_a_pipe_is_written_and_stays_one(tmp_path):
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    with files.replacing(pipe) as new:
        new.write_text("all of it")
    reader.join()
    assert read == ["all of it"] and pipe.is_fifo() and list(tmp_path.iterdir()) == [pipe]
