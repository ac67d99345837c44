"""A terminal that goes away takes nothing with it."""

import os

from ds_trainer.monitor import logs


def test_a_run_outlives_its_terminal():
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        console = logs.terminal(stream)
    console.print("seen")
    assert os.read(reader, 100) == b"seen\n"
    os.close(reader)
    for _ in range(3):
        console.print("not seen", markup=False)
    console.show_cursor()
