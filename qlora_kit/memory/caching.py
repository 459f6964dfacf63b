"""What PyTorch's CUDA allocator adds to the bytes that were asked for: rounding and fragmentation, without a card.

The rules are those of c10/cuda/CUDACachingAllocator.cpp in its default setting, for one stream (its constants stand in
c10/core/AllocatorConfig.h, read in torch 2.13):
- a request is rounded up to 512 bytes, and is served from the free block that fits it best, of the lowest address where
  several do; what is left over becomes a free block of its own, unless it is small;
- requests up to 1 MiB and larger ones never share a segment;
- where no free block is large enough, a new segment comes from the driver: 2 MiB for small requests, 20 MiB below
  10 MiB, and otherwise the request rounded up to 2 MiB;
- a freed block grows together with its free neighbours; segments are kept.

The real allocator gives free segments back before it reports that memory is out. Here nothing goes back, so the
reserved peak is what a run takes that never comes to that.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

ROUNDING_BYTES = 512
"""Every block is a multiple of this."""

_MIB = 2**20
_LARGEST_SMALL_BYTES = _MIB
_SMALL_SEGMENT_BYTES, _MIDDLE_SEGMENT_BYTES = 2 * _MIB, 20 * _MIB
_OWN_SEGMENT_BYTES = 10 * _MIB
_SEGMENT_ROUNDING_BYTES = 2 * _MIB


@dataclass(frozen=True, slots=True)
class Replay:
    """What a sequence of requests came to.

    Attributes:
        allocated_peak_bytes: as torch.cuda.max_memory_allocated counts: blocks lent, with what rounding added.
        reserved_peak_bytes: as torch.cuda.max_memory_reserved counts: segments taken from the driver.
    """

    allocated_peak_bytes: int
    reserved_peak_bytes: int


@dataclass(slots=True, eq=False)
class Block:
    """A piece of a segment, lent or free, between its neighbours there."""

    address: int
    nbytes: int
    is_small: bool
    is_free: bool = False
    before: "Block | None" = None
    after: "Block | None" = None


@dataclass(slots=True)
class CachingAllocator:
    """Lends blocks as the card's allocator would.

    Attributes:
        allocated_bytes: in blocks that are lent.
        segments: their sizes, in the order in which they were taken.
    """

    allocated_bytes: int = 0
    segments: list[int] = field(default_factory=list)
    _free: dict[bool, list[tuple[int, int]]] = field(default_factory=lambda: {True: [], False: []})
    _at: dict[int, Block] = field(default_factory=dict)
    _end: int = 0

    @property
    def reserved_bytes(self) -> int:
        """In all segments."""
        return self._end

    @property
    def free_blocks(self) -> list[int]:
        """Sizes of the blocks that are not lent, in ascending order."""
        return sorted(nbytes for pool in self._free.values() for nbytes, _ in pool)

    def lend(self, nbytes: int) -> Block:
        """A block for `nbytes` (at least 1)."""
        wanted = _round_up(nbytes, ROUNDING_BYTES)
        is_small = wanted <= _LARGEST_SMALL_BYTES
        pool = self._free[is_small]
        found = bisect_left(pool, (wanted, 0))
        block = self._at[pool.pop(found)[1]] if found < len(pool) else self._new_segment(wanted, is_small)
        block.is_free = False
        rest = block.nbytes - wanted
        if rest >= ROUNDING_BYTES if is_small else rest > _LARGEST_SMALL_BYTES:
            self._split(block, wanted)
        self.allocated_bytes += block.nbytes
        return block

    def take_back(self, block: Block) -> None:
        """A lent block is free again, and one with its free neighbours."""
        self.allocated_bytes -= block.nbytes
        if block.after is not None and block.after.is_free:
            self._forget_free(block.after)
            self._swallow(block, block.after)
        if block.before is not None and block.before.is_free:
            self._forget_free(block.before)
            block = block.before
            assert block.after is not None
            self._swallow(block, block.after)
        self._keep_free(block)

    def _new_segment(self, wanted: int, is_small: bool) -> Block:
        if is_small:
            nbytes = _SMALL_SEGMENT_BYTES
        elif wanted < _OWN_SEGMENT_BYTES:
            nbytes = _MIDDLE_SEGMENT_BYTES
        else:
            nbytes = _round_up(wanted, _SEGMENT_ROUNDING_BYTES)
        block = self._at[self._end] = Block(self._end, nbytes, is_small)
        self._end += nbytes
        self.segments.append(nbytes)
        return block

    def _split(self, block: Block, wanted: int) -> None:
        rest = Block(block.address + wanted, block.nbytes - wanted, block.is_small, before=block, after=block.after)
        if block.after is not None:
            block.after.before = rest
        block.nbytes, block.after = wanted, rest
        self._at[rest.address] = rest
        self._keep_free(rest)

    def _swallow(self, block: Block, after: Block) -> None:
        block.nbytes += after.nbytes
        block.after = after.after
        if after.after is not None:
            after.after.before = block
        del self._at[after.address]

    def _keep_free(self, block: Block) -> None:
        block.is_free = True
        insort(self._free[block.is_small], (block.nbytes, block.address))

    def _forget_free(self, block: Block) -> None:
        pool = self._free[block.is_small]
        del pool[bisect_left(pool, (block.nbytes, block.address))]


def replay(events: Iterable[tuple[object, int, bool]]) -> Replay:
    """Play a history of requests to the allocator.

    Args:
        events: in their order: (whose, bytes, whether they come or go). Of what goes, the key alone counts; what comes
            with 0 bytes takes nothing, as on a card.

    Raises:
        KeyError: something goes that is not there.
    """
    allocator, lent = CachingAllocator(), dict[object, Block | None]()
    allocated_peak = 0
    for key, nbytes, comes in events:
        if comes:
            assert key not in lent
            lent[key] = allocator.lend(nbytes) if nbytes else None
            allocated_peak = max(allocated_peak, allocator.allocated_bytes)
        else:
            block = lent.pop(key)
            if block is not None:
                allocator.take_back(block)
    return Replay(allocated_peak, allocator.reserved_bytes)


def _round_up(nbytes: int, step: int) -> int:
    return -(-nbytes // step) * step
