"""What a step sends, by hand."""

from dataclasses import replace

import pytest
from test_plan_memory import HOLDING, WEIGHTS, shape_of

from ds_trainer.plan.traffic import Traffic, step_traffic

TRAINED, TOTAL = 2 * 8000, 2 * 12000
"""Bytes of the weights in bf16."""


def traffic(**changed: object) -> Traffic:
    return step_traffic(shape_of(WEIGHTS), replace(HOLDING, **changed))


def test_stage_1_reduces_once_a_step_and_stage_2_once_a_forward():
    assert traffic(stage=1, accumulation=5).by_rank == {
        "gradients, all-reduced": 2 * 3 / 4 * TRAINED,
        "new weights, gathered": 3 / 4 * TRAINED,
    }
    assert traffic(stage=2, accumulation=5).by_rank["gradients, all-reduced"] == 5 * 2 * 3 / 4 * TRAINED
    to_owners = traffic(stage=2, reduces_to_all=False).by_rank
    assert to_owners["gradients, reduced to their owners"] == 3 / 4 * TRAINED


def test_stage_3_gathers_twice_unless_the_weights_stay():
    sent = traffic(stage=3, accumulation=2).by_rank
    assert list(sent.values()) == [2 * 3 / 4 * TOTAL, 2 * 3 / 4 * TOTAL, 2 * 3 / 4 * TRAINED]
    again = traffic(stage=3, max_reuse_distance=12000).by_rank["weights, gathered again for the backward pass"]
    assert again == pytest.approx(3 / 4 * TOTAL * (1 - 6000 / 12000))


def test_one_rank_sends_nothing():
    assert sum(traffic(ranks=1, ranks_per_node=1).by_rank.values()) == 0


def test_a_node_sends_what_a_rank_sends_and_the_rest_stays_inside():
    found = traffic(ranks=8, ranks_per_node=4)
    sent = sum(found.by_rank.values())
    assert (found.between_nodes, found.inside_node) == (sent, 3 * sent)
    assert (traffic().between_nodes, traffic().inside_node) == (0, 4 * sum(traffic().by_rank.values()))


def test_a_second_set_of_weights_keeps_the_backward_gather_inside_a_node():
    found = traffic(stage=3, ranks=8, ranks_per_node=4, secondary_ranks=4)
    assert found.by_rank["weights, gathered again for the backward pass"] == 0
    assert found.inside_node - 3 * found.between_nodes == 4 * 3 / 4 * TOTAL


def test_offload_moves_gradients_down_and_weights_up():
    assert traffic(optimizer_on="cpu").to_host == (TRAINED + TRAINED) / 4
    assert traffic(stage=3, optimizer_on="cpu", weights_on="cpu").to_host == (2 * TRAINED + 2 * TOTAL) / 4
    assert traffic(optimizer_on="cpu", on_cpu=True).to_host == 0


def test_a_reference_is_gathered_for_its_forward_pass_too():
    holding = replace(HOLDING, stage=3, accumulation=2)
    alone, compared = (step_traffic(shape_of(WEIGHTS), holding, reference=each).by_rank for each in (False, True))
    assert compared.keys() - alone.keys() == {"weights of the reference, gathered"}
    assert compared["weights of the reference, gathered"] == alone["weights, gathered for the forward pass"]
