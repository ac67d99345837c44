"""Rules between settings that types cannot tell: a table, one row a rule, each with its source.

DeepSpeed finds some of these late, in the middle of building the engine, and some never: it then does something else than
what was written. A row names the setting whose line is shown, when the rule is broken, and what to say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ds_trainer.arguments.deepspeed_keys import OPTIMIZER_PARAMS, SCHEDULER_PARAMS, SCHEDULES, show
from ds_trainer.arguments.objective import NUMBERS, PAIR_STAGES, goal_of, metrics_of, numbers_of
from ds_trainer.arguments.schema import ObjectiveSection, RunSettings, Source
from ds_trainer.arguments.sources import DEFAULT, Located
from ds_trainer.errors import Problem

DEFAULT_STAGE = 2
ADAPTER_SHAPE = ("rank", "alpha", "target_modules", "init", "rslora", "dora", "modules_to_save")
"""Settings of `adapter.lora` that an existing adapter answers itself."""
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
"""What each precision holds the weights in, by torch's names."""


@dataclass(frozen=True, slots=True)
class View:
    """What a rule looks at: the merged trees as written, and the settings in force."""

    settings: RunSettings
    run: Located
    """The run file with the command line applied: only what somebody wrote."""
    deepspeed: Located
    """The DeepSpeed keys: only what somebody wrote."""

    def ds(self, path: str, default: Any = None) -> Any:
        """The plain value of a DeepSpeed key, or the default."""
        node = self.deepspeed.find(path)
        return default if node is None else node.plain()

    @property
    def stage(self) -> Any:
        """The ZeRO stage in force."""
        return self.ds("zero_optimization.stage", DEFAULT_STAGE)

    @property
    def schedule_block(self) -> str | None:
        """The schedule that DeepSpeed builds from a block `scheduler`, or None when it is ours."""
        kind = self.ds("scheduler.type")
        return None if kind is None else str(kind)

    def has(self, path: str) -> bool:
        """Whether somebody wrote this setting; `deepspeed.` in front means a DeepSpeed key."""
        node = self.find(path)
        return node is not None and node.value is not None

    def find(self, path: str) -> Located | None:
        """The node of a setting, in the language its name belongs to."""
        if path.startswith("deepspeed."):
            return self.deepspeed.find(path.removeprefix("deepspeed."))
        return self.run.find(path)


@dataclass(frozen=True, slots=True)
class Constraint:
    """One rule."""

    name: str
    at: str
    """The setting whose line the message shows."""
    broken: Callable[[View], bool]
    say: str
    source: str


_ZERO = "deepspeed.zero_optimization"
NOT_AT_STAGE_3 = (
    "round_robin_gradients",
    "ignore_unused_parameters",
    "allgather_bucket_size",
    "allgather_partitions",
    "use_multi_rank_bucket_allreduce",
    "parameter_alignment",
)
"""Keys of `zero_optimization` that stages 1 and 2 alone take."""
_TOTAL_STEPS = "deepspeed.scheduler.params.total_num_steps"
_DS_SOURCE = "DeepSpeed 0.19.8"


def _device(view: View, what: str) -> Any:
    return view.ds(f"zero_optimization.{what}.device") or "none"


def _optimizer_type(view: View) -> str:
    return str(view.ds("optimizer.type", "")).lower()


def _only_stage_3() -> Iterable[Constraint]:
    keys = (
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "sub_group_size",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_gradients",
        "zero_quantized_nontrainable_weights",
        "leaf_module",
        "save_muon_momentum_buffer_in_memory",
        "enable_sanity_checks",
        "log_trace_cache_warnings",
        "override_module_apply",
        "memory_efficient_linear",
        "offload_optimizer.super_offload",
        "offload_optimizer.cpuadam_cores_perc",
    )
    # DeepSpeed takes a key that begins with stage3_ without that beginning too.
    for key in (*keys, *(key.removeprefix("stage3_") for key in keys if key.startswith("stage3_"))):
        path = f"{_ZERO}.{key}"
        yield Constraint(
            f"{key}_needs_stage_3",
            path,
            lambda v, path=path: v.has(path) and v.stage in (0, 1, 2),  # type: ignore[misc]
            f"`{key}` has an effect at ZeRO stage 3 only, and the stage is {{zero_stage}}. Remove it, or set "
            "zero_optimization.stage to 3.",
            f"{_DS_SOURCE} runtime/engine.py hands it to stage 3 only",
        )


def _objective() -> Iterable[Constraint]:
    for field in ObjectiveSection.model_fields:
        takers = [stage for stage, numbers in NUMBERS.items() if field in numbers]
        yield Constraint(
            f"{field}_is_of_the_objective",
            f"objective.{field}",
            lambda v, field=field: v.has(f"objective.{field}") and field not in NUMBERS[v.settings.train.stage],  # type: ignore[misc]
            f"objective.{field} is a number of train.stage = {' and '.join(takers)}, and train.stage = {{stage}} would not "
            "read it. Remove it.",
            "objectives/",
        )


