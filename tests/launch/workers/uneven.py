"""The program with slow ranks: uneven.py COMPUTE DATA train ...

The host of rank COMPUTE gives it a third of the time: it is stopped and let go on in slices. Rank DATA reads slowly.
-1 is nobody.
"""

import os
import signal
import sys
import time

from ds_trainer.cli import main
from ds_trainer.data.rows import TokenRows

STOPPED_SECONDS, RUNNING_SECONDS = 0.04, 0.02
compute, data, rank = int(sys.argv.pop(1)), int(sys.argv.pop(1)), int(os.environ["RANK"])


def slow_down(process):
    while os.getppid() == process:
        for number, seconds in ((signal.SIGSTOP, STOPPED_SECONDS), (signal.SIGCONT, RUNNING_SECONDS)):
            os.kill(process, number)
            time.sleep(seconds)
    os._exit(0)


if rank == compute:
    slowed = os.getpid()
    if os.fork() == 0:
        slow_down(slowed)
if rank == data:
    real = TokenRows.read

    def read(self, rows):
        time.sleep(0.15)
        return real(self, rows)

    TokenRows.read = read
sys.exit(main())
