"""What DeepSpeed is handed: every "auto" filled, every shared setting written out, and why."""

import json

import pytest

from ds_trainer.arguments.engine_config import (
    build_engine_config,
    hidden_size_of,
    offload_device,
    optimizer_kind,
    read_hidden_size,
    reason_against_whole_layers,
    solve_run_batch,
    uses_deepspeed_scheduler,
    zero_stage,
)


def engine(files, *overrides, hidden_size=64, whole_layer=0, device_type="cpu", world_size=1):
    resolved = files.resolve(*overrides)
    return build_engine_config(
        resolved,
        solve_run_batch(resolved, world_size),
        hidden_size=hidden_size,
        whole_layer=whole_layer,
        device_type=device_type,
    )


def test_without_a_json_everything_that_differs_between_versions_is_written_out(files):
    assert engine(files).config == {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True, "check_grad_overflow": True},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


@pytest.mark.parametrize(("precision", "bf16", "fp16"), [("bf16", True, False), ("fp16", False, True), ("fp32", False, False)])
def test_precision_becomes_both_blocks_and_keeps_their_other_keys(files, precision, bf16, fp16):
    files.run(train=[f"precision: {precision}"])
    files.json({"bf16": {"enabled": "auto", "immediate_grad_update": True}, "fp16": {"enabled": "auto", "hysteresis": 3}})
    config = engine(files).config
    assert (config["bf16"]["enabled"], config["bf16"]["immediate_grad_update"]) == (bf16, True)
    assert config["fp16"] == {"enabled": fp16, "hysteresis": 3}


def test_a_precision_of_the_command_line_switches_the_json_off(files):
    files.json({"bf16": {"enabled": True}})
    assert engine(files, "train.precision=fp32").config["bf16"]["enabled"] is False


SIZES = ("reduce_bucket_size", "stage3_prefetch_bucket_size", "stage3_param_persistence_threshold")


@pytest.mark.parametrize(
    ("width", "whole", "expected"),
    [
        (100, 0, [4096 * 4096, 9_000, 1_000]),  # pieces of 10,000 elements would fill no network
        (100, 120_000, [4096 * 4096, 120_000, 1_000]),  # the next layer comes while one is computed
        (8192, 0, [8192 * 8192, int(0.9 * 8192 * 8192), 81_920]),  # from 4096 on as transformers fills them
    ],
)
def test_sizes_that_are_auto_come_from_the_width_of_the_model_and_its_layers(files, width, whole, expected):
    files.json({"zero_optimization": {"stage": 3, **dict.fromkeys(SIZES, "auto")}})
    built = engine(files, hidden_size=width, whole_layer=whole)
    assert [built.config["zero_optimization"][name] for name in SIZES] == expected
    reason = built.reasons["zero_optimization.reduce_bucket_size"]
    assert reason == f"hidden_size x hidden_size, 4096 x 4096 at least; hidden_size = {width}"
    ends = "such a layer 120,000" if whole else "no layer is gathered whole"
    assert built.reasons["zero_optimization.stage3_prefetch_bucket_size"].endswith(ends)


def test_sizes_that_are_auto_wait_for_the_model(files):
    files.json({"zero_optimization": {"stage": 3, **dict.fromkeys(SIZES, "auto")}})
    waiting = engine(files, hidden_size=None)
    assert waiting.config["zero_optimization"]["reduce_bucket_size"] == "auto"
    assert waiting.reasons["zero_optimization.reduce_bucket_size"].endswith("known when the model is loaded")
    waiting = engine(files, hidden_size=64, whole_layer=None).config["zero_optimization"]
    assert [waiting[name] for name in SIZES] == [4096 * 4096, "auto", 640]


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({}, None),
        ({"offload_param": {"device": "cpu"}}, None),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, "a buffer of host memory for each weight"),
        ({"leaf_module": {"classes": []}}, "the DeepSpeed JSON says"),
        ({"stage3_module_granularity_threshold": 5}, "the DeepSpeed JSON says"),
        ({"zero_quantized_weights": True}, "not been tried with zero_quantized_weights"),
        ({"zero_hpz_partition_size": 4}, "not been tried with zero_hpz_partition_size"),
    ],
)
def test_where_whole_layers_are_not_proven_they_are_left_off_and_the_bucket_knows(files, zero, said):
    found = reason_against_whole_layers(zero)
    assert found is None if said is None else said in found
    files.json({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto", **zero}})
    filled = engine(files, hidden_size=100, whole_layer=120_000).config["zero_optimization"]
    assert filled["stage3_prefetch_bucket_size"] == (120_000 if said is None else 9_000)


def test_the_batch_is_the_solved_one_and_the_global_size_is_left_to_follow(files):
    files.run(train=["micro_batch_size: 2"]).json({"train_batch_size": 16, "gradient_accumulation_steps": "auto"})
    config = engine(files, world_size=2).config
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 4)
    assert "train_batch_size" not in config


def test_clipping_and_printing_are_the_run_files(files):
    files.run(train=["max_grad_norm: 0"]).json({"steps_per_print": 7, "gradient_clipping": "auto"})
    resolved, config = files.resolve(), engine(files).config
    assert config["gradient_clipping"] == 0
    assert "steps_per_print" not in config
    assert resolved.settings.monitor.log_every_steps == 7


def test_monitors_are_handed_over_whole_and_an_empty_auto_is_not(files):
    files.run(monitor=["wandb: {project: mine}"]).json({"wandb": {"enabled": True}, "comet": "auto"})
    config = engine(files).config
    assert config["wandb"] == {"project": "mine", "enabled": True}
    assert "comet" not in config


KINDS = [
    # DeepSpeed keys -> kind on cpu, kind on cuda
    ({}, "torch_adamw", "torch_adamw"),
    ({"optimizer": {"type": "AdamW"}}, "torch_adamw", "torch_adamw"),
    ({"optimizer": {"type": "adam", "params": {"lr": 1e-3, "betas": "auto"}}}, "torch_adamw", "torch_adamw"),
    ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}, "torch_adamw", "torch_adamw"),
    ({"optimizer": {"type": "AdamW", "params": {"torch_adam": False}}}, "torch_adamw", "fused_adam"),
    ({"optimizer": {"type": "Adam", "params": {"adam_w_mode": False}}}, "deepspeed", "deepspeed"),
    ({"optimizer": {"type": "AdamW", "params": {"fp32_optimizer_states": False}}}, "deepspeed", "deepspeed"),
    ({"optimizer": {"type": "AdamW", "legacy_fusion": True}}, "deepspeed", "deepspeed"),
    ({"optimizer": {"type": "Lion"}}, "deepspeed", "deepspeed"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "cpu_adam", "cpu_adam"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, "torch_adamw", "torch_adamw"),
    (
        {
            "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
            "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        },
        "torch_adamw",
        "torch_adamw",
    ),
]


