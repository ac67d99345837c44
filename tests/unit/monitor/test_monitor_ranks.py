"""Which rank is named as slow, and what a line of metrics.jsonl holds of many ranks."""

import pytest

from ds_trainer.monitor.ranks import RankPace, by_rank, find_stragglers


def rank(*, forward=0.4, wait=0.0, step=1.0, host="node-a", memory=10.0):
    return RankPace(
        host=host,
        step_seconds=step,
        data_wait_seconds=wait,
        usual_data_wait_seconds=wait,
        usual_forward_seconds=forward,
        peak_memory_gib=memory,
    )


def test_a_rank_whose_own_forward_is_slow_is_named_with_its_host():
    [found] = find_stragglers([rank(), rank(), rank(forward=0.52, host="node-b"), rank(forward=0.42)])
    assert str(found) == "rank 2 on node-b computes its forward in 0.52 s, the others 0.40 s"
    assert found.as_fields() == {
        "rank": 2,
        "host": "node-b",
        "what": "forward",
        "seconds": 0.52,
        "others_seconds": 0.4,
    }


def test_of_two_ranks_the_slower_one_is_named():
    assert [each.rank for each in find_stragglers([rank(forward=0.6), rank()])] == [0]


def test_slow_data_is_told_from_slow_compute():
    [found] = find_stragglers([rank(), rank(wait=0.3), rank()])
    assert str(found) == "rank 1 on node-a waits for data 0.30 s, the others 0.00 s"


@pytest.mark.parametrize(
    "ranks",
    [
        [rank()],
        [rank(), rank(forward=0.49)],  # less than a quarter more
        [rank(forward=0.01), rank(forward=0.029)],  # what else runs on a host makes as much
        [rank(wait=0.3), rank(wait=0.32)],  # all are slow: nobody holds the others up
        [rank(), rank(wait=0.049)],  # less than a twentieth of the step
        [rank(forward=0.2), rank(), rank(), rank()],  # one that is faster
    ],
)
def test_what_names_nobody(ranks):
    assert find_stragglers(ranks) == []


def test_half_of_the_ranks_may_be_slow():
    slow = [rank(forward=0.8, host="node-b")] * 4
    assert [each.rank for each in find_stragglers([*[rank()] * 5, *slow])] == [5, 6, 7, 8]


def test_up_to_64_ranks_are_listed_and_of_more_the_extremes_are_with_their_ranks():
    few = by_rank([rank(step=1.00004), rank(memory=12.5)])
    assert few == {
        "step_seconds": [1.0, 1.0],
        "data_wait_seconds": [0.0, 0.0],
        "forward_seconds": [0.4, 0.4],
        "peak_memory_gib": [10.0, 12.5],
    }
    assert len(by_rank([rank()] * 64)["step_seconds"]) == 64
    many = by_rank([*[rank()] * 40, rank(forward=0.9), rank(forward=0.1), *[rank()] * 23])
    assert many["forward_seconds"] == {"median": 0.4, "min": 0.1, "min_rank": 41, "max": 0.9, "max_rank": 40}
