"""The replay of a history of requests takes what PyTorch's CUDA allocator would take, by its published rules."""

import itertools
import random
import time

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from qlora_kit.memory.caching import CachingAllocator, Replay, replay

KIB, MIB = 2**10, 2**20


def coming(*sizes):
    """One event for each size; its place is its key."""
    return [(key, nbytes, True) for key, nbytes in enumerate(sizes)]


def going(*keys):
    return [(key, 0, False) for key in keys]


def random_trace(seed, events, most=64 * MIB):
    """Comings and goings of sizes that are even on a logarithmic scale; about a hundred are there at a time."""
    draw, alive, trace = random.Random(seed), [], []
    for key in range(events):
        if alive and draw.random() < len(alive) / 200:
            trace.append((alive.pop(draw.randrange(len(alive))), 0, False))
        else:
            trace.append((key, int(most ** draw.random()), True))
            alive.append(key)
    return trace


# --- by hand ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "allocated", "reserved"),
    [
        ([], 0, 0),
        ([0], 0, 0),
        ([1], 512, 2 * MIB),
        ([513], 1024, 2 * MIB),
        ([MIB], MIB, 2 * MIB),
        ([MIB, MIB - 511], 2 * MIB, 2 * MIB),  # the second half of the segment, to its last byte
        ([MIB, MIB, 1], 2 * MIB + 512, 4 * MIB),
        ([MIB + 1], MIB + 512, 20 * MIB),
        ([10 * MIB - 512], 10 * MIB - 512, 20 * MIB),
        ([10 * MIB], 10 * MIB, 10 * MIB),
        ([10 * MIB + 1], 10 * MIB + 512, 12 * MIB),  # a rest above 1 MiB becomes a block of its own
        ([11 * MIB + 1], 12 * MIB, 12 * MIB),  # one of less stays with the block that is lent
        ([12 * MIB, 1], 12 * MIB + 512, 14 * MIB),
        ([13 * MIB, 2 * MIB], 16 * MIB, 34 * MIB),
        ([8 * MIB, 8 * MIB, 3 * MIB], 20 * MIB, 20 * MIB),  # the last 1 MiB of the segment is not split off
        ([8 * MIB, 8 * MIB, 8 * MIB], 24 * MIB, 40 * MIB),
    ],
)
def test_what_a_few_requests_take(asked, allocated, reserved):
    assert replay(coming(*asked)) == Replay(allocated, reserved)


def test_the_smallest_free_block_that_fits_is_taken():
    trace = coming(40 * MIB, 20 * MIB, 30 * MIB) + going(0, 1, 2)
    fits = [("a", 18 * MIB, True), ("b", 30 * MIB, True), ("c", 40 * MIB, True)]
    assert replay(trace + fits).reserved_peak_bytes == 90 * MIB
    # Taken from the 40 MiB, the first would have left no room for the last.
    assert replay([*trace, ("d", 40 * MIB + 1, True)]).reserved_peak_bytes == (90 + 42) * MIB


def test_free_neighbours_become_one_block_and_others_do_not():
    thirds = coming(6 * MIB, 6 * MIB, 6 * MIB)
    large = [("large", 13 * MIB, True)]
    assert replay(thirds + going(0, 2) + large).reserved_peak_bytes == (20 + 14) * MIB, "6 and 8 MiB lie apart"
    for order in ([0, 1, 2], [2, 1, 0], [0, 2, 1], [1, 0, 2]):
        assert replay(thirds + going(*order) + large).reserved_peak_bytes == 20 * MIB, order


def test_small_requests_do_not_come_from_large_segments():
    assert replay(coming(20 * MIB) + going(0) + [("small", MIB, True)]).reserved_peak_bytes == 22 * MIB
    assert replay(coming(*[MIB] * 40) + going(*range(40)) + [("b", 2 * MIB, True)]).reserved_peak_bytes == 60 * MIB


def test_what_comes_after_its_like_has_gone_takes_nothing_more():
    step = [event for size in (3 * MIB, 70 * MIB, 100) for event in ((size, size, True), (size, 0, False))]
    assert replay(step * 50) == replay(step) == Replay(70 * MIB, (20 + 70 + 2) * MIB)


def test_a_history_of_odd_sizes_is_fragmented_and_one_of_even_sizes_is_not():
    """Growing rows: no freed block is ever large enough for the next, as with batches in the order of their lengths."""
    growing = [event for n in range(10, 60) for event in ((n, n * 2 * MIB, True), (n, 0, False))]
    assert replay(growing) == Replay(118 * MIB, sum(range(20, 120, 2)) * MIB)
    assert (
        replay(reversed([(key, key * 2 * MIB, not comes) for key, _, comes in growing])).reserved_peak_bytes
        == 118 * MIB
    )


def test_what_goes_must_have_come():
    with pytest.raises(KeyError):
        replay(going("nobody"))


# --- for all histories ------------------------------------------------------------------------------------------------

SIZES = st.one_of(st.integers(1, 4 * KIB), st.integers(1, 3 * MIB), st.integers(9 * MIB, 70 * MIB))


@hypothesis.given(st.lists(st.tuples(SIZES, st.integers(0, 2**16)), min_size=1, max_size=60), st.randoms())
@hypothesis.settings(deadline=None, max_examples=150)
def test_blocks_tile_their_segments_and_come_back_whole(steps, order):
    allocator, lent = CachingAllocator(), []
    for nbytes, choice in steps:
        if choice % 3 == 0 and lent:
            allocator.take_back(lent.pop(choice % len(lent))[0])
        else:
            lent.append((allocator.lend(nbytes), nbytes))
        held = sorted((block.address, block.nbytes) for block, _ in lent)
        assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(held))
        assert sum(nbytes for _, nbytes in lent) <= sum(size for _, size in held) == allocator.allocated_bytes
        assert allocator.allocated_bytes + sum(allocator.free_blocks) == allocator.reserved_bytes
        assert sum(allocator.segments) == allocator.reserved_bytes
        assert all(block.nbytes - nbytes < 512 + MIB for block, nbytes in lent)
    order.shuffle(lent)
    for block, _ in lent:
        allocator.take_back(block)
    assert allocator.allocated_bytes == 0
    assert allocator.free_blocks == sorted(allocator.segments)


def test_fifty_thousand_events_take_less_than_a_second():
    trace = random_trace(seed=0, events=50_000)
    started = time.process_time()
    found = replay(trace)
    assert time.process_time() - started < 1
    assert found.reserved_peak_bytes > found.allocated_peak_bytes > 0


# --- beside a card ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(3))
def test_the_card_takes_what_the_replay_says(seed):
    """Within one segment of 20 MiB and 2 %: of blocks of one size, the driver's addresses decide which is taken."""
    device, trace = torch.device("cuda"), random_trace(seed, events=2000)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    alive = {}
    for key, nbytes, comes in trace:
        if comes:
            alive[key] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        else:
            del alive[key]
    found = replay(trace)
    assert torch.cuda.max_memory_allocated(device) - before[0] == pytest.approx(found.allocated_peak_bytes, rel=0.02)
    reserved = torch.cuda.max_memory_reserved(device) - before[1]
    assert reserved == pytest.approx(found.reserved_peak_bytes, rel=0.02, abs=20 * MIB)
