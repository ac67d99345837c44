"""Put the parts of a run together: what is decided before the ranks meet, and the engine they then build.

`train` and `debug` tell their stories with it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ds_trainer import comm, faults, loop
from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.arguments.deepspeed_keys import validate_blocks
from ds_trainer.arguments.engine_config import (
    EngineConfig,
    build_engine_config,
    hidden_size_of,
    offload_device,
    optimizer_kind,
    reason_against_whole_layers,
    solve_run_batch,
    uses_deepspeed_scheduler,
    zero_stage,
)
from ds_trainer.arguments.merge import Resolved
from ds_trainer.arguments.objective import PAIR_STAGES, numbers_of, reference_is_base, reference_kind
from ds_trainer.data.cache import head_start_of
from ds_trainer.data.loader import Windows, evaluation_batches
from ds_trainer.data.rows import TokenRows
from ds_trainer.data.sources import Report
from ds_trainer.engine import sharded_weights
from ds_trainer.engine.build import (
    build_engine,
    freeze,
    gather,
    gather_whole,
    prepare_deepspeed,
    require_precision,
    sharded_construction,
)
from ds_trainer.engine.wrapper import Engine
from ds_trainer.errors import ArgumentsError, ModelError
from ds_trainer.launch.detect import Launch
from ds_trainer.model import attention, load, quantize
from ds_trainer.model.adapter import add_adapter, base_of, refuse_dora
from ds_trainer.model.layers import WholeLayers, expert_blocks, meta_model
from ds_trainer.model.layers import whole_layers as find_whole_layers
from ds_trainer.model.noise import add_noise
from ds_trainer.model.stack import decoder_layers
from ds_trainer.monitor.metrics import model_flops, peak_flops, uncounted
from ds_trainer.monitor.recorder import Speed
from ds_trainer.objectives import dpo, kto, language_model, orpo, reference, reward, simpo
from ds_trainer.protocols import ModelBatch, Objective
from ds_trainer.run_data import RunData, length_of, plan_steps, prepare_run_data, read_windows, samples_of_micro_batch
from ds_trainer.state import TrainState, demand_determinism


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepared:
    """Everything that is decided before the ranks meet."""

    resolved: Resolved
    launch: Launch
    device: torch.device
    batch: BatchPlan
    engine_config: EngineConfig
    model_config: Any
    data: RunData
    attention: str
    whole_layers: WholeLayers
    """Which decoder layers ZeRO-3 gathers whole; none at the other stages."""
    plan: loop.Plan


def prepare(resolved: Resolved, launch: Launch, report: Report, *, batch: BatchPlan | None = None) -> Prepared:
    """Do everything that needs no other rank: check the engine's settings, load the tokenizer, tokenise the data.

    Args:
        resolved: the settings in force.
        launch: this process's place in the job.
        report: takes a line for the user.
        batch: the solved batch arithmetic, where it is not that of this launch: `debug` is one process that stands for many.
    """
    settings = resolved.settings
    batch = batch or solve_run_batch(resolved, launch.world_size)
    device = comm.device_of(launch.local_rank)
    prepare_deepspeed(device, launch.local_world_size)
    if settings.train.deterministic:
        demand_determinism()
    if problems := validate_blocks(resolved.deepspeed):
        raise ArgumentsError(problems)
    if settings.model.quantize:
        quantize.require_library()
        if zero_stage(resolved) == 3 and settings.lora and settings.lora.path:
            refuse_dora(Path(settings.lora.path))

    require_precision(settings.train.precision)
    model_config = load.load_config(settings.model)
    implementation = attention.choose_attention(settings.model.attention, model_config, device.type, settings.train.precision)
    head_start = head_start_of(launch.rank, launch.local_rank)
    data = prepare_run_data(resolved, batch, model_config, report, head_start=head_start)
    whole_layers = decide_whole_layers(resolved, model_config)
    config = build_engine_config(
        resolved,
        batch,
        hidden_size=hidden_size_of(model_config.to_dict()),
        whole_layer=whole_layers.numel,
        device_type=device.type,
    )
    if autos := [name for name, value in config.config["zero_optimization"].items() if value == "auto"]:
        raise ModelError(
            f'DeepSpeed\'s {", ".join(autos)} are "auto", which is computed from hidden_size, and a {model_config.model_type} '
            f"config has none. Write numbers, for example deepspeed.zero_optimization.{autos[0]}=16777216."
        )
    prepared = Prepared(
        resolved=resolved,
        launch=launch,
        device=device,
        batch=batch,
        engine_config=config,
        model_config=model_config,
        data=data,
        attention=implementation,
        whole_layers=whole_layers,
        plan=plan_steps(resolved, data.rows, batch),
    )
    for line in summary(prepared):
        report(line)
    return prepared


def decide_whole_layers(resolved: Resolved, model_config: Any) -> WholeLayers:
    """Which decoder layers ZeRO-3 gathers whole. The model is built without memory for its weights to find out."""
    settings = resolved.settings
    if zero_stage(resolved) != 3:
        return WholeLayers(indices=(), numel=0, why="")
    zero = resolved.deepspeed.find("zero_optimization")
    if zero is not None and (reason := reason_against_whole_layers(zero.plain())) is not None:
        return WholeLayers(indices=(), numel=0, why=reason)
    return find_whole_layers(
        meta_model(
            model_config,
            precision=settings.train.precision,
            attention="eager",
            trust_remote_code=settings.model.trust_remote_code,
            gradient_checkpointing=False,
            adapter=settings.adapter,
            value_head=settings.train.stage == "reward",
            quantized=settings.model.quantize is not None,
        )
    )


def optimizer_name(prepared: Prepared) -> str:
    """Which optimizer moves the weights: an implementation of AdamW, or what the DeepSpeed JSON names."""
    kind = optimizer_kind(prepared.resolved, prepared.device.type)
    written = prepared.resolved.deepspeed.find("optimizer.type")
    return kind if kind != "deepspeed" or written is None else str(written.value)


def summary(prepared: Prepared) -> list[str]:
    """What is about to run, in a few lines."""
    settings, plan = prepared.resolved.settings, prepared.plan
    offload = {what: offload_device(prepared.resolved, what) for what in ("offload_optimizer", "offload_param")}  # type: ignore[arg-type]
    kept = "".join(f", {what.removeprefix('offload_')} on {device}" for what, device in offload.items() if device != "none")
    lines = [
        f"engine: ZeRO-{zero_stage(prepared.resolved)}{kept}, {settings.train.precision}, "
        f"optimizer {optimizer_name(prepared)}, {prepared.launch.world_size} x {prepared.device.type} "
        f"started by {prepared.launch.launcher}",
        *whole_layers_line(prepared),
        f"batch: {prepared.batch}",
        f"length: {length_of(plan, prepared.data)}",
        f"attention: {prepared.attention}; rows {'packed' if settings.data.packing else 'padded'} to {settings.data.seq_len}",
    ]
    return lines


def whole_layers_line(prepared: Prepared) -> list[str]:
    """What ZeRO-3 gathers at once; nothing at the other stages."""
    if zero_stage(prepared.resolved) != 3:
        return []
    whole, total = prepared.whole_layers, prepared.model_config.get_text_config().num_hidden_layers
    if not whole.indices:
        return [f"gathering: module by module, since {whole.why}"]
    rest = f"; not the others: {whole.why}" if whole.why else ""
    return [f"gathering: {len(whole.indices)} of {total} decoder layers whole, up to {whole.numel:,} parameters at once{rest}"]


def build(prepared: Prepared, report: Report) -> Engine:
    """Build the model with its adapter and objective, and the engine around it. Collective."""
    settings, config = prepared.resolved.settings, prepared.engine_config.config
    faults.point("loading")
    attention.register_document_attention()
    with construction(prepared):
        model = adapted(prepared, complete(prepared, construct(prepared, report)))
    if blocks := gather_experts(prepared, model):
        report(f"gathering: {blocks} mixtures of experts whole")
    elif prepared.whole_layers.indices:
        found = decoder_layers(base_of(model))
        assert found is not None  # the model without weights has them
        gather_whole([found[2][index] for index in prepared.whole_layers.indices])
    if settings.train.neftune_alpha is not None:
        add_noise(base_of(model), settings.train.neftune_alpha)
    loss = attach(prepared, base_of(model))
    total, trained, packed = parameter_counts(model)
    in_4_bits = f", {packed / total:.0%} held in 4 bits" if packed else ""
    report(f"model: {prepared.model_config.model_type}, {total:,} parameters, {trained:,} of them trained{in_4_bits}; {loss}")
    before = states_of_probe(prepared, model.to(prepared.device).eval()) if packed else None
    engine = build_engine(
        model,
        objective=objective_of(prepared, report),
        config=config,
        optimizer_kind=optimizer_kind(prepared.resolved, prepared.device.type),
        own_schedule=not uses_deepspeed_scheduler(prepared.resolved),
        train=settings.train,
        lora_plus=settings.lora.learning_rate_ratio if settings.lora else 1.0,
        max_steps=prepared.plan.max_steps,
        report=report,
    )
    engine.train_mode(False)
    if settings.data.packing or settings.train.stage in PAIR_STAGES:  # a row holds several documents
        attention.probe_isolation(
            partial(language_model.last_states, engine.forward),
            prepared.attention,
            prepared.model_config.get_text_config().vocab_size,
            prepared.device,
        )
    if before is not None:
        require_unchanged(before, [states_of_probe(prepared, engine.forward) for _ in range(2)])
    engine.train_mode(True)
    return engine


def states_of_probe(prepared: Prepared, model: Callable[..., Any]) -> torch.Tensor:
    """What a model in evaluation mode makes of a few tokens. Collective under ZeRO-3."""
    batch = attention.probe(prepared.model_config.get_text_config().vocab_size, prepared.attention, 16)
    return language_model.last_states(model, batch.to(prepared.device))


def require_unchanged(before: torch.Tensor, states: list[torch.Tensor]) -> None:
    """Refuse weights in 4 bits that the engine computes with in another way than the model did before it was handed over.

    Raises:
        ModelError: with how far it is off, in the first forward pass or in a second one, which finds what the first left.
    """
    for each in states:
        difference, tolerance = attention.difference_of(each, before)
        if not difference <= tolerance:
            raise ModelError(
                f"model.quantize: handed to DeepSpeed, the weights in 4 bits compute something else than before (states change "
                f"by {difference:.1e} of their norm; allowed {tolerance:.0e}). Use --deepspeed ds_configs/zero2.json, "
                "or remove model.quantize."
            )


def built_in_shards(prepared: Prepared) -> bool:
    """Whether each weight is sharded the moment it is made. What is held in 4 bits is whole until the engine is built."""
    return zero_stage(prepared.resolved) == 3 and prepared.resolved.settings.model.quantize is None


def construction(prepared: Prepared) -> AbstractContextManager[None]:
    """What a model is built in. Collective under ZeRO-3."""
    return sharded_construction(prepared.engine_config.config) if built_in_shards(prepared) else nullcontext()


def gather_experts(prepared: Prepared, model: torch.nn.Module) -> int:
    """Have ZeRO-3 gather mixtures of experts whole where ranks would wait for one another; returns how many."""
    blocks = expert_blocks(
        base_of(model),
        sharded=zero_stage(prepared.resolved) == 3,
        ranks=prepared.launch.world_size,
        all_trained=prepared.resolved.settings.adapter is None,
    )
    gather_whole(blocks, check=False)
    return len(blocks)


def complete(prepared: Prepared, model: torch.nn.Module) -> torch.nn.Module:
    """What a constructed model lacks before an adapter: a grown vocabulary, what padding is. Collective under ZeRO-3."""
    settings, tokenizer = prepared.resolved.settings, prepared.data.tokenizer
    load.finish_model(
        model,
        tokens=len(tokenizer),
        resize=settings.model.resize_vocabulary,
        gradient_checkpointing=settings.model.gradient_checkpointing,
        seed=settings.train.seed,
        offload_activations=settings.model.offload_activations,
    )
    if settings.train.stage == "reward":
        load.mark_padding(model, tokenizer.pad_token_id)
    return model


def adapted(prepared: Prepared, model: torch.nn.Module) -> torch.nn.Module:
    """A complete model with its adapter, where the run has one. Collective under ZeRO-3."""
    settings = prepared.resolved.settings
    if settings.adapter is None:
        return model
    sharded = built_in_shards(prepared)
    value_head = settings.train.stage == "reward"
    built: torch.nn.Module = add_adapter(
        model, settings.adapter, settings.train.seed, gather if sharded else None, value_head=value_head
    )
    return built


def attach(prepared: Prepared, model: torch.nn.Module) -> str:
    """Make the model's forward compute what its objective needs; returns what that is, for the log."""
    settings = prepared.resolved.settings
    if settings.train.stage == "reward":
        return reward.attach(model)
    return language_model.attach(
        model,
        chunked=settings.model.chunked_loss,
        router=numbers_of(settings).get("router_weight") is not None,
    )