FORMATS_OF = {
    "pretrain": ("text", "tokens"),
    "sft": ("messages", "sharegpt", "prompt_response", "alpaca"),
    "kto": ("kto",),
    **dict.fromkeys(("reward", "dpo", "orpo", "simpo"), ("preference",)),
}
"""Stage -> the formats of records that it trains on."""


def _held_out(settings: RunSettings) -> list[Source]:
    return [each for sources in settings.evaluate.held_out.values() for each in sources] if settings.evaluate else []


def _misfits(settings: RunSettings, sources: Iterable[Source]) -> list[str]:
    """The formats that sources state and the stage does not train on."""
    return sorted({each.format for each in sources} - {"auto", *FORMATS_OF[settings.train.stage]})


def _training(settings: RunSettings) -> list[Source]:
    return settings.data.sources


def _formats_fit() -> Iterable[Constraint]:
    for at, sources_of in (("data.sources", _training), ("evaluate", _held_out)):
        yield Constraint(
            f"formats_of_{at.partition('.')[0]}_fit_the_stage",
            at,
            lambda v, sources_of=sources_of: bool(_misfits(v.settings, sources_of(v.settings))),  # type: ignore[misc]
            "a source has the format {misfits}, and train.stage = {stage} trains on {formats}. Change one of them.",
            "data/formats.py",
        )


def _asks_for_the_best(view: View) -> bool:
    settings = view.settings
    return settings.checkpoint.keep_best > 0 or (settings.evaluate is not None and settings.evaluate.patience is not None)


def _on_pairs(view: View) -> bool:
    return view.settings.train.stage in PAIR_STAGES


