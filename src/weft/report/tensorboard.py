"""A run as TensorBoard events. The writer is TensorBoard's own (no torch, no TensorFlow): who can write can also look."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from weft.errors import ConfigError
from weft.events import Event, losses_of
from weft.plan import Plan
from weft.report.summary import SHARES, number

try:
    from tensorboard.compat.proto.event_pb2 import Event as Record
    from tensorboard.compat.proto.event_pb2 import SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter
except ImportError as error:
    raise ConfigError(
        f"--tensorboard needs TensorBoard, which cannot be imported here ({error}): pip install 'weft[tensorboard]'."
    ) from error


class TensorBoardWriter:
    """Scalars by step: train/loss (each step), eval/METRIC, and by member time/..., bytes_sent, usage/...

    Steps that a restart takes back are taken back here too (a SessionLog START purges what was written after it).
    """

    name = "--tensorboard"

    def __init__(self, folder: Path) -> None:
        self.choices = {"tensorboard": f"tensorboard --logdir {folder}"}
        self._folder = folder
        self._writer: EventFileWriter | None = None
        self._step = 0

    def on_plan(self, plan: Plan) -> None:
        self._writer = EventFileWriter(str(self._folder))

    def on_event(self, event: Event) -> None:
        values, who = event.values, f"{event.role}-{event.member}"
        for step, loss in losses_of(event):
            if step > self._step:  # all ranks tell the same
                self._step = step
                self._write(event, {"train/loss": loss}, step)
        match event.kind:
            case "ticks":
                parts = {f"time/{name}/{who}": values.get(key, 0.0) for name, key in SHARES.items()}
                self._write(event, parts | {f"bytes_sent/{who}": values.get("bytes_sent", 0.0)})
            case "usage":
                self._write(event, {f"usage/{name}/{who}": v for name, v in values.items() if name != "pid"})
            case "eval":
                self._write(event, {f"eval/{name}": number(value) for name, value in values.items()})
            case "resumed" | "restarted":
                self._step = values["step"] if event.kind == "resumed" else values["from_step"]
                start = SessionLog(status=SessionLog.START)
                self._add(Record(wall_time=event.time, step=self._step + 1, session_log=start))

    def _write(self, event: Event, scalars: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            step = event.step
        shown = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items() if not math.isnan(value)]
        self._add(Record(wall_time=event.time, step=step, summary=Summary(value=shown)))

    def _add(self, record: Record) -> None:
        if self._writer is not None:
            self._writer.add_event(record)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