def objective_of(prepared: Prepared, report: Report) -> Objective:
    """What the stage minimises. Collective where it needs a reference that is a model of its own."""
    settings = prepared.resolved.settings
    stage, numbers = settings.train.stage, numbers_of(settings)
    numbers.pop("reference", None)
    if any(value is not None for value in numbers.values()):
        report(f"objective: {stage}, {', '.join(f'{name} {value}' for name, value in numbers.items())}")
    if stage == "dpo":
        return dpo.objective(reference_of(prepared, report), **numbers)
    if stage == "kto":
        return kto.objective(reference_of(prepared, report), **numbers)
    if stage == "orpo":
        return orpo.objective(**numbers)
    if stage == "simpo":
        return simpo.objective(**numbers)
    if stage == "reward":
        return reward.BRADLEY_TERRY
    weight = numbers["router_weight"]
    return language_model.NEXT_TOKEN if weight is None else language_model.balanced(weight)


def reference_of(prepared: Prepared, report: Report) -> reference.Reference:
    """The model before the run: the base of a new adapter, or a frozen copy. Collective where it is a copy."""
    adapter = prepared.resolved.settings.adapter
    if reference_kind(prepared.resolved.settings) == "precomputed":
        return reference.precomputed
    if reference_is_base(adapter):
        report("reference: the base, which is the model with the adapter switched off; nothing is held twice")
        return reference.adapter_off
    config = prepared.engine_config.config
    with construction(prepared):
        model = complete(prepared, construct(prepared, report))
        if adapter and adapter.lora and adapter.lora.path:  # it was there before the run
            model = adapted(prepared, model)
    if config["zero_optimization"]["stage"] == 3:
        gather_experts(prepared, model)
    attach(prepared, base_of(model))
    where = "sharded as the model is" if config["zero_optimization"]["stage"] == 3 else "whole on every rank"
    told = "a frozen copy of the model as it was before the run"
    report(f"reference: {told}, {where}; with a new adapter it would take no memory")
    return reference.copy(freeze(model, config, prepared.device))


