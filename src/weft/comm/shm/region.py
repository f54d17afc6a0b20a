"""The shared map: one page for all; then for each rank a control page, two slots, a scratch area, and its heap."""

from __future__ import annotations

import mmap
import os
import platform
import sys

from weft.errors import ConfigError
from weft.usage import memory_left

LINE = 64  # bytes that the processor moves as one; no two processes write to the same line
PAGE = mmap.PAGESIZE
SLOT = 16 << 10  # a call of at most this many bytes needs one sync
HOME_SLOT = 2 << 10  # or this many, if all are in the heap and each rank has a core: a second sync, but no copies
SCRATCH = 2 << 20  # tensors outside the heap pass through in pieces of this many bytes

# Words (64 bits) of a rank's control page. SIGNATURE and LENGTH are pairs, as the slots are: one for even calls, one
# for odd ones. A rank is at most one call ahead of another, so what it writes for the next spares what it wrote before.
ARRIVED, SIGNATURE, LENGTH, PID, CLOSED = 0, 1, 3, 5, 6  # the first line, written by the rank
GAVE_UP = 7  # in it too: the first sync that a rank which left with an error did not pass
DEAD = 8  # the second line, written by its supervisor
TAKEN = 16  # the third line, of an endpoint: how many bytes of the heap are allocated
TEXT, TEXT_BYTES = 3 * LINE, 512  # byte offset: what the rank calls, again a pair
LAST_WORDS = TEXT + 2 * TEXT_BYTES  # byte offset, to the end of the page: the error with which the rank left

BROKEN = 0  # word of the page for all: 1 + the rank that left with an error


def supported() -> str | None:
    """Why ranks cannot share memory on this machine; None if they can."""
    if not sys.platform.startswith("linux"):
        return f"shared memory needs Linux, this is {sys.platform}"
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"shared memory needs the store order of x86-64, this is {platform.machine()}"
    return None


class Region:
    """An anonymous map, shared by all that are forked after it was made: it has no name, and is gone with the last.

    It takes no room in /dev/shm, which containers often keep to 64 MB.
    """

    def __init__(self, memory: mmap.mmap, world: int, nbytes_per_rank: int, crowded: bool) -> None:
        self.memory, self.world, self.nbytes_per_rank = memory, world, nbytes_per_rank
        self.crowded = crowded  # more ranks than cores; all must see it alike, since layouts depend on it
        self.words = memoryview(memory).cast("q")  # a word is loaded or stored whole, never torn

    @classmethod
    def create(cls, world: int, nbytes_per_rank: int, fd: int = -1, crowded: bool | None = None) -> Region:
        """Room for ``world`` ranks with a heap of ``nbytes_per_rank`` each. A page takes memory when first touched.

        ``fd``: of a memory file that others map, too, who are no children of ours; ``crowded``: as who made it found.
        """
        if reason := supported():
            raise ConfigError(f"{reason}: use --link tcp")
        if world < 1 or nbytes_per_rank < 0:
            raise ConfigError(f"a region needs world >= 1 and nbytes_per_rank >= 0, not {world} and {nbytes_per_rank}")
        nbytes_per_rank = align(nbytes_per_rank, PAGE)
        size = PAGE + world * (PAGE + 2 * SLOT + SCRATCH + nbytes_per_rank)
        try:
            if size > (left := memory_left()):  # the kernel maps it all the same, and kills whoever touches too much
                raise OSError(f"{left:,} bytes are left")
            if fd >= 0:
                os.ftruncate(fd, size)
            memory = mmap.mmap(fd, size, mmap.MAP_SHARED | (mmap.MAP_ANONYMOUS if fd < 0 else 0))
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"cannot map {size:,} bytes of shared memory for {world} ranks ({error}): "
                "use fewer workers, a smaller model, or --link tcp"
            ) from error
        if crowded is None:
            crowded = world > len(os.sched_getaffinity(0))
        return cls(memory, world, nbytes_per_rank, crowded)

    def control(self, rank: int) -> int:
        """Where the rank's control page starts, in bytes; below, the areas that follow it."""
        return PAGE + rank * (PAGE + 2 * SLOT + SCRATCH + self.nbytes_per_rank)

    def slot(self, rank: int, parity: int) -> int:
        return self.control(rank) + PAGE + parity * SLOT

    def scratch(self, rank: int) -> int:
        return self.control(rank) + PAGE + 2 * SLOT

    def heap(self, rank: int) -> int:
        return self.scratch(rank) + SCRATCH

    def mark_dead(self, rank: int) -> None:
        """For the supervisor that has reaped the rank: those that wait for it raise ``PeerLost`` at once."""
        self.words[self.control(rank) // 8 + DEAD] = 1

    def write_text(self, rank: int, offset: int, text: bytes) -> None:
        start = self.control(rank) + offset
        self.memory[start : start + len(text) + 1] = text + b"\0"

    def read_text(self, rank: int, offset: int, size: int) -> str:
        start = self.control(rank) + offset
        return self.memory[start : start + size].split(b"\0")[0].decode(errors="replace")

    def close(self) -> None:
        """Let go of the map; tensors that live in it stay valid. Safe to call twice."""
        if hasattr(self, "memory"):
            self.words.release()
            # Not memory.close(): torch.frombuffer keeps a reference but no lock, and would be left with no memory.
            del self.memory


def align(nbytes: int, to: int) -> int:
    return -(-nbytes // to) * to
