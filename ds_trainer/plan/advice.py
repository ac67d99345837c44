"""What may be changed so that a run needs less memory, the cheapest first. Pure: `story` checks each one by planning it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ds_trainer.arguments.batch import BatchPlan
from ds_trainer.arguments.constraints import NOT_AT_STAGE_3
from ds_trainer.arguments.merge import Resolved
from ds_trainer.plan.cluster import Cluster
from ds_trainer.plan.holding import Holding

_ZERO = "deepspeed.zero_optimization."
NVME = "out/nvme"
_PACKED = "the frozen base is held in 4 bits, which are not quite its weights"


def stages_and_offloads(written: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The combinations that the sweep compares: in words, and as settings on top of what is written.

    Args:
        written: keys of the block `zero_optimization`; those that a stage does not take are taken back for it.
    """
    written = list(written)
    only_below = [f"{_ZERO}{key}=null" for key in written if key in NOT_AT_STAGE_3]
    only_stage3 = [
        f"{_ZERO}{key}=null" for key in written if key.startswith(("stage3_", "zero_hpz", "zero_quantized", "sub_group"))
    ]
    off = {"none": "null", "cpu": "{device: cpu}", "nvme": f"{{device: nvme, nvme_path: {NVME}}}"}
    combinations = [*((stage, where, "none") for stage in (1, 2) for where in ("none", "cpu"))]
    combinations += [(3, "none", "none"), (3, "cpu", "none"), (3, "cpu", "cpu"), (3, "nvme", "nvme")]
    for stage, optimizer, weights in combinations:
        both = " and weights" if weights != "none" else ""
        words = f"ZeRO-{stage}" + (f", optimizer{both} on {optimizer}" if optimizer != "none" else "")
        settings = [
            f"{_ZERO}stage={stage}",
            f"{_ZERO}offload_optimizer={off[optimizer]}",
            f"{_ZERO}offload_param={off[weights]}",
        ]
        yield words, (*settings, *(only_stage3 if stage < 3 else only_below))


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A change, not yet checked."""

    settings: tuple[str, ...]
    words: str
    """What it costs."""
    keeps_update: bool = True
    nodes: int | None = None
    """So many nodes instead."""


def candidates(batch: BatchPlan, holding: Holding, resolved: Resolved, cluster: Cluster) -> Iterator[tuple[Candidate, ...]]:
    """Changes to try, by cost: single ones, then one on top of the other; then what changes the updates, then more machines.

    Args:
        batch: the solved batch arithmetic.
        holding: how the engine holds the model now.
        resolved: the settings in force.
        cluster: what the run is planned for.
    """
    single = list(single_changes(batch, holding))
    yield from ((each,) for each in single)
    # On top of each other; of several that set the same, the one that saves most.
    last = list({each.settings[0].partition("=")[0]: each for each in single}.values())
    yield from (tuple(last[:count]) for count in range(2, len(last) + 1))
    settings = resolved.settings
    if settings.data.seq_len > 1:
        half = f"data.seq_len={settings.data.seq_len // 2}"
        yield (Candidate(settings=(half,), words="rows of half the length: other rows, other updates", keeps_update=False),)
    if settings.adapter is None and settings.model.path is not None:
        words = "trains small matrices beside the frozen model instead of all weights"
        yield (Candidate(settings=("adapter.lora.rank=16",), words=words, keeps_update=False),)
        packed = Candidate(
            settings=("adapter.lora.rank=16", "model.quantize=nf4"), words=f"{words}; {_PACKED}", keeps_update=False
        )
        yield (packed,)
    elif settings.adapter is not None and settings.adapter.beside and settings.model.quantize is None:
        yield (Candidate(settings=("model.quantize=nf4",), words=_PACKED, keeps_update=False),)
    whole = settings.train.global_batch_size is not None
    for factor in (2, 4, 8, 16):
        words = "more machines" + ("" if whole else ": the global batch grows with them")
        yield (Candidate(settings=(), nodes=cluster.nodes * factor, words=words, keeps_update=whole),)


def single_changes(batch: BatchPlan, holding: Holding) -> Iterator[Candidate]:
    """One change each, cheapest first; none changes an update."""
    micro, accumulation = batch.micro_batch_size, batch.gradient_accumulation_steps
    if holding.reduce_bucket > 100_000_000 and not holding.on_cpu:
        yield Candidate(
            settings=(f"{_ZERO}reduce_bucket_size=auto",),
            words="gradients are reduced in smaller pieces: costs next to nothing",
        )
    divisors = [each for each in range(2, micro + 1) if micro % each == 0]
    for divisor in dict.fromkeys([*divisors[:1], *divisors[-1:]]):
        yield Candidate(
            settings=(
                f"train.micro_batch_size={micro // divisor}",
                f"train.gradient_accumulation_steps={accumulation * divisor}",
            ),
            words=f"{divisor} x as many forwards of 1/{divisor} the rows: the GPU is used less well",
        )
    if holding.stage == 1 and holding.ranks > 1:
        yield Candidate(
            settings=(f"{_ZERO}stage=2",),
            words="gradients are reduced after every forward"
            if accumulation > 1
            else "gradients are kept by their owners only",
        )
    if not holding.gradient_checkpointing:
        yield Candidate(
            settings=("model.gradient_checkpointing=selective",),
            words="cheap activations are computed again: next to no compute",
        )
    if holding.gradient_checkpointing is not True:
        yield Candidate(
            settings=("model.gradient_checkpointing=true",), words="activations are computed again: a third more compute"
        )
    if holding.stage < 3 and holding.ranks > 1:
        yield Candidate(
            settings=(f"{_ZERO}stage=3",), words="weights are gathered in forward and backward: about 1.5 x the traffic"
        )
    to_stage3 = (f"{_ZERO}stage=3",) if holding.stage < 3 else ()
    if holding.on_cpu:
        if holding.keeps_copy:
            yield Candidate(
                settings=("checkpoint.background=false",), words="training stands still while a checkpoint is written"
            )
        return  # offload would only move it within the same memory
    if holding.optimizer_on == "none":
        yield Candidate(
            settings=(f"{_ZERO}offload_optimizer={{device: cpu}}",),
            words="every step waits for the CPU's Adam and the PCIe bus",
        )
    if holding.weights_on == "none":
        yield Candidate(
            settings=(f"{_ZERO}offload_param={{device: cpu}}", *to_stage3),
            words="weights cross the PCIe bus in every forward and backward",
        )
    if holding.optimizer_on != "nvme":
        nvme = f"{{device: nvme, nvme_path: {NVME}}}"
        yield Candidate(
            settings=(f"{_ZERO}offload_optimizer={nvme}", f"{_ZERO}offload_param={nvme}", *to_stage3),
            words="weights and optimizer states come from a disk, and go back, in every step",
        )
