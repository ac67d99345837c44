"""Every row of CONSTRAINTS is broken by an example, at the right line, and spares a near miss."""

import json
from pathlib import Path

import pytest

from ds_trainer.arguments.constraints import CONSTRAINTS, DTYPES
from ds_trainer.arguments.merge import resolve
from ds_trainer.errors import ArgumentsError

BASE = {"model": {"path": "m"}, "data": {"sources": [{"path": "a"}], "seq_len": 8}, "train": {"stage": "sft"}}
NVME = {"device": "nvme", "nvme_path": "/nvme"}


def run(**settings):
    """Changes to the run file: dotted names with `__`."""
    return {"run": {name.replace("__", "."): value for name, value in settings.items()}, "ds": {}}


def ds(settings=None, **keys):
    """Changes to the run file, and a DeepSpeed JSON."""
    return {"run": {name.replace("__", "."): value for name, value in (settings or {}).items()}, "ds": keys}


def zero(stage, settings=None, **keys):
    return ds(settings, zero_optimization={"stage": stage, **keys})


# name of the row -> (what breaks it, the words of the line that is shown, what does not)
EXAMPLES = {
    "loss_is_of_the_objective": (
        run(objective__loss="hinge", train__stage="orpo"),
        '"loss":',
        run(objective__loss="hinge", train__stage="dpo"),
    ),
    "beta_is_of_the_objective": (run(objective__beta=0.2), '"beta":', run(objective__beta=0.2, train__stage="simpo")),
    "label_smoothing_is_of_the_objective": (
        run(objective__label_smoothing=0.2, train__stage="simpo"),
        '"label_smoothing":',
        run(objective__label_smoothing=0.2, train__stage="dpo"),
    ),
    "reference_is_of_the_objective": (
        run(objective__reference="precomputed"),
        '"reference":',
        run(objective__reference="precomputed", train__stage="kto"),
    ),
    "gamma_is_of_the_objective": (
        run(objective__gamma=0.2, train__stage="dpo"),
        '"gamma":',
        run(objective__gamma=0.2, train__stage="simpo"),
    ),
    "odds_weight_is_of_the_objective": (
        run(objective__odds_weight=0.2, train__stage="reward"),
        '"odds_weight":',
        run(objective__odds_weight=0.2, train__stage="orpo"),
    ),
    "desirable_weight_is_of_the_objective": (
        run(objective__desirable_weight=2.0, train__stage="dpo"),
        '"desirable_weight":',
        run(objective__desirable_weight=2.0, train__stage="kto"),
    ),
    "undesirable_weight_is_of_the_objective": (
        run(objective__undesirable_weight=2.0, train__stage="dpo"),
        '"undesirable_weight":',
        run(objective__undesirable_weight=2.0, train__stage="kto"),
    ),
    "label_smoothing_has_two_sides": (
        run(objective__label_smoothing=0.2, objective__loss="ipo", train__stage="dpo"),
        '"label_smoothing":',
        run(objective__label_smoothing=0.0, objective__loss="ipo", train__stage="dpo"),
    ),
    "robust_needs_label_smoothing": (
        run(objective__loss="robust", train__stage="dpo"),
        '"loss":',
        run(objective__loss="robust", objective__label_smoothing=0.2, train__stage="dpo"),
    ),
    "pairs_are_whole": (
        run(data__overlong="truncate", train__stage="dpo"),
        '"overlong":',
        run(data__overlong="drop", train__stage="dpo"),
    ),
    "pairs_have_fixed_targets": (
        run(data__train_on="assistant", train__stage="reward"),
        '"train_on":',
        run(data__train_on="assistant"),
    ),
    "pairs_are_not_streamed": (
        run(data__streaming=True, train__stage="dpo", train__max_steps=5, evaluate__sources=[{"path": "a"}]),
        '"streaming":',
        run(data__streaming=True, train__max_steps=5, evaluate__sources=[{"path": "a"}]),
    ),
    "a_value_head_has_an_adapter_of_its_own": (
        run(adapter__lora={"path": "there"}, train__stage="reward"),
        '"path": "there"',
        run(adapter__lora={"path": "there"}, train__stage="dpo"),
    ),
    "a_value_has_no_logits": (
        run(model__chunked_loss=True, train__stage="reward"),
        '"chunked_loss":',
        run(model__chunked_loss=True, train__stage="dpo"),
    ),
    "weights_for_all_sources_or_none": (
        run(data__sources=[{"path": "a", "weight": 1.0}, {"path": "b"}], train__max_steps=5),
        '"sources":',
        run(data__sources=[{"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.0}], train__max_steps=5),
    ),
    "formats_of_data_fit_the_stage": (
        run(data__sources=[{"path": "a", "format": "text"}], train__stage="dpo"),
        '"sources":',
        run(data__sources=[{"path": "a", "format": "preference"}], train__stage="dpo"),
    ),
    "formats_of_evaluate_fit_the_stage": (
        run(evaluate__sets={"a": [{"path": "a", "format": "kto"}]}),
        '"evaluate":',
        run(evaluate__sets={"a": [{"path": "a", "format": "alpaca"}]}),
    ),
    "weights_need_max_steps": (
        run(data__sources=[{"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.0}]),
        '"sources":',
        run(data__sources=[{"path": "a", "weight": 1.0}]),
    ),
    "held_out_sources_have_no_weight": (
        run(evaluate__sources=[{"path": "a", "weight": 1.0}]),
        '"evaluate":',
        run(evaluate__sources=[{"path": "a"}]),
    ),
    "held_out_data_in_one_way": (
        run(evaluate__sources=[{"path": "a"}], evaluate__sets={"b": [{"path": "b"}]}),
        '"evaluate":',
        run(evaluate__sets={"a": [{"path": "a"}], "b": [{"path": "b"}]}),
    ),
    "a_value_model_writes_nothing": (
        run(train__stage="reward", evaluate__sources=[{"path": "a"}], evaluate__generate={"prompts": "p"}),
        '"generate":',
        run(train__stage="dpo", evaluate__sources=[{"path": "a"}], evaluate__generate={"prompts": "p"}),
    ),
    "metric_is_measured": (
        run(evaluate__sets={"a": [{"path": "a"}]}, checkpoint__keep_best=1, evaluate__metric="loss"),
        '"metric":',
        run(evaluate__sets={"a": [{"path": "a"}]}, checkpoint__keep_best=1, evaluate__metric="a/loss"),
    ),
    "goal_is_known": (
        run(
            train__stage="dpo",
            evaluate__sources=[{"path": "a"}],
            evaluate__metric="rewards/chosen",
            checkpoint__keep_best=1,
        ),
        '"metric":',
        run(
            train__stage="dpo",
            evaluate__sources=[{"path": "a"}],
            evaluate__metric="rewards/chosen",
            evaluate__goal="highest",
            checkpoint__keep_best=1,
        ),
    ),
    "patience_needs_evaluations": (
        run(evaluate__sources=[{"path": "a"}], evaluate__patience=2),
        '"patience":',
        run(evaluate__sources=[{"path": "a"}], evaluate__patience=2, evaluate__every_steps=5),
    ),
    "metric_is_for_something": (
        run(evaluate__sources=[{"path": "a"}], evaluate__metric="loss"),
        '"metric":',
        run(evaluate__sources=[{"path": "a"}], evaluate__metric="loss", checkpoint__keep_best=1),
    ),
    "min_improvement_needs_patience": (
        run(evaluate__sources=[{"path": "a"}], evaluate__min_improvement=0.1),
        '"min_improvement":',
        run(evaluate__sources=[{"path": "a"}], evaluate__min_improvement=0.1, evaluate__patience=2, evaluate__every_steps=5),
    ),
    "keep_best_needs_evaluate": (
        run(checkpoint__keep_best=1),
        '"keep_best":',
        run(checkpoint__keep_best=1, evaluate__sources=[{"path": "a"}]),
    ),
    "keep_best_needs_saves_where_it_evaluates": (
        run(checkpoint__keep_best=1, checkpoint__every_steps=5, evaluate__sources=[{"path": "a"}], evaluate__every_steps=2),
        '"keep_best":',
        run(checkpoint__keep_best=1, checkpoint__every_steps=6, evaluate__sources=[{"path": "a"}], evaluate__every_steps=2),
    ),
    "offload_activations_kept": (
        run(model__offload_activations=True, model__path="m"),
        '"offload_activations":',
        run(model__offload_activations=True, model__path="m", model__gradient_checkpointing=2),
    ),
    "train_on_is_for_conversations": (
        run(data__train_on="all", train__stage="pretrain"),
        '"train_on":',
        run(data__train_on="all"),
    ),
    "bad_fraction_needs_skip": (
        run(data__max_bad_fraction=0.1),
        '"max_bad_fraction":',
        run(data__max_bad_fraction=0.1, data__on_bad_record="skip"),
    ),
    "router_weight_is_of_the_objective": (
        run(train__stage="simpo", objective__router_weight=0.01),
        '"router_weight":',
        run(train__stage="pretrain", objective__router_weight=0.01),
    ),
    "router_is_read_beside_the_chunked_loss": (
        run(objective__router_weight=0.01, model__chunked_loss=False, model__path="m"),
        '"router_weight":',
        run(objective__router_weight=0.01),
    ),
    "streaming_needs_max_steps": (
        run(data__streaming=True, evaluate__sources=[{"path": "a"}]),
        '"streaming":',
        run(data__streaming=True, evaluate__sources=[{"path": "a"}], train__max_steps=5),
    ),
    "streaming_needs_held_out_data": (
        run(data__streaming=True, train__max_steps=5),
        '"streaming":',
        run(data__streaming=True, evaluate__sources=[{"path": "a"}], train__max_steps=5),
    ),
    "streaming_buffer_needs_streaming": (
        run(data__streaming_buffer=64),
        '"streaming_buffer":',
        run(data__streaming_buffer=64, data__streaming=True, evaluate__sources=[{"path": "a"}], train__max_steps=5),
    ),
    "model_path_or_config": (run(model__config={"model_type": "llama"}, model__tokenizer="t"), '"model":', run()),
    "scratch_needs_tokenizer": (
        run(model__path=None, model__config="c.json"),
        '"config":',
        run(model__path=None, model__config="c.json", model__tokenizer="t"),
    ),
    "adapter_needs_pretrained": (
        run(model__path=None, model__config="c.json", model__tokenizer="t", adapter__lora={"rank": 4}),
        '"adapter":',
        run(adapter__lora={"rank": 4}),
    ),
    "one_adapter": (
        run(adapter__lora={"rank": 4}, adapter__freeze={"last_layers": 1}),
        '"adapter":',
        run(adapter__freeze={"last_layers": 1}),
    ),
    "freeze_trains_something": (run(adapter__freeze={"train": []}), '"freeze":', run(adapter__freeze={"train": ["*.mlp.*"]})),
    "adapter_path_says_its_shape": (
        run(adapter__lora={"path": "out/a", "rank": 4}),
        '"path": "out/a"',
        run(adapter__lora={"path": "out/a", "dropout": 0.1}),
    ),
    "init_is_not_for_dora": (
        run(adapter__lora={"init": "pissa", "dora": True}),
        '"init":',
        run(adapter__lora={"init": "pissa", "rslora": True}),
    ),
    "quantized_needs_an_adapter": (
        run(model__quantize="nf4", adapter__freeze={"last_layers": 1}),
        '"quantize":',
        run(model__quantize="nf4", adapter__vera={}),
    ),
    "quantized_gives_no_part_away": (
        run(model__quantize="nf4", adapter__lora={"init": "pissa"}),
        '"init":',
        run(model__quantize="nf4", adapter__lora={"init": "zero"}),
    ),
    "quantized_dora_is_not_sharded": (
        zero(3, {"model__quantize": "nf4", "adapter__lora": {"dora": True}}),
        '"dora":',
        zero(2, {"model__quantize": "nf4", "adapter__lora": {"dora": True}}),
    ),
    "feedforward_modules_are_targets": (
        run(adapter__ia3={"target_modules": ["k_proj"], "feedforward_modules": ["up_proj"]}),
        '"feedforward_modules":',
        run(adapter__ia3={}),
    ),
    "rates_by_group_need_our_schedule": (
        ds({"train__layer_learning_rate_decay": 0.9}, scheduler={"type": "WarmupLR"}),
        '"scheduler":',
        ds({"train__layer_learning_rate_decay": 1.0}, scheduler={"type": "WarmupLR"}),
    ),
    "dtype_agrees_with_precision": (run(model__dtype="float16"), '"dtype":', run(model__dtype="bfloat16")),
    "flash_needs_half": (
        run(model__attention="flash_attention_2", train__precision="fp32"),
        '"attention":',
        run(model__attention="flash_attention_2"),
    ),
    "steps_or_epochs": (run(train__max_steps=5, train__epochs=1), '"epochs":', run(train__epochs=1)),
    "min_learning_rate_below_peak": (
        run(train__min_learning_rate=1e-3),
        '"min_learning_rate":',
        run(train__min_learning_rate=1e-4),
    ),
    "constant_has_no_minimum": (
        run(train__min_learning_rate=1e-5, train__schedule="constant"),
        '"min_learning_rate":',
        run(train__min_learning_rate=0.0, train__schedule="constant"),
    ),
    "warmup_fits": (
        run(train__max_steps=5, train__warmup_steps=5),
        '"warmup_steps":',
        run(train__max_steps=5, train__warmup_steps=4),
    ),
    "hangs_are_named_before_collectives_end": (
        run(train__collective_timeout_seconds=600),
        '"collective_timeout_seconds":',
        run(train__collective_timeout_seconds=601),
    ),
    "bf16_overflow_is_checked": (
        ds(bf16={"check_grad_overflow": False}),
        '"check_grad_overflow":',
        ds(bf16={"check_grad_overflow": True}),
    ),
    "max_steps_for_total_num_steps": (
        ds(scheduler={"type": "WarmupDecayLR"}),
        '"scheduler":',
        ds({"train__max_steps": 5}, scheduler={"type": "WarmupDecayLR"}),
    ),
    "stage_is_named": (ds(zero_optimization={"overlap_comm": True}), '"zero_optimization":', ds()),
    "stage_is_1_2_3": (zero(0), '"stage": 0', zero(1)),
    "one_precision": (
        ds(bf16={"enabled": True}, fp16={"enabled": True, "hysteresis": 2}),
        '"enabled": true,',
        ds(bf16={"enabled": True}, fp16={"enabled": False}),
    ),
    "offload_param_needs_stage_3": (
        zero(2, offload_param={"device": "cpu"}),
        '"offload_param":',
        zero(2, offload_param={"device": "none"}),
    ),
    "nvme_optimizer_needs_stage_3": (zero(2, offload_optimizer=NVME), '"device":', zero(3, offload_optimizer=NVME)),
    "nvme_path_for_offload_optimizer": (
        zero(3, offload_optimizer={"device": "nvme"}),
        '"device":',
        zero(3, offload_optimizer=NVME),
    ),
    "nvme_path_for_offload_param": (
        zero(3, offload_param={"device": "nvme", "nvme_path": ""}),
        '"device":',
        zero(3, offload_param=NVME),
    ),
    "partial_offload_needs_stage_3": (
        zero(2, offload_optimizer={"device": "cpu", "ratio": 0.5}),
        '"ratio":',
        zero(2, offload_optimizer={"device": "cpu", "ratio": 1.0}),
    ),
    "no_elastic_checkpoint": (zero(2, elastic_checkpoint=True), '"elastic_checkpoint":', zero(2, elastic_checkpoint=False)),
    "bf16_states_need_bf16_masters": (
        ds(bf16={"enabled": True, "bf16_optimizer_states": True}),
        '"bf16_optimizer_states":',
        ds(bf16={"enabled": True, "bf16_optimizer_states": True, "bf16_master_weights_and_grads": True}),
    ),
    "bf16_masters_need_a_place": (
        ds(bf16={"enabled": True, "bf16_master_weights_and_grads": True}),
        '"bf16_master_weights_and_grads":',
        ds(
            bf16={"enabled": True, "bf16_master_weights_and_grads": True},
            zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}},
        ),
    ),
    "mean_allreduce": (ds(gradient_allreduce_op="sum"), '"gradient_allreduce_op":', ds(gradient_allreduce_op="mean")),
    "no_prescale": (ds(prescale_gradients=True), '"prescale_gradients":', ds(prescale_gradients=False)),
    "no_predivide": (ds(gradient_predivide_factor=2.0), '"gradient_predivide_factor":', ds(gradient_predivide_factor=1.0)),
    "grad_norm_is_computed": (zero(2, compute_grad_norm=False), '"compute_grad_norm":', zero(2, compute_grad_norm=True)),
    "communication_data_type_name": (
        ds(communication_data_type="float32"),
        '"communication_data_type":',
        ds(communication_data_type="fp32"),
    ),
    "grad_accum_dtype_name": (
        ds(data_types={"grad_accum_dtype": "fp64"}),
        '"grad_accum_dtype":',
        ds(data_types={"grad_accum_dtype": "fp32"}),
    ),
    "buffer_dtype_name": (ds(data_types={"buffer_dtype": "fp8"}), '"buffer_dtype":', ds(data_types={"buffer_dtype": "bf16"})),
    "param_dtype_is_precision": (
        ds({"train__precision": "bf16"}, data_types={"param_dtype": "fp16"}),
        '"param_dtype":',
        ds({"train__precision": "bf16"}, data_types={"param_dtype": "bf16"}),
    ),
    "tag_validation_name": (
        ds(checkpoint={"tag_validation": "loud"}),
        '"tag_validation":',
        ds(checkpoint={"tag_validation": "Fail"}),
    ),
    "removed_optimizer": (ds(optimizer={"type": "OneBitAdam"}), '"type":', ds(optimizer={"type": "Adam"})),
    "muon_stage_3": (
        ds(optimizer={"type": "Muon"}, zero_optimization={"stage": 3}),
        '"type":',
        ds(optimizer={"type": "Muon"}, zero_optimization={"stage": 3, "reduce_scatter": False}),
    ),
    "schedule_with_another_schedule": (
        ds({"train__schedule": "linear"}, scheduler={"type": "OneCycle"}),
        '"schedule":',
        ds(scheduler={"type": "OneCycle"}),
    ),
    "warmup_steps_with_another_schedule": (
        ds({"train__warmup_steps": 3}, scheduler={"type": "OneCycle"}),
        '"warmup_steps":',
        ds({"train__warmup_steps": 3}, scheduler={"type": "WarmupLR"}),
    ),
    "min_learning_rate_with_schedule_block": (
        ds({"train__min_learning_rate": 1e-5, "train__max_steps": 9}, scheduler={"type": "WarmupCosineLR"}),
        '"min_learning_rate":',
        ds({"train__min_learning_rate": 0, "train__max_steps": 9}, scheduler={"type": "WarmupCosineLR"}),
    ),
    **{
        f"{name}_with_another_optimizer": (
            ds({f"train__{name}": value}, optimizer={"type": "SGD", "params": {}}),
            f'"{name}":',
            ds({f"train__{name}": value}, optimizer={"type": "SGD", "params": {name: "auto"}}),
        )
        for name, value in (("betas", [0.9, 0.99]), ("eps", 1e-6), ("weight_decay", 0.1))
    },
}


def zero_key(stage, path):
    """A JSON that says 1 of a key of `zero_optimization`."""
    block, _, name = path.rpartition(".")
    return zero(stage, **({block: {"device": "cpu", name: 1}} if block else {name: 1}))


for row in CONSTRAINTS:  # the rows that are made from a list of keys
    key = row.at.removeprefix("deepspeed.zero_optimization.")
    words = f'"{key.rpartition(".")[2]}": 1'
    if row.name == f"{key}_needs_stage_3":
        EXAMPLES.setdefault(row.name, (zero_key(2, key), words, zero_key(3, key)))
    elif row.name == f"{key}_below_stage_3":
        EXAMPLES.setdefault(row.name, (zero_key(3, key), words, zero_key(2, key)))


def written(example, folder):
    """The two files of an example, as JSON with one value a line, which is YAML too."""
    tree = json.loads(json.dumps({**BASE, "checkpoint": {"folder": "o"}}))
    for path, value in example["run"].items():
        section, _, name = path.partition(".")
        tree.setdefault(section, {})[name] = value
    Path(folder, "run.yaml").write_text(json.dumps(tree, indent=1))
    Path(folder, "ds.json").write_text(json.dumps(example["ds"], indent=1))
    return Path(folder, "run.yaml"), Path(folder, "ds.json")


def test_every_row_has_an_example_a_name_of_its_own_and_a_source():
    names = [row.name for row in CONSTRAINTS]
    assert len(set(names)) == len(names)
    assert set(names) == EXAMPLES.keys(), "a row without an example, or an example without a row"
    assert all(row.source for row in CONSTRAINTS)


@pytest.mark.parametrize("row", CONSTRAINTS, ids=[row.name for row in CONSTRAINTS])
def test_a_row_is_broken_at_its_line_and_spares_a_near_miss(row, tmp_path):
    broken, words, near = EXAMPLES[row.name]
    files = written(broken, tmp_path)
    with pytest.raises(ArgumentsError) as caught:
        resolve(files[0], deepspeed=files[1])
    lines = [
        f"{file}:{number}"
        for file in files
        for number, line in enumerate(file.read_text().split("\n"), 1)
        if words in line and (file.suffix == ".json" or row.at.partition(".")[0] != "deepspeed")
    ]
    assert len(lines) == 1, f"the words {words!r} must name one line"
    [problem] = caught.value.problems
    assert problem.where == lines[0], problem
    assert "{" not in problem.what.replace('": {', "").replace('{"', ""), f"a word was not filled in: {problem.what}"
    beginning = row.say.partition("{")[0][:20]
    assert problem.what.startswith(beginning)

    files = written(near, tmp_path)
    resolve(files[0], deepspeed=files[1])


def test_messages_name_the_zero_stage_and_not_the_stage_of_training(tmp_path):
    files = written(zero(2, stage3_max_live_parameters=1), tmp_path)
    with pytest.raises(ArgumentsError, match="at ZeRO stage 3 only, and the stage is 2"):
        resolve(files[0], deepspeed=files[1])


def test_several_broken_rows_are_shown_together(tmp_path):
    example = zero(2, {"train__epochs": 1, "train__max_steps": 3}, offload_param={"device": "nvme"}, sub_group_size=3)
    files = written(example, tmp_path)
    with pytest.raises(ArgumentsError) as caught:
        resolve(files[0], deepspeed=files[1])
    assert len(caught.value.problems) == 4


def test_precisions_have_torchs_names():
    torch = pytest.importorskip("torch")
    assert all(getattr(torch, name) for name in DTYPES.values())
