"""The story of a plan: what a run will take on a cluster, and what to change where that is too much. No GPU, no weights.

Everything that is planned again (a change that is proposed, a row of the sweep) goes the way of the run itself: the run file
and the DeepSpeed JSON are merged anew with the change on top, so that what is proposed is what `train` accepts.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.arguments.engine_config import build_engine_config, hidden_size_of, optimizer_kind, solve_run_batch
from ds_trainer.arguments.merge import Resolved, resolve
from ds_trainer.arguments.objective import reference_is_base, reference_kind
from ds_trainer.arguments.schema import ModelSection
from ds_trainer.engine.optim import require_trained
from ds_trainer.errors import ModelError, RefusedError
from ds_trainer.model import load
from ds_trainer.model.attention import choose_attention
from ds_trainer.plan import advice
from ds_trainer.plan.cluster import Cluster
from ds_trainer.plan.holding import Holding, holding_of
from ds_trainer.plan.length import Length, flops_per_step, length_of
from ds_trainer.plan.memory import RankMemory, gradients_grow, rank_memory
from ds_trainer.plan.shape import Shape, Traced, read_config, read_shape, trace
from ds_trainer.plan.traffic import Traffic, step_traffic


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is to be planned."""

    config: Path
    deepspeed: Path | None = None
    overrides: tuple[str, ...] = ()
    cluster: Cluster
    notes: tuple[str, ...] = ()
    """What was taken from this machine because nobody said it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """What one kind of memory has to hold, and what there is of it."""

    what: str
    taken: float
    there: float | None
    """None: nobody said."""

    @property
    def fits(self) -> bool:
        """Whether it does, as far as that is known."""
        return self.there is None or self.taken <= self.there


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a run takes."""

    request: Request
    resolved: Resolved
    batch: BatchPlan
    shape: Shape
    holding: Holding
    memory: RankMemory
    traffic: Traffic
    length: Length
    flops: float
    """Of one optimizer step, over all ranks."""
    notes: tuple[str, ...]

    @property
    def needs(self) -> list[Need]:
        """Every memory the run needs, the GPU's first."""
        cluster = self.request.cluster
        device, host = self.memory.peak("device")[1], self.memory.peak("host")[1]
        nvme = sum(self.memory.nvme.values()) * cluster.ranks_per_node
        if cluster.device_type == "cpu":
            found = [Need(what="host memory of a node", taken=device * cluster.ranks_per_node, there=cluster.host_bytes)]
        else:
            found = [
                Need(what="GPU memory of a rank", taken=device, there=cluster.device_bytes),
                Need(what="host memory of a node", taken=host * cluster.ranks_per_node, there=cluster.host_bytes),
            ]
        if nvme:
            found.append(Need(what="nvme of a node", taken=nvme, there=cluster.nvme_bytes))
        return found

    @property
    def fits(self) -> bool:
        """Whether every memory is large enough, as far as that is known."""
        return all(each.fits for each in self.needs)


def memory_here() -> tuple[float | None, float]:
    """Memory of a GPU of this machine, None when it has none, and of the host."""
    import torch

    gpu = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else None
    return gpu, float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def make_plan(request: Request) -> Plan:
    """Plan a run.

    Raises:
        RefusedError: the settings are refused, as `train` would refuse them; or the model's config is not on this machine.
    """
    cluster = request.cluster
    resolved = resolve(request.config, deepspeed=request.deepspeed, overrides=request.overrides)
    settings = resolved.settings
    batch = solve_run_batch(resolved, cluster.ranks)
    config = read_config(settings.model)
    model = settings.model.model_dump_json()
    adapter = settings.adapter.model_dump_json() if settings.adapter else "null"
    value_head = settings.train.stage == "reward"
    shape = read_shape(model, adapter, settings.train.precision, value_head)
    require_trained(settings.train.no_weight_decay, [each.name for each in shape.weights if each.trained])
    engine = build_engine_config(
        resolved,
        batch,
        hidden_size=hidden_size_of(config.to_dict()),
        whole_layer=shape.whole_layer,
        device_type=cluster.device_type,
    )
    if autos := [name for name, value in engine.config["zero_optimization"].items() if value == "auto"]:
        raise ModelError(f"DeepSpeed's {', '.join(autos)} are \"auto\", which needs the model's hidden_size. Write numbers.")
    holding = holding_of(resolved, engine, batch, ranks_per_node=cluster.ranks_per_node, device_type=cluster.device_type)
    attention = choose_attention(settings.model.attention, config, cluster.device_type, settings.train.precision)
    step = trace(
        Traced(
            model=model,
            adapter=adapter,
            precision=settings.train.precision,
            attention=attention,
            gradient_checkpointing=settings.model.gradient_checkpointing,
            rows=batch.micro_batch_size,
            seq_len=settings.data.seq_len,
            whole_layers=holding.whole_layers and shape.whole_layers > 0,
            keep_gradients=gradients_grow(holding),
            on_cpu=holding.on_cpu,
            value_head=value_head,
        )
    )
    masked = attention in ("sdpa", "eager")
    # A mask of booleans, and what the kernel adds to the scores.
    mask = batch.micro_batch_size * settings.data.seq_len**2 * (1 + holding.weight_bytes) if masked else 0
    memory = rank_memory(
        shape,
        holding,
        step,
        attention_mask=float(mask),
        file_bytes=_bytes_of_files(settings.model, shape, holding),
        has_reference=has_reference(resolved),
        read_whole=_who_reads_whole(settings.model, holding),
    )
    length = length_of(resolved, batch)
    return Plan(
        request=request,
        resolved=resolved,
        batch=batch,
        shape=shape,
        holding=holding,
        memory=memory,
        traffic=step_traffic(shape, holding, reference=reference_kind(settings) == "held"),
        length=length,
        flops=flops_per_step(shape, positions=length.positions_per_step, seq_len=settings.data.seq_len),
        notes=(
            *request.notes,
            *_notes(resolved, cluster, length, attention),
            *_notes_on_pairs(resolved),
        ),
    )


