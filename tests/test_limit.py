"""A budget holds: on a card the allocator refuses more, on a CPU the run ends, and freed memory goes back."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_kit
from qlora_kit.errors import FitError
from qlora_kit.memory import Limit, counter
from qlora_kit.memory.counter import resident_bytes
from qlora_kit.memory.limit import BESIDE_TENSORS_BYTES, CUDA_RESERVE_BYTES, whose_memory_ran_out

GIB, MIB = 2**30, 2**20
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_proc = pytest.mark.skipif(resident_bytes() == (0, 0), reason="this system has no /proc/self/status")


def new_pages(nbytes):
    """Memory from the system, filled, and not from the heap, which may hold as much that was freed."""
    pages = mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    return pages


# --- on a CPU ---------------------------------------------------------------------------------------------------------


@needs_proc
def test_what_was_there_before_is_not_counted_and_what_comes_is():
    before = new_pages(64 * MIB)
    with Limit(CPU, 48 * MIB) as limit:
        limit.check(1)
        first = new_pages(32 * MIB + BESIDE_TENSORS_BYTES)
        limit.check(2)
        second = new_pages(32 * MIB)
        with pytest.raises(FitError, match=r"^memory.budget is 48.0 MiB, and 1\d\d MiB was taken by step 3 \(64.0 MiB"):
            limit.check(3)
    assert limit.counter.start_bytes > 64 * MIB
    assert 64 * MIB <= limit.needed_bytes < 72 * MIB
    assert len(before) + len(first) + len(second) == 192 * MIB


@needs_proc
def test_a_peak_between_two_checks_counts_though_it_is_over():
    with Limit(CPU, 16 * MIB) as limit:
        pages = new_pages(32 * MIB + BESIDE_TENSORS_BYTES)
        limit.counter.sample()
        pages.close()
        with pytest.raises(FitError, match="by step 7"):
            limit.check(7)


def test_without_a_budget_a_cpu_has_no_limit(monkeypatch):
    with Limit(CPU) as limit:
        monkeypatch.setattr(counter, "resident_bytes", lambda: (2**60, 0))
        limit.counter.sample()
        limit.check(1)
    assert limit.counter.taken_bytes > 2**59


def test_a_system_that_tells_nothing_is_known_as_such(monkeypatch):
    assert Limit(CPU).can_be_kept
    monkeypatch.setattr("qlora_kit.memory.limit.resident_bytes", lambda: (0, 0))
    assert not Limit(CPU, GIB).can_be_kept
    assert Limit(CPU).can_be_kept, "there is nothing to keep to"


@pytest.mark.parametrize(("budget", "times"), [(GIB, 1), (None, 0)])
def test_a_budget_brings_the_allocation_policy_with_it(budget, times, monkeypatch):
    calls = []
    monkeypatch.setattr("qlora_kit.memory.limit.set_allocation_policy", lambda: calls.append(1))
    with Limit(CPU, budget):
        assert len(calls) == times


HELD_BY_THE_HEAP = """
import runpy, sys
allocator = runpy.run_path(sys.argv[1])

def resident():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

if sys.argv[2] == "policy":
    assert allocator["set_allocation_policy"]()
bytearray(2**24)  # one that is freed tells glibc's default to put its like on the heap
start = resident()
kept = []
for _ in range(100):
    large = [bytearray(2**19), bytearray(2**19)]
    kept.append(bytearray(2**12))  # between the large ones and the end of the heap
    kept.append(large)
del large
kept[1::2] = [None] * 100
freed = resident() - start
allocator["give_back_free_memory"]()
print(freed, resident() - start)
"""


@needs_proc
@pytest.mark.skipif(sys.platform != "linux", reason="the policy is glibc's")
def test_under_the_policy_what_is_freed_goes_back_and_under_glibcs_default_it_stays():
    script = Path(qlora_kit.__file__).parent / "memory" / "allocator.py"

    def held(policy):
        command = [sys.executable, "-c", HELD_BY_THE_HEAP, str(script), policy]
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return [int(word) for word in result.stdout.split()]

    (default, after_trim), (kept, _) = held("default"), held("policy")
    assert default > 95 * MIB, "100 MiB were freed, and the heap holds them"
    assert after_trim < 5 * MIB
    assert kept < 5 * MIB


def fails(ask):
    """The error that a request for more than there is ends in."""
    with pytest.raises((MemoryError, RuntimeError, OSError)) as caught:
        ask()
    return caught.value


PRODUCTS = """
import qlora_kit, torch
from qlora_kit.memory.allocator import set_allocation_policy
from qlora_kit.memory.counter import resident_bytes

