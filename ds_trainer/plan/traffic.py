"""What a step sends over the links: between ranks, between nodes, between GPU and host. Pure.

Volumes are bytes a rank sends. A ring over N ranks sends (N - 1)/N of the tensor for a gather or a scatter and twice that for
an all-reduce (Patarasu and Yuan, 2009). What is reduced how is DeepSpeed 0.19.8's doing: stage_1_and_2.py all-reduces buckets
whatever the owner (`use_multi_rank_bucket_allreduce`), stage3.py reduce-scatters them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_trainer.plan.holding import Holding
from ds_trainer.plan.memory import gathered_at_once, live_parameters
from ds_trainer.plan.shape import Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Traffic:
    """Bytes of one optimizer step."""

    by_rank: dict[str, float]
    """What one rank sends to other ranks, by purpose."""
    between_nodes: float
    """What one node sends to others."""
    inside_node: float
    """What the ranks of one node send to each other."""
    to_host: float
    """What one rank moves between GPU and host because of offload, both ways."""


def step_traffic(shape: Shape, holding: Holding, *, reference: bool = False) -> Traffic:
    """Count what one optimizer step sends, with the forward pass of a reference where there is one.

    A ring crosses the border of a node once in each direction of travel, and all rings together carry what one rank sends:
    so a node sends as much as a rank does, and its other ranks send to each other.
    """
    ring = (holding.ranks - 1) / holding.ranks
    width, steps = holding.weight_bytes, holding.accumulation
    trained, total = float(width * shape.trained), float(width * shape.held)
    inner = 0.0
    if holding.stage < 3:
        by_rank = {
            # Stage 1 adds the micro-steps up first; stage 2 has no room for that.
            f"gradients, {'all-reduced' if holding.reduces_to_all else 'reduced to their owners'}": (
                (2 if holding.reduces_to_all else 1) * ring * trained * (1 if holding.stage == 1 else steps)
            ),
            "new weights, gathered": ring * trained,
        }
    else:
        kept = min(1.0, (live_parameters(shape, holding) - gathered_at_once(shape, holding)) / max(1, shape.held))
        again = (1.0 - max(0.0, kept)) * ring * total * steps
        if holding.secondary_ranks > 1:
            inner = (1.0 - max(0.0, kept)) * (holding.secondary_ranks - 1) / holding.secondary_ranks * total * steps
            again = 0.0
        by_rank = {
            "weights, gathered for the forward pass": ring * total * steps,
            "weights, gathered again for the backward pass": again,
            "gradients, reduced and scattered": ring * trained * steps,
            **({"weights of the reference, gathered": ring * total * steps} if reference else {}),
        }
    sent = sum(by_rank.values())
    nodes = holding.ranks // holding.ranks_per_node
    to_host = 0.0
    if not holding.on_cpu:
        share = 1 / holding.ranks
        if holding.optimizer_on != "none":
            to_host += share * (holding.gradient_bytes * shape.trained * steps + width * shape.trained)
        if holding.weights_on != "none":
            to_host += 2 * share * total * steps
    return Traffic(
        by_rank=by_rank,
        between_nodes=sent if nodes > 1 else 0.0,
        inside_node=sent * (holding.ranks_per_node - (1 if nodes > 1 else 0)) + inner * holding.ranks_per_node,
        to_host=to_host,
    )
