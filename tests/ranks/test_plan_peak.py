"""A plan foretells what a real run of two ranks holds at most."""

from __future__ import annotations

import pytest
from helpers import TINY_LLAMA, metrics, run_command, torchrun

from ds_trainer.plan.cluster import Cluster
from ds_trainer.plan.story import Request, make_plan

GIB = 2**30
MODEL = {**TINY_LLAMA, "vocab_size": 8000, "hidden_size": 1024, "intermediate_size": 4096, "tie_word_embeddings": False}
"""46 M parameters: of the 1.4 GiB of a rank, 0.4 are the process."""


def test_the_peak_of_a_rank_is_within_10_percent_of_its_plan(run_file, corpus, tmp_path):
    config = run_file(
        model={"config": MODEL, "tokenizer": str(corpus / "tokenizer")},
        train={"max_steps": 3, "precision": "fp32", "learning_rate": 1e-4, "global_batch_size": 2},
        checkpoint={"folder": str(tmp_path / "run"), "every_steps": 1, "keep_last": 1},
    )
    cluster = Cluster(nodes=1, ranks_per_node=2, device_type="cpu")
    planned = make_plan(Request(config=config, cluster=cluster)).memory.peak("device")[1]
    done = run_command(torchrun(2, "-m", "ds_trainer", "train", "--config", str(config)), cwd=tmp_path)
    assert done.code == 0, done.text[-3000:]
    assert planned / GIB == pytest.approx(metrics(tmp_path / "run")[-1]["peak_memory_gib"], rel=0.1)
