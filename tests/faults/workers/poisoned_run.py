"""The program with a loss that is NaN on one rank: RANK:STEP,... in the second micro-batch, RANK:probe in evaluations."""

import os
import sys

from ds_trainer import whereabouts
from ds_trainer.cli import main
from ds_trainer.objectives import language_model

rank, _, steps = sys.argv.pop(1).partition(":")
probe = steps == "probe" and rank == os.environ["RANK"]
poisoned = {int(step) for step in steps.split(",")} if not probe and rank == os.environ["RANK"] else set()
real, count = language_model.nll_sum, 0


def nll_sum(*arguments):
    global count
    loss = real(*arguments)
    if whereabouts.now.phase != "forward and backward":
        return loss * float("nan") if probe and whereabouts.now.phase == "evaluating" else loss
    count += 1
    return loss * float("nan") if whereabouts.now.step in poisoned and count % 2 == 0 else loss


language_model.nll_sum = nll_sum
sys.exit(main())
