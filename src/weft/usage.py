"""What this process uses: processor, memory, and the GPU's where there is one. A sample costs some 20 us."""

from __future__ import annotations

import contextlib
import ctypes
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    import torch

CGROUP = Path("/sys/fs/cgroup")
MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


class Usage:
    """``cpu_percent`` counts all threads since the sample before: 100 is one core. Ranks that are threads of one process
    share its figures. ``peak_rss_bytes`` is the kernel's own high-water mark, so that no peak hides between samples."""

    def __init__(self, device: torch.device | None = None) -> None:
        self._process = psutil.Process()
        self._wall, self._cpu = time.monotonic(), time.process_time()
        self._device = device if device is not None and device.type == "cuda" else None
        self._can_tell_load = True

    def sample(self) -> dict[str, Any]:
        """Values of a "usage" event."""
        wall, cpu = time.monotonic(), time.process_time()
        elapsed = wall - self._wall
        percent = 100 * (cpu - self._cpu) / elapsed if elapsed > 0 else 0.0
        self._wall, self._cpu = wall, cpu
        rss = self._process.memory_info().rss
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * MAXRSS_UNIT
        values: dict[str, Any] = {
            "pid": self._process.pid,
            "cpu_percent": percent,
            "rss_bytes": rss,
            "peak_rss_bytes": max(peak, rss),  # the kernel counts the former in batches
        }
        return values if self._device is None else values | self._gpu(self._device)

    def _gpu(self, device: torch.device) -> dict[str, Any]:
        """Memory by torch's allocator in this process; ``gpu_percent`` is the whole device's, and needs nvidia-ml-py."""
        import torch

        values: dict[str, Any] = {
            "gpu_bytes": torch.cuda.memory_reserved(device),
            "peak_gpu_bytes": torch.cuda.max_memory_reserved(device),
        }
        if self._can_tell_load:
            try:
                values["gpu_percent"] = torch.cuda.utilization(device)
            except Exception:  # no nvidia-ml-py, or a driver or MIG slice that does not tell
                self._can_tell_load = False
        return values


class PeakMemory:
    """The most that this process took in some stretches of work, beyond what it had when this was made (bytes).

    On a CPU: the kernel's high-water mark of its own memory (libraries' files left out), and its part of what it shares (a page that n
    processes use counts 1/n). That is what the allocator holds, the gaps that it leaves included. On a GPU: torch's tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._before = self._now()
        self.peak_bytes = self.held_bytes = 0  # within stretches, and at the end of the last

    def begin(self) -> None:
        if self._device.type == "cuda":
            import torch

            torch.cuda.reset_peak_memory_stats(self._device)
            return
        Path("/proc/self/clear_refs").write_text("5")  # the mark is what it holds now

    def end(self) -> None:
        if self._device.type == "cuda":
            import torch

            peak = torch.cuda.max_memory_allocated(self._device)
            self.held_bytes = self._now() - self._before
        else:
            now, shared = _own_memory(), _shared_memory()
            peak = now["VmHWM"] - now["RssFile"] - now["RssShmem"] + shared
            self.held_bytes = now["RssAnon"] + shared - self._before
        self.peak_bytes = max(self.peak_bytes, self.held_bytes, peak - self._before)

    def _now(self) -> int:
        if self._device.type == "cuda":
            import torch

            return torch.cuda.memory_allocated(self._device)
        return _own_memory()["RssAnon"] + _shared_memory()

    @classmethod
    def of(cls, device: torch.device) -> PeakMemory | None:
        """None where the kernel does not tell."""
        try:
            found = cls(device)
            found.begin()
        except (OSError, KeyError, ValueError):
            return None
        return found


def _own_memory() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {
        line[0][:-1]: int(line[1]) * 1024
        for line in lines
        if line[0] in ("VmHWM:", "RssAnon:", "RssFile:", "RssShmem:")
    }


def _shared_memory() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Shmem:"):
            return int(line.split()[1]) * 1024
    raise KeyError("Pss_Shmem")


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
TOP_BYTES = 64 << 20
#: The most that glibc takes for M_MMAP_THRESHOLD, and for any of its numbers.
KEPT_BYTES, NEVER = 32 << 20, (1 << 31) - 1


def leave_no_gaps(alone_bytes: int) -> None:
    """From now on memory of ``alone_bytes`` or more goes back to the kernel when it is freed. glibc by itself would soon keep it, among what
    lives on: gaps of a fifth of what a sharded worker holds. Where there is another allocator, nothing changes."""
    _set_allocator(alone_bytes, TOP_BYTES)  # a top that came and went with each small tensor would cost time


def keep_what_is_freed() -> None:
    """From now on memory that is freed stays with the process, for what it takes next: for when all that lives on has been made. glibc by
    itself gives much of it back between one step and the next, and the kernel has to clear it anew: 60 ms a step of a pipeline's worker of
    16M parameters."""
    _set_allocator(KEPT_BYTES, NEVER)


def _set_allocator(mmap_threshold: int, trim_threshold: int) -> None:
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, mmap_threshold)
        mallopt(M_TRIM_THRESHOLD, trim_threshold)


def memory_left() -> int:
    """Bytes that can still be taken before the kernel has to kill: of this machine, or of the container we are in."""
    left = int(psutil.virtual_memory().available)
    try:
        most = int((CGROUP / "memory.max").read_text())  # "max": no limit
        given_back = {k: int(v) for k, v in map(str.split, (CGROUP / "memory.stat").read_text().splitlines())}
        taken = int((CGROUP / "memory.current").read_text()) - given_back.get("inactive_file", 0)
    except (OSError, ValueError):
        return left
    return max(0, min(left, most - taken))
