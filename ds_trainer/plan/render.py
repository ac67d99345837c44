"""A plan as people and as machines read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from ds_trainer.arguments.engine_config import zero_stage
from ds_trainer.plan.cluster import GIB, in_words
from ds_trainer.plan.holding import Holding
from ds_trainer.plan.memory import Parts, gathered_at_once
from ds_trainer.plan.story import Change, Need, Plan, Row


def verdict(plan: Plan) -> str:
    """The first line: fits, and by how much; or what does not, and by how much."""
    told = [each for each in plan.needs if each.there is not None]
    short = [each for each in told if not each.fits]
    if short:
        return "DOES NOT FIT: " + "; ".join(
            f"{each.what}: {in_words(each.taken)} needed, {in_words(each.there or 0)} there, "
            f"{in_words(each.taken - (each.there or 0))} short"
            for each in short
        )
    if not told:
        return (
            "TAKES "
            + "; ".join(f"{in_words(each.taken)} {each.what}" for each in plan.needs)
            + f" (to compare: {_sizes(plan.needs)})"
        )
    open_needs = [each for each in plan.needs if each.there is None]
    return (
        "FITS: "
        + "; ".join(_room(each) for each in told)
        + ("".join(f"; {each.what}: takes {in_words(each.taken)}, of how much was not said" for each in open_needs))
    )


def _room(need: Need) -> str:
    assert need.there is not None
    return f"{need.what}: {in_words(need.taken)} of {in_words(need.there)}, {in_words(need.there - need.taken)} free"


def _sizes(needs: Sequence[Need]) -> str:
    options = {
        "GPU memory of a rank": "--gpu-memory 80GiB",
        "host memory of a node": "--host-memory 1TiB",
        "nvme of a node": "--nvme 4TiB",
    }
    return " ".join(options[each.what] for each in needs)


def as_text(
    plan: Plan,
    *,
    changes: Sequence[Change] = (),
    rows: Sequence[Row] = (),
    tflops: float | None = None,
    price: float | None = None,
) -> str:
    """The plan for a terminal.

    Args:
        plan: what was planned.
        changes: what makes it fit.
        rows: of the sweep; empty: none was asked for.
        tflops: what a GPU achieves, in 10^12 operations a second.
        price: of a GPU's hour.
    """
    parts = [
        [verdict(plan)],
        _head(plan),
        _memory(plan),
        _disk(plan),
        _steps(plan),
        _traffic(plan),
        list(_time(plan, tflops, price)),
        [f"note: {each}" for each in plan.notes],
        _changes(plan, changes),
        _sweep(rows),
    ]
    return "\n\n".join("\n".join(each) for each in parts if each)


def _head(plan: Plan) -> list[str]:
    shape, holding = plan.shape, plan.holding
    kept = [
        f"{what} on {where}"
        for what, where in (("optimizer", holding.optimizer_on), ("weights", holding.weights_on))
        if where != "none"
    ]
    part = (
        f", {shape.trained:,} of them trained ({shape.trained / shape.total:.2%})"
        if shape.trained < shape.total
        else ", all trained"
    )
    part += f", {shape.packed / shape.total:.0%} held in 4 bits" if shape.packed else ""
    return [
        f"model    {shape.model_type}, {shape.total:,} parameters{part}",
        f"engine   {', '.join([f'ZeRO-{zero_stage(plan.resolved)}', *kept, plan.resolved.settings.train.precision])}"
        f"{_recomputed(holding)}",
        f"cluster  {plan.request.cluster}",
    ]


def _memory(plan: Plan) -> list[str]:
    cluster, memory = plan.request.cluster, plan.memory
    phase, peak = memory.peak("device")
    what = "memory of a rank" if cluster.device_type == "cpu" else "GPU memory of a rank"
    lines = [f"{what}, at its peak ({phase})", *_table(memory.device[phase], peak)]
    others = [f"{name} {in_words(sum(parts.values()))}" for name, parts in memory.device.items() if name != phase]
    lines.append(f"  in other phases: {', '.join(others)}")
    if memory.host:
        phase, peak = memory.peak("host")
        lines += [
            "",
            f"host memory of a rank, at its peak ({phase}); a node has {cluster.ranks_per_node}",
            *_table(memory.host[phase], peak),
        ]
    return lines


def _disk(plan: Plan) -> list[str]:
    memory, kept = plan.memory, plan.resolved.settings.checkpoint.keep_last
    one = sum(memory.checkpoint.values())
    lines = []
    if memory.nvme:
        lines += ["nvme of a rank", *_table(memory.nvme, sum(memory.nvme.values()))]
    lines.append(
        f"disk     a checkpoint {in_words(one)}; "
        f"checkpoint.keep_last = {kept} and the one being written: {in_words((kept + 1) * one)}"
    )
    return lines


def _table(parts: Parts, total: float) -> list[str]:
    unit, size_of_unit = ("GiB", GIB) if total >= GIB else ("MiB", 2**20)
    shown = sorted(((size, name) for name, size in parts.items() if size >= 0.005 * size_of_unit), reverse=True)
    width = max([len(name) for _, name in shown] + [5])
    return [f"  {name:<{width}}  {size / size_of_unit:>10,.2f} {unit}" for size, name in [*shown, (total, "total")]]


def _steps(plan: Plan) -> list[str]:
    length, train = plan.length, plan.resolved.settings.train
    lines = [f"batch    {plan.batch}"]
    forwards = plan.batch.gradient_accumulation_steps
    lines.append(
        f"step     {forwards} forward{'s' if forwards > 1 else ''} a rank; {length.positions_per_step:,} positions"
        + (f", {length.tokens_per_step:,.0f} tokens of data" if length.fill < 1 else "")
    )
    if length.max_steps is not None:
        run = f"run      {length.max_steps:,} steps, {length.max_steps * plan.batch.global_batch_size:,} rows, "
        run += f"{length.max_steps * length.tokens_per_step:,.0f} tokens"
        if length.num_rows:
            run += (
                f", {length.max_steps * plan.batch.global_batch_size / length.num_rows:.2f} epochs of {length.num_rows:,} rows"
            )
        share = f" ({length.warmup_steps / length.max_steps:.1%})" if length.max_steps else ""
        lines.append(run + f"; warm-up {length.warmup_steps:,} steps{share}")
    else:
        epochs = "1 epoch" if train.epochs in (None, 1) else f"{train.epochs:g} epochs"
        lines.append(f"run      {epochs}, in steps once the data is counted; warm-up {length.warmup_steps:,} steps")
    return lines


def _traffic(plan: Plan) -> list[str]:
    traffic = plan.traffic
    sent = {name: size for name, size in traffic.by_rank.items() if size}
    lines = ["traffic of a step, sent by each rank", *_table(sent, sum(sent.values()))] if sent else ["traffic  none: one rank"]
    if traffic.between_nodes:
        lines.append(
            f"  of that between nodes, sent by each node: {in_words(traffic.between_nodes)}; "
            f"inside each: {in_words(traffic.inside_node)}"
        )
    if traffic.to_host:
        lines.append(f"  between each GPU and its host, for the offload: {in_words(traffic.to_host)}")
    return lines


def _recomputed(holding: Holding) -> str:
    policy = holding.gradient_checkpointing
    if not policy:
        return ""
    which = "" if policy is True else " of what is cheap" if policy == "selective" else f" of every {policy} layers"
    return f", gradient checkpointing{which}"


def step_seconds(plan: Plan, tflops: float) -> float:
    """Of one optimizer step when every rank achieves so many 10^12 operations a second of the model."""
    return plan.flops / (tflops * 1e12 * plan.request.cluster.ranks)


def _time(plan: Plan, tflops: float | None, price: float | None) -> Iterator[str]:
    if tflops is None:
        return
    seconds = step_seconds(plan, tflops)
    yield (
        f"time     {seconds:.3g} s a step at {tflops:g} TFLOP/s a rank ({plan.flops:.3g} operations a step), "
        f"{plan.length.tokens_per_step / seconds:,.0f} tokens/s"
    )
    if plan.length.max_steps is not None:
        hours = seconds * plan.length.max_steps / 3600
        text = f"run      {hours:,.1f} h, {hours * plan.request.cluster.ranks:,.1f} GPU hours"
        yield text + (f", {hours * plan.request.cluster.ranks * price:,.2f} at {price:g} an hour" if price is not None else "")


def _changes(plan: Plan, changes: Sequence[Change]) -> list[str]:
    if plan.fits:
        return []
    if not changes:
        return ["No change that was tried makes it fit: a smaller model, or machines with more memory."]
    lines = ["What makes it fit, cheapest first; each was planned with the change in it"]
    for number, change in enumerate(changes, 1):
        for part in change.parts:
            settings = " ".join(_quoted(each) for each in part.settings) or f"--nodes {part.nodes}"
            lines.append(f"  {f'{number}.' if part is change.parts[0] else '  '} {settings}")
            lines.append(f"       {part.words}" + ("" if part.keeps_update else " (the updates change)"))
        lines.append(f"     {verdict(change.plan)}")
    return lines


def _quoted(setting: str) -> str:
    return f"'{setting}'" if set(setting) & set(" {}[]*'\"") else setting


def _sweep(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return []
    table = [["", "a rank", "host of a node", "sent a step", "to the host", ""]]
    for row in rows:
        if row.plan is None:
            table.append([row.name, "-", "-", "-", "-", f"refused: {row.refused}"])
            continue
        needs = {each.what: each.taken for each in row.plan.needs}
        table.append(
            [
                row.name,
                in_words(row.plan.memory.peak("device")[1]),
                in_words(needs["host memory of a node"]),
                in_words(sum(row.plan.traffic.by_rank.values())),
                in_words(row.plan.traffic.to_host) if row.plan.traffic.to_host else "-",
                _fits(row.plan),
            ]
        )
    widths = [max(len(line[column]) for line in table) for column in range(6)]
    return [
        "Stages and offloads, all else as it is",
        *("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in table),
    ]


def _fits(plan: Plan) -> str:
    if not plan.fits:
        return "does not fit"
    return "fits" if any(each.there is not None for each in plan.needs) else "-"  # nobody said what is there


def as_json(
    plan: Plan,
    *,
    changes: Sequence[Change] = (),
    rows: Sequence[Row] = (),
    tflops: float | None = None,
    price: float | None = None,
) -> dict[str, Any]:
    """The plan for machines; sizes in bytes, times in seconds."""
    cluster, length = plan.request.cluster, plan.length
    found: dict[str, Any] = {
        "fits": plan.fits,
        "verdict": verdict(plan),
        "needs": [
            {"what": each.what, "bytes": each.taken, "there_bytes": each.there, "fits": each.fits} for each in plan.needs
        ],
        "cluster": asdict(cluster),
        "model": {
            "model_type": plan.shape.model_type,
            "parameters": plan.shape.total,
            "trained": plan.shape.trained,
            "largest_module": plan.shape.largest_module,
            "gathered_at_once": gathered_at_once(plan.shape, plan.holding),
            "layers": plan.shape.num_layers,
        },
        "zero_stage": plan.holding.stage,
        "memory": asdict(plan.memory),
        "batch": {**asdict(plan.batch), "global_batch_size": plan.batch.global_batch_size},
        "length": {**asdict(length), "tokens_per_step": length.tokens_per_step},
        "traffic": asdict(plan.traffic),
        "flops_per_step": plan.flops,
        "notes": list(plan.notes),
        "changes": [
            {
                "settings": list(each.settings),
                "nodes": each.plan.request.cluster.nodes,
                "keeps_update": each.keeps_update,
                "verdict": verdict(each.plan),
            }
            for each in changes
        ],
        "sweep": [
            {"name": row.name, "refused": row.refused}
            if row.plan is None
            else {"name": row.name, "fits": row.plan.fits, "verdict": verdict(row.plan), "memory": asdict(row.plan.memory)}
            for row in rows
        ],
    }
    if tflops is not None:
        seconds = step_seconds(plan, tflops)
        found["step_seconds"] = seconds
        if length.max_steps is not None:
            hours = seconds * length.max_steps / 3600 * cluster.ranks
            found["gpu_hours"] = hours
            found["price"] = None if price is None else hours * price
    return found