set_allocation_policy()
w = torch.randn(688, 256).bfloat16()
before = resident_bytes()[0]
for tokens in range(16, 266):
    torch.randn(tokens, 256).bfloat16() @ w.T @ w
print(resident_bytes()[0] - before)
"""


@pytest.mark.slow
@needs_proc
def test_products_of_many_lengths_in_16_bits_leave_little_behind():
    """A value of the user's own stands: so it is seen what they would leave."""

    def left(**own):
        names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
        clean = {name: value for name, value in os.environ.items() if name not in names}
        asked = {**clean, **dict.fromkeys(names, own["capacity"])} if own else clean
        done = subprocess.run([sys.executable, "-c", PRODUCTS], env=asked, capture_output=True, text=True, check=True)
        return int(done.stdout)

    many = left(capacity="1024")
    if many < 150 * MIB:
        pytest.skip("this processor multiplies 16 bits in another way")
    assert left() < min(120 * MIB, many / 2), "64 forms of up to 1.5 MiB"


def test_whose_memory_ran_out_is_told_by_kind_and_words():
    assert whose_memory_ran_out(fails(lambda: torch.empty(2**60, dtype=torch.uint8))) == "host"
    assert whose_memory_ran_out(fails(lambda: bytearray(2**60))) == "host"
    assert whose_memory_ran_out(fails(lambda: mmap.mmap(-1, 2**60))) == "host"
    for words in ("could not create a primitive", "could not create a memory object", "could not execute a primitive"):
        assert whose_memory_ran_out(RuntimeError(words)) == "host", "oneDNN's"
    assert whose_memory_ran_out(RuntimeError("could not create a primitive descriptor for a matmul primitive")) is None
    assert whose_memory_ran_out(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")) == "device"
    assert whose_memory_ran_out(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling it")) == "device"
    assert whose_memory_ran_out(RuntimeError("Triton Error [CUDA]: out of memory")) == "device", "for a kernel's code"
    assert whose_memory_ran_out(fails(lambda: torch.ones(2) @ torch.ones(3))) is None
    assert whose_memory_ran_out(fails(lambda: os.stat("/nowhere/at/all"))) is None


# --- on a card --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "allowed"),
    [(4 * GIB, 4 * GIB), (None, 7 * GIB - CUDA_RESERVE_BYTES), (20 * GIB, 7 * GIB)],
    ids=["a budget", "none", "more than is free"],
)
def test_the_allocators_share_is_what_it_holds_and_the_budget_and_is_put_back(budget, allowed, monkeypatch):
    shares = [0.9]
    for name, answer in {
        "empty_cache": None,
        "mem_get_info": (7 * GIB, 10 * GIB),
        "memory_reserved": GIB,
        "memory_allocated": GIB // 2,
        "max_memory_allocated": 2 * GIB,
        "reset_peak_memory_stats": None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: shares[-1])
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda share, device: shares.append(share))
    with Limit(CUDA, budget) as limit:
        limit.check(5)
        assert shares[-1] * 10 * GIB == pytest.approx(GIB + allowed)
    assert shares[-1] == 0.9
    assert limit.budget_bytes == allowed
    assert limit.counter.taken_bytes == 1.5 * GIB
    assert limit.step == 5


@pytest.mark.gpu
def test_a_card_refuses_what_lies_above_the_budget_and_gives_it_afterwards():
    before = torch.cuda.get_per_process_memory_fraction(CUDA)
    with Limit(CUDA, 256 * MIB) as limit:
        x = torch.zeros(200 * MIB, dtype=torch.uint8, device=CUDA)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(100 * MIB, dtype=torch.uint8, device=CUDA)
        assert 200 * MIB <= limit.counter.taken_bytes <= 256 * MIB
    assert torch.cuda.get_per_process_memory_fraction(CUDA) == before
    assert x.numel() + torch.zeros(100 * MIB, dtype=torch.uint8, device=CUDA).numel() == 300 * MIB


@pytest.mark.gpu
def test_with_no_budget_a_card_keeps_its_reserve():
    torch.cuda.empty_cache()  # as a limit does first: what tests before this one have left is free, too
    free, _ = torch.cuda.mem_get_info(CUDA)
    with Limit(CUDA) as limit:
        assert limit.budget_bytes == pytest.approx(free - CUDA_RESERVE_BYTES, rel=0.01)
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(free - CUDA_RESERVE_BYTES // 2, dtype=torch.uint8, device=CUDA)
