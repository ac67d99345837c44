"""The program with a fault in the sixth micro-step of rank 1: `raise` an exception, or be `killed`."""

import os
import signal
import sys

from ds_trainer.cli import main
from ds_trainer.engine import wrapper

fault, count = sys.argv.pop(1), 0
real = wrapper.Engine.micro_step


def micro_step(*arguments):
    global count
    count += 1
    if os.environ["RANK"] == "1" and count == 6:
        if fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("the tensors of rank one caught fire")
    return real(*arguments)


wrapper.Engine.micro_step = micro_step
sys.exit(main())
