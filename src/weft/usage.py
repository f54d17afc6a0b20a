"""What this process uses: processor, memory, and the GPU's where there is one. A sample costs some 20 us."""

from __future__ import annotations

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
