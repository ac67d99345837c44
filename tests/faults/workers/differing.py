"""The program on hosts that differ: rank 1 has other `data` at the same path, or another `environment` and another setting."""

import os
import sys

from ds_trainer.cli import main

what = sys.argv.pop(1)
if os.environ["RANK"] == "1" and what == "environment":
    os.environ["NCCL_ALGO"] = "Tree"
    sys.argv.append("train.learning_rate=0.02")
if what == "data":
    # Two hosts of one rank each: ranks of one host would wait for each other to tokenise.
    os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1", GROUP_RANK=os.environ["RANK"], GROUP_WORLD_SIZE="2")
    os.chdir(f"host{os.environ['RANK']}")
sys.exit(main())