CONSTRAINTS: tuple[Constraint, ...] = (
    # The objective.
    *_objective(),
    Constraint(
        "label_smoothing_has_two_sides",
        "objective.label_smoothing",
        lambda v: numbers_of(v.settings).get("label_smoothing", 0) > 0 and numbers_of(v.settings)["loss"] in ("hinge", "ipo"),
        "objective.label_smoothing has a meaning for the losses sigmoid and robust only. Remove it, or change objective.loss.",
        "objectives/dpo.py",
    ),
    Constraint(
        "robust_needs_label_smoothing",
        "objective.loss",
        lambda v: numbers_of(v.settings).get("loss") == "robust" and numbers_of(v.settings)["label_smoothing"] == 0,
        "objective.loss = robust without label_smoothing is sigmoid. Say how many preferences are expected to be wrong: "
        "objective.label_smoothing=0.1; or remove objective.loss.",
        "objectives/dpo.py",
    ),
    Constraint(
        "router_is_read_beside_the_chunked_loss",
        "objective.router_weight",
        lambda v: v.has("objective.router_weight") and not v.settings.model.chunked_loss,
        "objective.router_weight needs model.chunked_loss: true, the default.",
        "objectives/language_model.py",
    ),
    Constraint(
        "pairs_are_whole",
        "data.overlong",
        lambda v: _on_pairs(v) and v.settings.data.overlong not in (None, "drop"),
        "data.overlong cuts answers, and a cut answer is not the one that was judged: train.stage = {stage} drops a pair that "
        "is longer than a row, and counts it. Write data.overlong=drop, or raise data.seq_len.",
        "docs/design/preference.md",
    ),
    Constraint(
        "pairs_have_fixed_targets",
        "data.train_on",
        lambda v: _on_pairs(v) and v.has("data.train_on"),
        "data.train_on has no effect on train.stage = {stage}: answers are compared whole, and prompts are no targets. "
        "Remove it.",
        "docs/design/preference.md",
    ),
    Constraint(
        "pairs_are_not_streamed",
        "data.streaming",
        lambda v: _on_pairs(v) and v.settings.data.streaming,
        "data.streaming is for texts and conversations; train.stage = {stage} reads its pairs from the token cache. Remove it.",
        "docs/design/preference.md",
    ),
    Constraint(
        "a_value_head_has_an_adapter_of_its_own",
        "adapter.lora.path",
        lambda v: (
            v.settings.train.stage == "reward"
            and v.settings.adapter is not None
            and v.settings.adapter.lora is not None
            and v.settings.adapter.lora.path is not None
        ),
        "adapter.lora.path goes on with an adapter that has no value head. Merge it into its base first (ds_trainer export "
        "--merge) and give that as model.path, without adapter.lora.path.",
        "model/adapter.py",
    ),
    Constraint(
        "a_value_has_no_logits",
        "model.chunked_loss",
        lambda v: v.settings.train.stage == "reward" and v.has("model.chunked_loss"),
        "model.chunked_loss has no effect on train.stage = reward, which makes no logits. Remove it.",
        "objectives/reward.py",
    ),
    # The data.
    *_formats_fit(),
    Constraint(
        "weights_for_all_sources_or_none",
        "data.sources",
        lambda v: len({source.weight is None for source in v.settings.data.sources}) == 2,
        "some of the sources have a weight and some have none. Give every one a weight, or none: without weights each row "
        "comes once an epoch.",
        "docs/design/order-of-data.md",
    ),
    Constraint(
        "weights_need_max_steps",
        "data.sources",
        lambda v: (
            all(source.weight is not None for source in v.settings.data.sources)
            and len(v.settings.data.sources) > 1
            and v.settings.train.max_steps is None
        ),
        "sources with weights end at different times, so the run has no epochs of its own. Say how long it is with "
        "train.max_steps=1000, without train.epochs.",
        "docs/design/order-of-data.md",
    ),
    Constraint(
        "held_out_sources_have_no_weight",
        "evaluate",
        lambda v: (
            v.settings.evaluate is not None
            and any(each.weight is not None for sources in v.settings.evaluate.held_out.values() for each in sources)
        ),
        "every held-out row is evaluated once: a source of held-out data has no weight. Remove it, or use max_samples.",
        "docs/data.md",
    ),
    Constraint(
        "held_out_data_in_one_way",
        "evaluate",
        lambda v: v.settings.evaluate is not None and (v.settings.evaluate.sources is None) == (not v.settings.evaluate.sets),
        "give evaluate.sources, or several sets by name in evaluate.sets, such as evaluate.sets.code and evaluate.sets.chat, "
        "each a list like evaluate.sources.",
        "docs/evaluation.md",
    ),
    Constraint(
        "a_value_model_writes_nothing",
        "evaluate.generate",
        lambda v: (
            v.settings.evaluate is not None and v.settings.evaluate.generate is not None and v.settings.train.stage == "reward"
        ),
        "evaluate.generate lets the model write, and train.stage = reward trains one that gives a number. Remove it.",
        "objectives/reward.py",
    ),
    Constraint(
        "metric_is_measured",
        "evaluate.metric",
        lambda v: (
            v.settings.evaluate is not None
            and _asks_for_the_best(v)
            and v.settings.evaluate.metric not in metrics_of(v.settings)
        ),
        "evaluate.metric = {metric} is not measured in this run. It may be {metrics}.",
        "arguments/objective.py",
    ),
    Constraint(
        "goal_is_known",
        "evaluate.metric",
        lambda v: (
            v.settings.evaluate is not None
            and _asks_for_the_best(v)
            and v.settings.evaluate.metric in metrics_of(v.settings)
            and goal_of(v.settings) is None
        ),
        "which value of evaluate.metric = {metric} is best is not known here. Say it: evaluate.goal=lowest or highest.",
        "arguments/objective.py",
    ),
    Constraint(
        "patience_needs_evaluations",
        "evaluate.patience",
        lambda v: (
            v.settings.evaluate is not None
            and v.settings.evaluate.patience is not None
            and v.settings.evaluate.every_steps is None
        ),
        "evaluate.patience counts evaluations, and without evaluate.every_steps there is one, at the end. Say how often, for "
        "example evaluate.every_steps=100.",
        "docs/evaluation.md",
    ),
    Constraint(
        "metric_is_for_something",
        "evaluate.metric",
        lambda v: v.has("evaluate.metric") and not _asks_for_the_best(v),
        "evaluate.metric says what the best checkpoint and evaluate.patience go by, and neither is asked for. Write for "
        "example checkpoint.keep_best=1, or remove it.",
        "docs/evaluation.md",
    ),
    Constraint(
        "min_improvement_needs_patience",
        "evaluate.min_improvement",
        lambda v: v.has("evaluate.min_improvement") and v.settings.evaluate.patience is None,  # type: ignore[union-attr]
        "evaluate.min_improvement says what evaluate.patience takes for better. Set evaluate.patience, or remove it.",
        "docs/evaluation.md",
    ),
    Constraint(
        "keep_best_needs_evaluate",
        "checkpoint.keep_best",
        lambda v: v.settings.checkpoint.keep_best > 0 and v.settings.evaluate is None,
        "checkpoint.keep_best keeps the checkpoints that are best on held-out data, and nothing is evaluated. Add a section "
        "evaluate, or remove it.",
        "docs/checkpoints.md",
    ),
    Constraint(
        "keep_best_needs_saves_where_it_evaluates",
        "checkpoint.keep_best",
        lambda v: (
            v.settings.checkpoint.keep_best > 0
            and v.settings.evaluate is not None
            and (v.settings.checkpoint.every_steps or 0) % (v.settings.evaluate.every_steps or 1 << 60) != 0
        ),
        "checkpoint.keep_best compares evaluations, so every checkpoint needs one: let checkpoint.every_steps be a "
        "multiple of evaluate.every_steps.",
        "docs/checkpoints.md",
    ),
    Constraint(
        "train_on_is_for_conversations",
        "data.train_on",
        lambda v: v.has("data.train_on") and v.settings.train.stage == "pretrain",
        "data.train_on says what of a conversation is trained, and train.stage = pretrain trains on every token. Remove it.",
        "docs/data.md",
    ),
    Constraint(
        "bad_fraction_needs_skip",
        "data.max_bad_fraction",
        lambda v: v.has("data.max_bad_fraction") and v.settings.data.on_bad_record == "error",
        "data.max_bad_fraction limits what is skipped, and data.on_bad_record = error skips nothing. "
        "Write data.on_bad_record=skip, or remove it.",
        "docs/data.md",
    ),
    Constraint(
        "streaming_needs_max_steps",
        "data.streaming",
        lambda v: v.settings.data.streaming and v.settings.train.max_steps is None,
        "a stream has no length that is known beforehand. Say how long the run is: train.max_steps=1000.",
        "docs/data.md",
    ),
    Constraint(
        "streaming_needs_held_out_data",
        "data.streaming",
        lambda v: v.settings.data.streaming and v.settings.evaluate is None,
        "a stream is not read twice, and every checkpoint is proved on the same few rows. Give held-out data: "
        "evaluate.sources, a file of a few hundred records is enough.",
        "docs/data.md",
    ),
    Constraint(
        "streaming_buffer_needs_streaming",
        "data.streaming_buffer",
        lambda v: v.has("data.streaming_buffer") and not v.settings.data.streaming,
        "data.streaming_buffer has an effect with data.streaming only: otherwise all the data is shuffled. Remove it.",
        "docs/data.md",
    ),
    # The model and the adapter.
    Constraint(
        "model_path_or_config",
        "model",
        lambda v: (v.settings.model.path is None) == (v.settings.model.config is None),
        "give exactly one of model.path (a pretrained model) and model.config (from scratch), "
        "for example `path: Qwen/Qwen3-0.6B`.",
        "there is one set of initial weights",
    ),
    Constraint(
        "scratch_needs_tokenizer",
        "model.config",
        lambda v: v.settings.model.config is not None and v.settings.model.tokenizer is None,
        "a model from scratch has no tokenizer of its own. Add model.tokenizer: FOLDER_OR_HUB_ID.",
        "a config names no tokenizer",
    ),
    Constraint(
        "adapter_needs_pretrained",
        "adapter",
        lambda v: v.settings.adapter is not None and v.settings.model.config is not None,
        "an adapter on a base of random weights that is never trained cannot learn. "
        "Set model.path, or remove the section `adapter`.",
        "the base stays frozen",
    ),
    Constraint(
        "one_adapter",
        "adapter",
        lambda v: (
            v.settings.adapter is not None
            and sum(getattr(v.settings.adapter, name) is not None for name in type(v.settings.adapter).model_fields) != 1
        ),
        "give one of lora, ia3, vera, oft and freeze, for example adapter.lora.rank=16 or adapter.freeze.last_layers=4. On the "
        "command line adapter.lora=null (and so on) takes away what the run file says, and adapter=null trains "
        "all weights.",
        "one answer to what is trained",
    ),
    Constraint(
        "freeze_trains_something",
        "adapter.freeze",
        lambda v: (
            v.settings.adapter is not None
            and v.settings.adapter.freeze is not None
            and v.settings.adapter.freeze.last_layers is None
            and not v.settings.adapter.freeze.train
        ),
        "nothing would be trained. Write for example adapter.freeze.last_layers=4, or patterns in adapter.freeze.train.",
        "docs/adapters.md",
    ),
    Constraint(
        "adapter_path_says_its_shape",
        "adapter.lora.path",
        lambda v: v.has("adapter.lora.path") and any(v.has(f"adapter.lora.{name}") for name in ADAPTER_SHAPE),
        "the adapter at adapter.lora.path has its own adapter_config.json, which says its rank, alpha, targets and variant. "
        "Remove beside it {adapter_shape}; on the command line: adapter.lora=null adapter.lora.path={adapter_path}",
        "peft, PeftConfig.from_pretrained",
    ),
    Constraint(
        "init_is_not_for_dora",
        "adapter.lora.init",
        lambda v: v.settings.lora is not None and v.settings.lora.init != "zero" and v.settings.lora.dora,
        "adapter.lora.init takes a part out of the base, and adapter.lora.dora would train lengths of the whole weight. "
        "Remove one of them.",
        "model/adapter.py",
    ),
    Constraint(
        "quantized_needs_an_adapter",
        "model.quantize",
        lambda v: v.settings.model.quantize is not None and (v.settings.adapter is None or v.settings.adapter.beside is None),
        "weights in 4 bits cannot be trained themselves, only an adapter beside them. Add for example adapter.lora.rank=16 "
        "(on the command line adapter.freeze=null too, where a part of the weights is trained), or remove model.quantize.",
        "Dettmers et al. 2023, QLoRA",
    ),
    Constraint(
        "quantized_gives_no_part_away",
        "adapter.lora.init",
        lambda v: v.settings.model.quantize is not None and v.settings.lora is not None and v.settings.lora.init != "zero",
        "adapter.lora.init takes a part out of the base, which model.quantize would have to pack anew, with another error. "
        "Remove one of them.",
        "model/adapter.py, take_from_base",
    ),
    Constraint(
        "quantized_dora_is_not_sharded",
        "adapter.lora.dora",
        lambda v: (
            v.settings.model.quantize is not None and v.settings.lora is not None and v.settings.lora.dora and v.stage == 3
        ),
        "adapter.lora.dora on weights in 4 bits (model.quantize) does not train at ZeRO-3: peft puts new parameters in place "
        "of those that DeepSpeed has sharded. Use --deepspeed ds_configs/zero2.json, or remove one of the two.",
        "peft 0.21, utils/integrations.py, dequantize_module_weight",
    ),
    Constraint(
        "feedforward_modules_are_targets",
        "adapter.ia3.feedforward_modules",
        lambda v: (
            v.settings.adapter is not None
            and v.settings.adapter.ia3 is not None
            and not set(v.settings.adapter.ia3.feedforward_modules) <= set(v.settings.adapter.ia3.target_modules)
        ),
        "adapter.ia3.feedforward_modules says of which of adapter.ia3.target_modules the input is scaled, and names others. "
        "Name them in both lists.",
        "peft 0.21, IA3Config",
    ),
    Constraint(
        "rates_by_group_need_our_schedule",
        "deepspeed.scheduler",
        lambda v: (
            v.schedule_block is not None
            and (
                v.settings.train.layer_learning_rate_decay != 1.0
                or (
                    (v.settings.adapter is not None and v.settings.adapter.lora is not None)
                    and v.settings.adapter.lora.learning_rate_ratio != 1.0
                )
            )
        ),
        "DeepSpeed's schedules give every weight the same learning rate, and train.layer_learning_rate_decay or "
        "adapter.lora.learning_rate_ratio asks for several. Remove the block `scheduler` and use train.schedule.",
        f"{_DS_SOURCE} lr_schedules.py, update_lr",
    ),
    Constraint(
        "dtype_agrees_with_precision",
        "model.dtype",
        lambda v: v.settings.model.dtype is not None and v.settings.model.dtype != DTYPES[v.settings.train.precision],
        "model.dtype = {dtype} contradicts train.precision = {precision}, which holds the weights in {precision_dtype}. "
        "Remove model.dtype.",
        f"{_DS_SOURCE} casts the module to the precision's type",
    ),
    Constraint(
        "flash_needs_half",
        "model.attention",
        lambda v: v.settings.model.attention.startswith("flash") and v.settings.train.precision == "fp32",
        "flash attention computes in bf16 or fp16 only. Set train.precision: bf16, or model.attention: auto.",
        "flash-attn README",
    ),
    # How long and how fast.
    Constraint(
        "steps_or_epochs",
        "train.epochs",
        lambda v: v.settings.train.max_steps is not None and v.settings.train.epochs is not None,
        "train.max_steps = {max_steps} and train.epochs = {epochs} both say how long to train. Remove one of them.",
        "two lengths cannot both hold",
    ),
    Constraint(
        "min_learning_rate_below_peak",
        "train.min_learning_rate",
        lambda v: v.settings.train.min_learning_rate > v.settings.train.learning_rate,
        "train.min_learning_rate = {min_learning_rate} is above train.learning_rate = {learning_rate}.",
        "the schedule falls",
    ),
    Constraint(
        "constant_has_no_minimum",
        "train.min_learning_rate",
        lambda v: v.settings.train.min_learning_rate > 0 and v.settings.train.schedule == "constant",
        "train.min_learning_rate has no effect with schedule: constant. Remove it, or use linear or cosine.",
        "a constant schedule never falls",
    ),
    Constraint(
        "warmup_fits",
        "train.warmup_steps",
        lambda v: v.settings.train.max_steps is not None and v.settings.train.warmup_steps >= v.settings.train.max_steps,
        "train.warmup_steps = {warmup_steps} leaves no step after the warm-up of a run of {max_steps} steps.",
        "the peak would never be reached",
    ),
    Constraint(
        "max_steps_for_total_num_steps",
        "deepspeed.scheduler",
        lambda v: (
            v.settings.train.max_steps is None
            and ("total_num_steps" in SCHEDULER_PARAMS.get(str(v.schedule_block), ()) or v.has(_TOTAL_STEPS))
        ),
        "scheduler.type = {schedule_block} needs the number of steps, and the run is measured in epochs. Set train.max_steps, "
        "or remove the block `scheduler`: train.schedule needs no number of steps.",
        f"{_DS_SOURCE} runtime/lr_schedules.py needs the number before the data is known",
    ),
    Constraint(
        "hangs_are_named_before_collectives_end",
        "train.collective_timeout_seconds",
        lambda v: v.settings.train.collective_timeout_seconds <= v.settings.train.hang_timeout_seconds,
        "train.collective_timeout_seconds = {collective_timeout_seconds} must be greater than train.hang_timeout_seconds = "
        "{hang_timeout_seconds}: a collective that ends first cannot say which rank it waited for. Raise it, or lower "
        "train.hang_timeout_seconds.",
        "monitor/watchdog.py",
    ),
    # ZeRO and offload.
    Constraint(
        "stage_is_named",
        _ZERO,
        lambda v: v.has(_ZERO) and not v.has(f"{_ZERO}.stage"),
        'zero_optimization has no stage, and DeepSpeed would take 0. Add "stage": 2 (or 1, or 3).',
        f"{_DS_SOURCE} runtime/zero/config.py: the default is 0",
    ),
    Constraint(
        "stage_is_1_2_3",
        f"{_ZERO}.stage",
        lambda v: v.stage not in (1, 2, 3) or isinstance(v.stage, bool),
        "zero_optimization.stage = {zero_stage}; it must be 1, 2 or 3 (stage 1 computes what stage 0 does, in less memory).",
        "architecture: ZeRO 1, 2, 3",
    ),
    Constraint(
        "one_precision",
        "deepspeed.fp16.enabled",
        lambda v: v.ds("bf16.enabled") is True and v.ds("fp16.enabled") is True,
        "bf16.enabled and fp16.enabled are both true. Set one of them to false.",
        f"{_DS_SOURCE} runtime/config.py raises while the engine is built",
    ),
    Constraint(
        "offload_param_needs_stage_3",
        f"{_ZERO}.offload_param",
        lambda v: _device(v, "offload_param") != "none" and v.stage in (0, 1, 2),
        "offload_param is ignored by DeepSpeed at ZeRO stage {zero_stage}: only stage 3 splits the parameters. "
        "Set zero_optimization.stage to 3, or remove the block.",
        f"{_DS_SOURCE} runtime/engine.py: read for stage 3 only",
    ),
    Constraint(
        "nvme_optimizer_needs_stage_3",
        f"{_ZERO}.offload_optimizer.device",
        lambda v: _device(v, "offload_optimizer") == "nvme" and v.stage in (0, 1, 2),
        "offload_optimizer to nvme acts like cpu at ZeRO stage {zero_stage}. Write cpu, or set zero_optimization.stage to 3.",
        f"{_DS_SOURCE} runtime/zero/stage_1_and_2.py: any device but none means cpu",
    ),
    *(
        Constraint(
            f"nvme_path_for_{what}",
            f"{_ZERO}.{what}.device",
            lambda v, what=what: _device(v, what) == "nvme" and not v.ds(f"zero_optimization.{what}.nvme_path"),  # type: ignore[misc]
            f'{what} is on nvme without a path. Add "nvme_path": "/local_nvme", a folder on a local disk.',
            f"{_DS_SOURCE} runtime/swap_tensor/partitioned_param_swapper.py: TypeError on a path of None",
        )
        for what in ("offload_optimizer", "offload_param")
    ),
    *_only_stage_3(),
    *(
        Constraint(
            f"{key}_below_stage_3",
            f"{_ZERO}.{key}",
            lambda v, key=key: v.has(f"{_ZERO}.{key}") and v.stage == 3,  # type: ignore[misc]
            f"`{key}` is ignored at ZeRO stage 3. Remove it.",
            f"{_DS_SOURCE} runtime/engine.py hands it to stages 1 and 2 only",
        )
        for key in NOT_AT_STAGE_3
    ),
    Constraint(
        "partial_offload_needs_stage_3",
        f"{_ZERO}.offload_optimizer.ratio",
        lambda v: (
            isinstance(v.ds("zero_optimization.offload_optimizer.ratio"), (int, float))
            and v.ds("zero_optimization.offload_optimizer.ratio") < 1
            and v.stage in (0, 1, 2)
        ),
        "offload_optimizer.ratio below 1 works at ZeRO stage 3 only, and the stage is {zero_stage}. Remove it.",
        f"{_DS_SOURCE} runtime/engine.py asserts it",
    ),
    Constraint(
        "no_elastic_checkpoint",
        f"{_ZERO}.elastic_checkpoint",
        lambda v: v.ds("zero_optimization.elastic_checkpoint") is True,
        "elastic_checkpoint does not make a checkpoint loadable by another number of ranks. Remove it.",
        f"{_DS_SOURCE}: loading at another size raises the same error with and without it",
    ),
    Constraint(
        "bf16_states_need_bf16_masters",
        "deepspeed.bf16.bf16_optimizer_states",
        lambda v: v.ds("bf16.bf16_optimizer_states") is True and v.ds("bf16.bf16_master_weights_and_grads") is not True,
        "bf16_optimizer_states needs bf16_master_weights_and_grads: true beside it.",
        f"{_DS_SOURCE} runtime/precision_config.py",
    ),
    Constraint(
        "bf16_masters_need_a_place",
        "deepspeed.bf16.bf16_master_weights_and_grads",
        lambda v: (
            v.ds("bf16.bf16_master_weights_and_grads") is True
            and (
                v.ds("optimizer.params.torch_adam") is True
                if v.ds("zero_optimization.offload_optimizer.device") == "cpu"
                else v.ds("bf16.bf16_optimizer_states") is not True
            )
        ),
        "bf16_master_weights_and_grads works in two ways: with bf16_optimizer_states: true and everything on the GPU; or with "
        "zero_optimization.offload_optimizer.device: cpu and DeepSpeed's CPUAdam, so without torch_adam. Write one of them.",
        f"{_DS_SOURCE} runtime/base_optimizer.py, _configure_master_weights",
    ),
    # What the exact loss and the update rely on.
    Constraint(
        "mean_allreduce",
        "deepspeed.gradient_allreduce_op",
        lambda v: v.has("deepspeed.gradient_allreduce_op") and v.ds("gradient_allreduce_op") != "mean",
        "gradient_allreduce_op must be mean: the loss of a step is scaled for it. Remove the key.",
        "docs/design/exact-loss.md",
    ),
    Constraint(
        "no_prescale",
        "deepspeed.prescale_gradients",
        lambda v: v.ds("prescale_gradients") is True,
        "prescale_gradients must be false: the loss of a step is scaled for a plain mean over the ranks. Remove the key.",
        f"{_DS_SOURCE} runtime/zero/stage3.py and stage_1_and_2.py assert it where gradients are reduced by scattering",
    ),
    Constraint(
        "no_predivide",
        "deepspeed.gradient_predivide_factor",
        lambda v: v.ds("gradient_predivide_factor", 1) != 1,
        "gradient_predivide_factor must be 1: the loss of a step is scaled for a plain mean over the ranks. Remove the key.",
        f"{_DS_SOURCE} runtime/zero/stage3.py and stage_1_and_2.py assert it where gradients are reduced by scattering",
    ),
    Constraint(
        "grad_norm_is_computed",
        f"{_ZERO}.compute_grad_norm",
        lambda v: v.ds("zero_optimization.compute_grad_norm") is False,
        "compute_grad_norm: false leaves nothing to clip and nothing to log. Remove the key.",
        f"{_DS_SOURCE} runtime/zero/stage_1_and_2.py raises beside gradient_clipping; at stage 3 always",
    ),
    Constraint(
        "bf16_overflow_is_checked",
        "deepspeed.bf16.check_grad_overflow",
        lambda v: v.ds("bf16.check_grad_overflow") is False,
        "bf16.check_grad_overflow: false lets gradients that are not finite into the weights. Remove the key.",
        f"{_DS_SOURCE} runtime/zero/stage_1_and_2.py step",
    ),
    *(
        Constraint(
            f"{key.rpartition('.')[2]}_name",
            f"deepspeed.{key}",
            lambda v, key=key: v.has(f"deepspeed.{key}") and v.ds(key) not in ("fp32", "fp16", "bf16"),  # type: ignore[misc]
            f"{key} must be fp32, fp16 or bf16.",
            source,
        )
        for key, source in (
            ("communication_data_type", f"{_DS_SOURCE} runtime/config.py get_communication_data_type"),
            ("data_types.grad_accum_dtype", f"{_DS_SOURCE} runtime/config.py DtypeEnum, when the engine is built"),
            ("data_types.buffer_dtype", f"{_DS_SOURCE} runtime/config.py DtypeEnum, when the engine is built"),
        )
    ),
    Constraint(
        "param_dtype_is_precision",
        "deepspeed.data_types.param_dtype",
        lambda v: v.has("deepspeed.data_types.param_dtype") and v.ds("data_types.param_dtype") != v.settings.train.precision,
        "data_types.param_dtype must be the precision of the run, {precision}. Remove it.",
        f"{_DS_SOURCE} runtime/engine.py asserts it",
    ),
    Constraint(
        "tag_validation_name",
        "deepspeed.checkpoint.tag_validation",
        lambda v: str(v.ds("checkpoint.tag_validation", "warn")).lower() not in ("warn", "ignore", "fail"),
        "checkpoint.tag_validation must be Warn, Ignore or Fail.",
        f"{_DS_SOURCE} runtime/config.py get_checkpoint_tag_validation_mode",
    ),
    Constraint(
        "offload_activations_kept",
        "model.offload_activations",
        lambda v: v.settings.model.offload_activations and not v.settings.model.gradient_checkpointing,
        "model.offload_activations: what goes to host memory are the inputs of layers that are computed again, and "
        "model.gradient_checkpointing computes none. Set model.gradient_checkpointing: true, or remove it.",
        "model/stack.py",
    ),
    Constraint(
        "removed_optimizer",
        "deepspeed.optimizer.type",
        lambda v: _optimizer_type(v) in ("onebitadam", "onebitlamb", "zerooneadam"),
        "1-bit optimizers were removed from DeepSpeed in 0.19.7. Use AdamW.",
        "DeepSpeed PR 8490",
    ),
    Constraint(
        "muon_stage_3",
        "deepspeed.optimizer.type",
        lambda v: _optimizer_type(v) == "muon" and v.stage == 3 and v.ds("zero_optimization.reduce_scatter") is not False,
        'Muon at ZeRO stage 3 needs "reduce_scatter": false in zero_optimization.',
        f"{_DS_SOURCE} runtime/zero/stage3.py raises",
    ),
    # What a block that DeepSpeed obeys has no place for.
    *(
        Constraint(
            f"{name}_with_another_schedule",
            f"train.{name}",
            lambda v, name=name: (  # type: ignore[misc]
                v.schedule_block is not None and v.schedule_block not in SCHEDULES and v.has(f"train.{name}")
            ),
            f"train.{name} has no effect on scheduler.type = {{schedule_block}}. Remove it, or the block `scheduler`.",
            f"{_DS_SOURCE} runtime/lr_schedules.py: it has no such parameter",
        )
        for name in ("schedule", "warmup_steps")
    ),
    Constraint(
        "min_learning_rate_with_schedule_block",
        "train.min_learning_rate",
        lambda v: v.schedule_block is not None and v.settings.train.min_learning_rate > 0,
        "train.min_learning_rate has no effect on scheduler.type = {schedule_block}. Remove it, or the block `scheduler`.",
        f"{_DS_SOURCE} runtime/lr_schedules.py: WarmupDecayLR ends at 0, WarmupCosineLR at cos_min_ratio",
    ),
    *(
        Constraint(
            f"{name}_with_another_optimizer",
            f"train.{name}",
            lambda v, name=name: (  # type: ignore[misc]
                v.has("deepspeed.optimizer.type")
                and v.has(f"train.{name}")
                and not v.has(f"deepspeed.optimizer.params.{name}")
                and name not in OPTIMIZER_PARAMS.get(_optimizer_type(v), ())
            ),
            f"train.{name} may have no effect on optimizer.type = {{optimizer}}. Remove it, or add "
            f'"{name}": "auto" to optimizer.params.',
            f"{_DS_SOURCE} runtime/engine.py hands optimizer.params on as written",
        )
        for name in ("betas", "eps", "weight_decay")
    ),
)


