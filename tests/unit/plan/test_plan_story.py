"""A plan as a whole: the numbers come from the settings in force, advice is checked, and what is shown can be relied on."""

import json

import pytest
from helpers import TINY_LLAMA

from ds_trainer.cli import main
from ds_trainer.errors import ArgumentsError
from ds_trainer.plan import render, story
from ds_trainer.plan.cluster import Cluster
from ds_trainer.plan.story import Request, changes_that_fit, make_plan, sweep

GIB = 2**30
LLAMA_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}


def gpus(count: int, gib: float, **more: float) -> Cluster:
    return Cluster(nodes=1, ranks_per_node=count, device_type="cuda", device_bytes=gib * GIB, **more)


def of_8b(**sections):
    train = {"micro_batch_size": 4, "global_batch_size": 64, "gradient_accumulation_steps": None, "precision": "bf16"}
    return {"model": LLAMA_8B, "data": {"seq_len": 4096}, "train": train, **sections}


def test_the_numbers_follow_from_the_settings_in_force(plan_of):
    plan = plan_of(
        "deepspeed.zero_optimization.stage=3",
        "deepspeed.zero_optimization.reduce_bucket_size=auto",
        "deepspeed.zero_optimization.stage3_prefetch_bucket_size=auto",
        "deepspeed.zero_optimization.offload_optimizer={device: cpu}",
        train={"micro_batch_size": 2, "global_batch_size": 16},
        cluster=gpus(4, 80),
    )
    assert (plan.holding.stage, plan.holding.optimizer_on, plan.holding.accumulation) == (3, "cpu", 2)
    assert plan.holding.reduce_bucket == 4096 * 4096
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    assert (plan.holding.whole_layers, plan.holding.prefetch_bucket, plan.shape.whole_layer) == (True, layer, layer)
    assert plan.length.positions_per_step == 16 * 48
    assert plan.length.max_steps == 4


def test_a_batch_that_does_not_divide_is_refused_as_train_refuses_it(plan_of):
    with pytest.raises(
        ArgumentsError, match=r"train\.global_batch_size = 4 is not a multiple of micro_batch_size 1 x 3 ranks = 3"
    ):
        plan_of(cluster=gpus(3, 80))


@pytest.fixture
def too_large(plan_of):
    """An 8B model on four GPUs of 40 GiB at ZeRO-2."""
    return plan_of(cluster=gpus(4, 40, host_bytes=2**40), **of_8b())


def test_advice_fits_when_it_is_taken(too_large):
    assert not too_large.fits
    changes = changes_that_fit(too_large)
    assert changes
    for change in changes:
        request = too_large.request
        cluster = change.plan.request.cluster
        again = make_plan(Request(config=request.config, overrides=change.settings, cluster=cluster))
        assert again.fits
        assert again.memory.peak("device")[1] <= 40 * GIB
        if change.keeps_update:
            assert again.batch.global_batch_size == 64
            assert again.resolved.settings.data.seq_len == 4096
    orders = [change.keeps_update for change in changes]
    assert orders == sorted(orders, reverse=True)


def test_advice_is_the_cheapest_that_is_enough(plan_of):
    # 4 rows of 4096 without checkpointing are too much, two are not; nothing else has to change.
    sections = of_8b()
    plan = plan_of(
        "deepspeed.zero_optimization.stage=3",
        cluster=gpus(64, 80),
        **sections | {"train": sections["train"] | {"global_batch_size": 256}},
    )
    assert not plan.fits
    first = changes_that_fit(plan)[0]
    assert first.settings == ("deepspeed.zero_optimization.stage=3",) or first.settings[0].startswith("train.micro_batch_size=")


def test_a_base_that_is_too_large_for_lora_is_advised_to_be_held_in_4_bits(plan_of, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA_8B))
    sections = of_8b(adapter={"lora": {"rank": 8}}) | {"model": None, "base": tmp_path / "base"}
    sections["train"] |= {"micro_batch_size": 1, "global_batch_size": 1}
    plan = plan_of("model.gradient_checkpointing=true", cluster=gpus(1, 16, host_bytes=2**40), **sections)
    assert not plan.fits
    change = next(each for each in changes_that_fit(plan) if each.settings == ("model.quantize=nf4",))
    assert not change.keeps_update
    assert change.plan.shape.total == plan.shape.total
    saved = plan.memory.device["update"]["weights"] - change.plan.memory.device["update"]["weights"]
    assert saved == 1.5 * change.plan.shape.packed  # half a byte instead of two
    assert "% held in 4 bits" in render.as_text(change.plan)


