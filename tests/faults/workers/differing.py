"""The program on hosts that differ: rank 1 has another `setting`, other `data` at the same path, or another `environment`."""

import os
import sys

from ds_trainer.cli import main

what = sys.argv.pop(1)
if os.environ["RANK"] == "1":
    if what == "setting":
        sys.argv.append("train.learning_rate=0.02")
    if what == "environment":
        os.environ["NCCL_ALGO"] = "Tree"
if what == "data":
    # Two hosts of one rank each: ranks of one host would wait for each other to tokenise.
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=os.environ["RANK"], GROUP_WORLD_SIZE="2")
    os.chdir(f"host{os.environ['RANK']}")
sys.exit(main())
