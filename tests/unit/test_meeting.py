"""Ranks meet under a name that no earlier start had, whatever that start left in the store."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from ds_trainer.errors import HangError
from ds_trainer.meeting import meet


def meeting(store, ranks, seconds=20.0):
    """All ranks meet, each in a thread; what each was told."""
    with ThreadPoolExecutor(ranks) as threads:
        return list(threads.map(lambda rank: meet(store, rank, ranks, seconds), range(ranks)))


def test_all_ranks_are_told_the_same_name_and_the_next_start_another_one():
    store = dist.HashStore()
    first, second = meeting(store, 5), meeting(store, 5)
    assert len(set(first)) == len(set(second)) == 1
    assert first[0] != second[0]


def test_one_rank_meets_itself():
    assert meet(dist.HashStore(), 0, 1, 1.0)


def test_a_rank_that_is_quicker_than_rank_zero_waits_for_it_and_takes_no_answer_to_the_dead():
    store = dist.HashStore()
    [old, *_] = meeting(store, 3)
    with ThreadPoolExecutor(3) as threads:
        quick = [threads.submit(meet, store, rank, 3, 20.0) for rank in (1, 2)]
        time.sleep(0.3)
        assert not any(each.done() for each in quick)
        zero = threads.submit(meet, store, 0, 3, 20.0)
        assert {each.result() for each in quick} == {zero.result()}
    assert zero.result() != old


def test_a_rank_that_dies_before_the_meeting_opens_and_comes_back_is_waited_for():
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        zero = threads.submit(meet, store, 0, 3, 20.0)
        with pytest.raises(HangError, match="rank 0 of 3 did not arrive"):
            meet(store, 1, 3, 0.2)  # gives up, as if it were killed: rank 2 is not there yet
        two, again = (threads.submit(meet, store, rank, 3, 20.0) for rank in (2, 1))
        assert zero.result() == two.result() == again.result()


def test_a_rank_that_was_answered_by_a_rank_zero_that_died_is_answered_by_the_next():
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        one = threads.submit(meet, store, 1, 3, 20.0)
        with pytest.raises(HangError, match=r"ranks 2 of 3 did not arrive within train.collective_timeout_seconds = 0"):
            meet(store, 0, 3, 0.2)
        zero, two = (threads.submit(meet, store, rank, 3, 20.0) for rank in (0, 2))
        assert one.result() == zero.result() == two.result()


def test_many_ranks_meet_quickly():
    store, ranks = dist.HashStore(), 64
    begun = time.monotonic()
    assert len(set(meeting(store, ranks))) == 1
    assert time.monotonic() - begun < 5
    assert threading.active_count() < ranks