def test_no_advice_where_nothing_helps(plan_of):
    plan = plan_of(cluster=gpus(1, 0.5, host_bytes=GIB), **of_8b())
    assert changes_that_fit(plan) == []
    assert "No change that was tried makes it fit" in render.as_text(plan)


def test_more_memory_never_makes_a_run_unfit(plan_of):
    sizes = [plan_of(cluster=gpus(8, gib), **of_8b()).fits for gib in (10, 40, 80, 160, 320)]
    assert sizes == sorted(sizes)


def test_the_sweep_plans_every_stage(too_large):
    rows = sweep(too_large.request)
    peaks = {row.name: row.plan.memory.peak("device")[1] for row in rows}
    assert len(rows) == 8
    assert peaks["ZeRO-3"] < peaks["ZeRO-2"] < peaks["ZeRO-1"]
    assert peaks["ZeRO-3, optimizer and weights on cpu"] < peaks["ZeRO-3, optimizer on cpu"] < peaks["ZeRO-3"]


def test_the_sweep_takes_back_what_only_stage_3_has(plan_of):
    plan = plan_of(
        "deepspeed.zero_optimization.stage=3", "deepspeed.zero_optimization.stage3_max_reuse_distance=1000", cluster=gpus(4, 80)
    )
    assert [row.refused for row in sweep(plan.request)] == [""] * 8


def test_on_the_cpu_host_and_device_are_one(plan_of):
    plan = plan_of(cluster=Cluster(nodes=1, ranks_per_node=2, device_type="cpu", host_bytes=8 * GIB))
    (need,) = plan.needs
    assert need.what == "host memory of a node"
    assert need.taken == 2 * plan.memory.peak("device")[1]
    assert "on the CPU device and host are one" in render.as_text(plan)


def test_rows_that_prepare_has_counted_give_the_steps(plan_of, tmp_path):
    train = {"max_steps": None, "epochs": 2, "global_batch_size": 4, "schedule": "constant"}
    plan = plan_of(train=train)
    assert plan.length.max_steps is None
    assert "run `ds_trainer prepare`" in plan.notes[-1]
    (tmp_path / "run").mkdir()
    report = {"seq_len": 48, "sources": [{"path": str(tmp_path / "texts.jsonl")}], "num_rows": 30, "fill": 0.5}
    (tmp_path / "run" / "data_report.json").write_text(json.dumps({"data": report}))
    plan = plan_of(train=train)
    assert (plan.length.max_steps, plan.length.tokens_per_step) == (15, 4 * 48 / 2)
    (tmp_path / "run" / "data_report.json").write_text(json.dumps({"data": report | {"seq_len": 64}}))
    assert plan_of(train=train).length.max_steps is None


def test_operations_of_a_step_by_hand(plan_of, tmp_path):
    plan = plan_of(model=TINY_LLAMA)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32
    total = 320 * 32 + 2 * layer + 32  # tied: the embedding is the head, and multiplied
    assert plan.flops == 4 * 48 * (6 * total + 6 * 2 * 32 * 48)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(TINY_LLAMA))
    lora = plan_of("adapter.lora.rank=1", base=tmp_path / "base")
    assert lora.flops == 4 * 48 * (4 * total + 6 * (lora.shape.total - total) + 6 * 2 * 32 * 48)


def test_time_and_price(plan_of):
    plan = plan_of(cluster=gpus(2, 80))
    text = render.as_text(plan, tflops=1e-6, price=3.0)
    seconds = plan.flops / (1e6 * 2)
    assert render.step_seconds(plan, 1e-6) == seconds
    hours = seconds * 4 / 3600
    assert f"{hours:,.1f} h, {2 * hours:,.1f} GPU hours, {6 * hours:,.2f} at 3 an hour" in text