def parameter_counts(model: torch.nn.Module) -> tuple[int, int, int]:
    """The model's parameters, those that are trained, and those held in 4 bits; over all ranks where they are sharded."""
    counts = [(quantize.numel(each), each.requires_grad, quantize.is_held_in_4_bits(each)) for each in model.parameters()]
    return (
        sum(count for count, _, _ in counts),
        sum(count for count, trained, _ in counts if trained),
        sum(count for count, _, packed in counts if packed),
    )


def speed_of(prepared: Prepared, engine: Engine, report: Report) -> Speed:
    """What the run's use of the devices is measured against; what of it cannot be known is said where there is a GPU."""
    settings, device = prepared.resolved.settings, prepared.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    peak, source = settings.monitor.peak_tflops and settings.monitor.peak_tflops * 1e12, "monitor.peak_tflops"
    if peak is None and device.type == "cuda" and settings.train.precision != "fp32":
        peak, source = peak_flops(name), f"the peak of one {name} in {settings.train.precision}"
    wanted = peak or device.type == "cuda"
    if other := uncounted(prepared.model_config, settings.data.seq_len):
        if wanted:
            report(f"MFU: not shown, for this model has {other}, whose operations are not counted")
        return Speed()
    if peak:
        report(f"MFU: of {peak / 1e12:g} TFLOP/s, {source}")
    elif wanted:
        report(f"MFU: not shown, for the peak of a {name} in {settings.train.precision} is not known; set monitor.peak_tflops")
    named = engine.model.named_parameters()
    weights = ((name, quantize.numel(each), each.requires_grad) for name, each in named)
    return Speed(model_flops(weights, prepared.model_config), peak)


