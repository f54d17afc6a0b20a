"""Who listens to a run: the one that shows it to the user, and exporters that write or serve what it tells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from weft.config import SPANS, TENSORBOARD, TRACE, Config, RunFolder
from weft.events import Event
from weft.plan import Plan


class Observer(Protocol):
    """What a run tells while it goes; the terminal view is one."""

    def on_plan(self, plan: Plan) -> None: ...

    def on_event(self, event: Event) -> None: ...

    def on_output(self, member: int, text: str) -> None: ...

    def on_idle(self) -> None: ...


class Silent:
    def on_plan(self, plan: Plan) -> None:
        pass

    def on_event(self, event: Event) -> None:
        pass

    def on_output(self, member: int, text: str) -> None:
        pass

    def on_idle(self) -> None:
        pass


class Exporter(Protocol):
    """``name`` is its flag. ``choices``: what the plan should say of it (an address that was free)."""

    name: str
    choices: dict[str, str]

    def on_plan(self, plan: Plan) -> None: ...

    def on_event(self, event: Event) -> None: ...

    def close(self) -> None:
        """The run has ended, well or not."""


class Observers:
    """One observer and any number of exporters as one. An exporter that fails is warned of and left out: no run ends
    because a view of it did."""

    def __init__(self, main: Observer, exporters: list[Exporter]) -> None:
        self.main, self.exporters = main, exporters
        self.choices = {name: text for each in exporters for name, text in each.choices.items()}

    def on_plan(self, plan: Plan) -> None:
        self.main.on_plan(plan)
        self._each(lambda exporter: exporter.on_plan(plan))

    def on_event(self, event: Event) -> None:
        self.main.on_event(event)
        self._each(lambda exporter: exporter.on_event(event))

    def on_output(self, member: int, text: str) -> None:
        self.main.on_output(member, text)

    def on_idle(self) -> None:
        self.main.on_idle()

    def close(self) -> None:
        self._each(lambda exporter: exporter.close())
        self.exporters = []

    def _each(self, act: Callable[[Exporter], None]) -> None:
        for exporter in list(self.exporters):
            try:
                act(exporter)
            except Exception as error:
                self.exporters.remove(exporter)
                text = f"{exporter.name} gave up: {type(error).__name__}: {error}. The run itself goes on."
                self.main.on_event(Event(kind="warning", role="driver", values={"text": text}))


@contextmanager
def exported(config: Config, folder: RunFolder, main: Observer) -> Iterator[Observers]:
    """``main`` and what the run's config asks for besides. Raises ConfigError for what cannot be had, before any work."""
    exporters: list[Exporter] = []
    try:
        if config.metrics_port >= 0:
            from weft.report.prometheus import MetricsServer

            exporters.append(MetricsServer(config.metrics_port))
        if config.tensorboard:
            from weft.report.tensorboard import TensorBoardWriter

            exporters.append(TensorBoardWriter(folder.path / TENSORBOARD))
        if config.trace:
            from weft.report.trace import TraceWriter

            exporters.append(TraceWriter(folder.path / SPANS, folder.path / TRACE, folder.events))
        observers = Observers(main, exporters)
    except BaseException:
        for exporter in exporters:
            exporter.close()
        raise
    try:
        yield observers
    finally:
        observers.close()
