"""The program on a device that does not compute in a precision: lacking.py PRECISION debug ..."""

import sys

from deepspeed.accelerator import get_accelerator

from ds_trainer.cli import main

setattr(get_accelerator(), f"is_{sys.argv.pop(1)}_supported", lambda: False)
sys.exit(main())