def construct(prepared: Prepared, report: Report) -> torch.nn.Module:
    """The model with its initial or pretrained weights; sharded under ZeRO-3. Collective there."""
    settings, sharded = prepared.resolved.settings, built_in_shards(prepared)
    precision, value_head = settings.train.precision, settings.train.stage == "reward"
    new_head = partial(load.initialize_value_head, seed=settings.train.seed, gather=gather if sharded else None)
    empty = partial(
        load.build_model,
        prepared.model_config,
        precision=precision,
        attention=prepared.attention,
        trust_remote_code=settings.model.trust_remote_code,
        value_head=value_head,
    )
    if settings.model.path is None:
        model = empty()
        load.initialize_weights(model, settings.train.seed, gather if sharded else None)
        return model
    if sharded:
        model = empty()
        files = load.weight_files(settings.model.path)
        new = load.VALUE_HEAD if value_head else None
        reason = sharded_weights.reason_against(model, files, prepared.engine_config.config, new)
        if reason is None:
            if sharded_weights.load_sharded(model, files, comm.rank()) == {new}:
                new_head(model)
            return model
        report(f"weights: read whole by rank zero, since {reason}")
    return load.load_pretrained(
        settings.model,
        prepared.model_config,
        precision=precision,
        attention=prepared.attention,
        new_head=new_head if value_head else None,
    )