def check_constraints(view: View) -> list[Problem]:
    """Apply every rule; a rule that breaks on a value of a wrong type is another check's business."""
    train = view.settings.train
    words = {
        **{name: getattr(train, name) for name in type(train).model_fields},
        "dtype": view.settings.model.dtype,
        "precision_dtype": DTYPES[train.precision],
        "zero_stage": show(view.find(f"{_ZERO}.stage") or Located(DEFAULT_STAGE, DEFAULT)),
        "schedule_block": view.schedule_block,
        "optimizer": view.ds("optimizer.type"),
        "formats": " or ".join(FORMATS_OF[train.stage]),
        "misfits": " and ".join(_misfits(view.settings, [*view.settings.data.sources, *_held_out(view.settings)])),
        "metric": view.settings.evaluate and view.settings.evaluate.metric,
        "metrics": ", ".join(metrics_of(view.settings)),
        "adapter_path": view.settings.lora and view.settings.lora.path,
        "adapter_shape": ", ".join(
            f"{name} ({node.origin})"
            for name in (f"adapter.lora.{each}" for each in ADAPTER_SHAPE)
            if (node := view.find(name)) is not None and node.value is not None
        ),
    }
    problems = []
    for rule in CONSTRAINTS:
        if rule.broken(view):
            node = view.find(rule.at) or view.find(rule.at.rpartition(".")[0]) or view.run
            problems.append(Problem(where=str(node.origin), what=rule.say.format(**words)))
    return problems