GOLDEN = """\
DOES NOT FIT: GPU memory of a rank: 154 GiB needed, 40 GiB there, 114 GiB short

model    llama, 8,030,261,248 parameters, all trained
engine   ZeRO-2, bf16
cluster  1 node x 4 GPUs of 40 GiB, 1 TiB host memory a node

GPU memory of a rank, at its peak (forward and backward)
  activations                                 105.91 GiB
  optimizer states                             22.44 GiB
  weights                                      14.96 GiB
  gradients                                     7.69 GiB
  CUDA context and libraries (allowance)        1.00 GiB
  flattened for reducing                        0.93 GiB
  buckets for reducing                          0.93 GiB
  total                                       153.85 GiB
  in other phases: norm 46.15 GiB, update 53.46 GiB

host memory of a rank, at its peak (training); a node has 4
  copy of the state for saves       24.00 GiB
  process (allowance)                3.00 GiB
  total                             27.00 GiB

disk     a checkpoint 89.75 GiB; checkpoint.keep_last = 2 and the one being written: 269 GiB

batch    64 rows a step = 4 micro_batch_size x 4 gradient_accumulation_steps x 4 ranks
step     4 forwards a rank; 262,144 positions
run      4 steps, 256 rows, 1,048,576 tokens; warm-up 0 steps (0.0%)

traffic of a step, sent by each rank
  gradients, all-reduced       89.75 GiB
  new weights, gathered        11.22 GiB
  total                       100.96 GiB

time     7.91 s a step at 400 TFLOP/s a rank (1.26e+16 operations a step), 33,160 tokens/s
run      0.0 h, 0.0 GPU hours

note: the data has not been counted (`ds_trainer prepare` does): tokens are counted as if every position held one

What makes it fit, cheapest first; each was planned with the change in it
  1. train.micro_batch_size=1 train.gradient_accumulation_steps=16
       4 x as many forwards of 1/4 the rows: the GPU is used less well
     model.gradient_checkpointing=true
       activations are computed again: a third more compute
     deepspeed.zero_optimization.stage=3
       weights are gathered in forward and backward: about 1.5 x the traffic
     FITS: GPU memory of a rank: 39.81 GiB of 40 GiB, 190 MiB free; host memory of a node: 108 GiB of 1 TiB, 916 GiB free
"""


def test_the_text_of_a_plan(too_large):
    changes = changes_that_fit(too_large, most=1)
    assert render.as_text(too_large, changes=changes, tflops=400) == GOLDEN.strip()


def run(capsys, *words: str) -> tuple[int, str, str]:
    try:
        code = main(["plan", *words])
    except SystemExit as exit_:
        code = exit_.code
    return code, *capsys.readouterr()


def test_the_command_says_what_fits_and_exits_with_8_when_it_does_not(config_file, capsys):
    config = str(config_file())
    code, out, _ = run(capsys, "--config", config, "--gpus", "2", "--gpu-memory", "80GiB", "--host-memory", "64GiB")
    assert code == 0
    assert out.startswith("FITS: GPU memory of a rank: 2.86 GiB of 80 GiB")
    code, out, _ = run(capsys, "--config", config, "--gpus", "2", "--gpu-memory", "1MiB", "--json")
    assert code == 8
    assert json.loads(out)["needs"][0] == {
        "what": "GPU memory of a rank",
        "bytes": json.loads(out)["needs"][0]["bytes"],
        "there_bytes": 2**20,
        "fits": False,
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "2", "--gpu-memory", "80"], "--gpu-memory '80' is no size"),
        (["--gpus", "2", "--price", "2"], "--price needs --tflops"),
        (["--gpus", "3"], "is not a multiple of micro_batch_size 1 x 3 ranks = 3"),
        (["--gpus", "2", "train.max_stepz=3"], "max_stepz"),
        (["--gpus", "2", "train.no_weight_decay=[head.*]"], "head.* matches no weight that is trained"),
    ],
)
def test_bad_requests_are_refused_in_words(config_file, capsys, words, said):
    code, _, err = run(capsys, "--config", str(config_file()), *words)
    assert code == 2
    assert said in err
    assert "Traceback" not in err


def test_a_plan_reads_no_weights_and_asks_no_device(config_file, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for a GPU"))
    assert story.make_plan(Request(config=config_file(), cluster=gpus(2, 80))).fits