def arranged_windows(prepared: Prepared, engine: Engine, state: TrainState, report: Report) -> Windows[ModelBatch]:
    """The micro-batches of one optimizer step after the other, laid out for the model, on the CPU."""
    pin = engine.device.type == "cuda"
    convert = partial(attention.arrange, implementation=prepared.attention, pin=pin)
    return read_windows(
        prepared.resolved,
        prepared.data,
        prepared.batch,
        prepared.plan,
        state,
        convert,
        rank=comm.rank(),
        data_parallel_size=engine.data_parallel_size,
        report=report,
    )


def samples_fed(prepared: Prepared, engine: Engine) -> Callable[[int, int], list[str]]:
    """A function (rows consumed before a step, micro-batch) -> the samples this rank feeds there, as path:line."""
    return partial(
        samples_of_micro_batch,
        data=prepared.data,
        batch=prepared.batch,
        plan=prepared.plan,
        rank=comm.rank(),
        data_parallel_size=engine.data_parallel_size,
    )


def evaluate_rows(prepared: Prepared, engine: Engine, rows: TokenRows, max_rows: int) -> loop.Evaluation:
    """The loss of the first rows. Collective."""
    batches = evaluation_batches(
        rows,
        micro_batch_size=prepared.batch.micro_batch_size,
        rank=comm.rank(),
        data_parallel_size=engine.data_parallel_size,
        max_rows=max_rows,
    )
    return loop.evaluate(engine, (attention.arrange(batch, prepared.attention) for batch in batches))
