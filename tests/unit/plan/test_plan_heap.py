"""How a heap grows: by hand, and never below what is alive."""

from hypothesis import given
from hypothesis import strategies as st

from ds_trainer.plan.heap import Heap

HEADER, MORE = 16, 96


def test_an_equal_block_does_not_fit_into_the_hole_of_one_before():
    heap = Heap()
    heap.allocate(1, 1000 * 16)
    heap.allocate(2, 16)  # keeps the hole from being given back
    heap.free(1)
    heap.allocate(3, 1000 * 16)
    assert heap.peak == 2 * (1000 * 16 + HEADER) + 16 + HEADER
    heap.allocate(4, 1000 * 16 - MORE)  # smaller by what an aligned request wants more
    assert heap.peak == 2 * (1000 * 16 + HEADER) + 16 + HEADER


def test_neighbours_that_are_free_are_one_hole_and_the_top_is_given_back():
    heap = Heap()
    for key in (1, 2, 3, 4):
        heap.allocate(key, 1600)
    heap.free(2)
    heap.free(3)
    heap.allocate(5, 3000)  # fits into both holes together
    assert heap.peak == 4 * (1600 + HEADER)
    heap.free(4)
    heap.allocate(6, 1600)
    assert heap.peak == 4 * (1600 + HEADER)


def test_every_second_block_has_a_splinter_before_it_that_separates_holes():
    heap = Heap()
    for key in (1, 2, 3):
        heap.allocate(key, 1600)
    heap.free(1)
    heap.free(2)
    heap.allocate(4, 3000)
    assert heap.peak == 3 * (1600 + HEADER) + 3008 + HEADER


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 10**6)), max_size=80))
def test_the_heap_is_never_smaller_than_what_is_alive(steps):
    heap, alive, most = Heap(), {}, 0
    for number, (frees, size) in enumerate(steps):
        if frees and alive:
            key = next(iter(alive))
            heap.free(key)
            del alive[key]
        else:
            heap.allocate(number, size)
            alive[number] = size
        most = max(most, sum(alive.values()))
    assert most <= heap.peak <= sum(size + 32 for frees, size in steps)