@pytest.mark.parametrize(("content", "cpu", "cuda"), KINDS, ids=[json.dumps(row[0])[:60] for row in KINDS])
def test_adamw_is_built_by_us_and_anything_else_by_deepspeed(files, content, cpu, cuda):
    resolved = files.json(content).resolve()
    assert (optimizer_kind(resolved, "cpu"), optimizer_kind(resolved, "cuda")) == (cpu, cuda)
    config = engine(files).config
    assert ("optimizer" in config) == (cpu == "deepspeed")
    if cpu != "deepspeed":
        assert config["zero_allow_untested_optimizer"] is True
        assert config["zero_force_ds_cpu_optimizer"] is (cpu == "cpu_adam")


def test_an_optimizer_that_deepspeed_builds_gets_the_settings_in_force_and_not_its_own_defaults(files):
    files.run(train=["learning_rate: 3e-4"]).json({"optimizer": {"type": "Lion", "params": {"weight_decay": "auto"}}})
    params = engine(files).config["optimizer"]["params"]
    assert params == {"lr": 3e-4, "betas": [0.9, 0.95], "weight_decay": 0.01}
    files.json({"optimizer": {"type": "SGD"}})
    assert engine(files).config["optimizer"]["params"] == {"lr": 3e-4}


def test_a_schedule_that_deepspeed_builds_gets_the_settings_in_force_and_not_its_own_defaults(files):
    files.run(train=["learning_rate: 3e-4", "warmup_steps: 5"])
    files.json({"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_min_lr": "auto", "warmup_type": "linear"}}})
    assert uses_deepspeed_scheduler(files.resolve())
    assert engine(files).config["scheduler"]["params"] == {
        "warmup_min_lr": 0.0,
        "warmup_type": "linear",
        "warmup_max_lr": 3e-4,
        "warmup_num_steps": 5,
        "total_num_steps": 100,
    }
    files.run().json({"scheduler": {"type": "WarmupCosineLR"}})
    built = engine(files)
    assert built.config["scheduler"]["params"] == {"warmup_num_steps": 1, "total_num_steps": 100}, "DeepSpeed refuses 0"
    assert built.reasons["scheduler.params.warmup_num_steps"] == "train.warmup_steps, and 1 at least"
    files.json({"scheduler": {"type": "StepLR", "params": {"step_size": 3}}})
    assert engine(files).config["scheduler"]["params"] == {"step_size": 3}


def test_building_the_configuration_leaves_the_settings_as_they_were(files):
    resolved = files.json({"optimizer": {"type": "Lion", "params": {"lr": "auto"}}, "bf16": {"enabled": "auto"}}).resolve()
    before = resolved.deepspeed.plain()
    first = build_engine_config(resolved, solve_run_batch(resolved, 1), hidden_size=8, whole_layer=0, device_type="cpu")
    second = build_engine_config(resolved, solve_run_batch(resolved, 1), hidden_size=8, whole_layer=0, device_type="cpu")
    assert first == second
    assert resolved.deepspeed.plain() == before


def test_the_stage_and_the_devices_in_force(files):
    assert zero_stage(files.resolve()) == 2
    resolved = files.json({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}).resolve()
    assert zero_stage(resolved) == 3
    assert (offload_device(resolved, "offload_param"), offload_device(resolved, "offload_optimizer")) == ("cpu", "none")


@pytest.mark.parametrize(
    ("config", "width"),
    [
        ({"hidden_size": 8}, 8),
        ({"n_embd": 8}, 8),
        ({"d_model": 8}, 8),
        ({"text_config": {"hidden_size": 8}}, 8),
        ({"hidden_sizes": [4, 8]}, 8),
        ({"hidden_size": "8"}, None),
        ({}, None),
    ],
)
def test_the_width_of_a_model_is_found_under_its_usual_names(config, width):
    assert hidden_size_of(config) == width


def test_the_width_is_read_from_a_local_config_only(files, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text('{"hidden_size": 48}')
    assert read_hidden_size(files.resolve("model.path=m")) == 48
    assert read_hidden_size(files.resolve("model.path=Qwen/Qwen3-0.6B")) is None
    scratch = ("model.path=null", "model.tokenizer=t")
    assert read_hidden_size(files.resolve(*scratch, "model.config=m/config.json")) == 48
    assert read_hidden_size(files.resolve(*scratch, "model.config={hidden_size: 24}")) == 24
    (tmp_path / "m" / "config.json").write_text("[")
    assert read_hidden_size(files.resolve("model.path=m")) is None
    (tmp_path / "m" / "config.json").write_text("[]")
    assert read_hidden_size(files.resolve("model.path=m")) is None