def _bytes_of_files(model: ModelSection, shape: Shape, holding: Holding) -> float:
    """Of the weights' files; of those that are not here, as if they held the training type."""
    if model.path is None:
        return 0.0
    return float(sum(path.stat().st_size for path in load.weight_files(model.path)) or shape.total * holding.weight_bytes)


def _who_reads_whole(model: ModelSection, holding: Holding) -> Literal["by every rank", "by rank zero", "by nobody"]:
    if model.quantize:  # on a GPU each weight goes there as it is read
        return "by every rank" if holding.on_cpu else "by nobody"
    if holding.stage < 3:
        return "by every rank"
    return "by nobody" if model.path is None or load.weight_files(model.path) else "by rank zero"


def _notes_on_pairs(resolved: Resolved) -> list[str]:
    """What to know of the table of a run on pairs of answers."""
    settings = resolved.settings
    if has_reference(resolved):
        stage = settings.train.stage
        return [
            f"train.stage = {stage} keeps a frozen copy of the model as its reference; a new adapter or objective.reference = "
            "precomputed needs none"
        ]
    if reference_kind(settings) == "precomputed":
        return ["one forward pass over all the data, before the first step of the first start, is not counted: the reference"]
    return []


def has_reference(resolved: Resolved) -> bool:
    """Whether the run holds a second model, which it only computes with."""
    return reference_kind(resolved.settings) == "held" and not reference_is_base(resolved.settings.adapter)


def _notes(resolved: Resolved, cluster: Cluster, length: Length, attention: str) -> list[str]:
    notes = []
    settings = resolved.settings
    if cluster.device_type == "cpu":
        notes.append("on the CPU device and host are one: what a rank takes is the resident memory of its process")
    if length.max_steps is None:
        notes.append(
            "the number of steps follows from the data: run `ds_trainer prepare` with the same run file, then plan again"
        )
    elif length.num_rows is None and not settings.data.streaming:
        notes.append(
            "the data has not been counted (`ds_trainer prepare` does): tokens are counted as if every position held one"
        )
    if settings.model.resize_vocabulary:
        notes.append("model.resize_vocabulary: the tokenizer is not read, so the vocabulary is counted as the config has it")
    if optimizer_kind(resolved, cluster.device_type) == "deepspeed":
        notes.append("the optimizer is DeepSpeed's own: its state is counted by its name, see docs/design/memory.md")
    if settings.model.offload_activations:
        notes.append("model.offload_activations: what is kept of each layer is counted on the device, as if it stayed there")
    if attention == "eager":
        notes.append("attention `eager` holds the scores of every layer; `documents` or flash attention do not")
    return notes


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """What makes a run fit: planned, not guessed."""

    parts: tuple[advice.Candidate, ...]
    """Every one is needed."""
    plan: Plan

    @property
    def settings(self) -> tuple[str, ...]:
        """As one writes them behind the command; empty when the cluster is changed."""
        return tuple(setting for part in self.parts for setting in part.settings)

    @property
    def keeps_update(self) -> bool:
        """Whether every update stays as it is."""
        return all(part.keeps_update for part in self.parts)


def changes_that_fit(plan: Plan, most: int = 5) -> list[Change]:
    """The cheapest changes that make a run fit which does not; those that leave every update as it is come first."""
    found: dict[tuple[advice.Candidate, ...], Plan] = {}
    for parts in advice.candidates(plan.batch, plan.holding, plan.resolved, plan.request.cluster):
        again = _changed(plan, parts)
        if again is None:
            continue
        for part in reversed(parts):  # what is dear and not needed goes
            fewer = tuple(each for each in parts if each is not part)
            if fewer and (without := _changed(plan, fewer)) is not None:
                parts, again = fewer, without
        found.setdefault(parts, again)
        if len(found) == most:
            break
    return [Change(parts=parts, plan=again) for parts, again in found.items()]


def _changed(plan: Plan, parts: tuple[advice.Candidate, ...]) -> Plan | None:
    """The plan with some changes, if it fits and `train` would not refuse it."""
    cluster = plan.request.cluster
    request = replace(
        plan.request,
        overrides=(*plan.request.overrides, *(setting for part in parts for setting in part.settings)),
        cluster=replace(cluster, nodes=next((part.nodes for part in parts if part.nodes), cluster.nodes)),
    )
    try:
        again = make_plan(request)
    except RefusedError:
        return None
    return again if again.fits else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One line of the sweep."""

    name: str
    plan: Plan | None
    refused: str


def sweep(request: Request) -> list[Row]:
    """Plan every stage and offload for the same run."""
    rows = []
    zero = resolve(request.config, deepspeed=request.deepspeed, overrides=request.overrides).deepspeed.find("zero_optimization")
    written = list(zero.value) if zero is not None else []
    for name, settings in advice.stages_and_offloads(written):
        try:
            again = make_plan(replace(request, overrides=(*request.overrides, *settings)))
        except RefusedError as error:
            rows.append(Row(name=name, plan=None, refused=str(error).splitlines()[-1].strip()))
        else:
            rows.append(Row(name=name, plan=again, refused=""))
    return rows
