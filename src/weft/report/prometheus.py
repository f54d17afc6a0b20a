"""A run's figures for Prometheus, over HTTP on the loopback address, as long as it goes."""

from __future__ import annotations

from weft.errors import AddressInUse, ConfigError
from weft.events import Event, losses_of
from weft.plan import Plan
from weft.report.summary import SHARES, number

try:
    from prometheus_client import CollectorRegistry, Counter, Gauge, Info, start_http_server
except ImportError as error:
    raise ConfigError(
        f"--metrics-port needs prometheus_client, which cannot be imported here ({error}): pip install 'weft[prometheus]'."
    ) from error

HOST = "127.0.0.1"
MEMBER = ("role", "member")


class MetricsServer:
    """``port`` 0: any that is free; the plan tells which. Raises AddressInUse (also a ConfigError)."""

    name = "--metrics-port"

    def __init__(self, port: int) -> None:
        registry = CollectorRegistry()
        try:
            self._server, self._thread = start_http_server(port, HOST, registry)
        except OSError as error:
            raise AddressInUse(
                f"metrics_port={port}: cannot listen on {HOST}:{port} ({error.strerror}). "
                "Choose another --metrics-port, or 0 for any that is free."
            ) from error
        self.choices = {"metrics": f"http://{HOST}:{self._server.server_port}/metrics (while the run goes)"}
        self._info = Info("weft_run", "what is trained and how", registry=registry)
        self._step = Gauge("weft_step", "updates applied so far", registry=registry)
        self._steps = Gauge("weft_steps", "updates of the whole run", registry=registry)
        self._loss = Gauge("weft_train_loss", "mean over the joined batch of the latest step", registry=registry)
        self._eval = Gauge("weft_eval", "latest held-out metrics", ["metric"], registry=registry)
        self._examples = Counter("weft_examples", "joined examples trained on", registry=registry)
        self._sent = Counter("weft_sent_bytes", "bytes sent to other members", MEMBER, registry=registry)
        self._seconds = Counter("weft_time_seconds", "what time went into", [*MEMBER, "into"], registry=registry)
        self._cpu = Gauge("weft_cpu_percent", "of the member's process; 100 is one core", MEMBER, registry=registry)
        self._rss = Gauge("weft_rss_bytes", "resident memory of the member's process", MEMBER, registry=registry)
        self._gpu = Gauge("weft_gpu_bytes", "GPU memory held by the member", MEMBER, registry=registry)
        self._events = Counter("weft_events", "events by kind", ["kind"], registry=registry)
        self._first: tuple[str, int] | None = None  # whose ticks tell of examples: all members tell the joined count

    def on_plan(self, plan: Plan) -> None:
        self._info.info({"task": plan.task, "pattern": plan.pattern, "cluster": plan.cluster})
        self._steps.set(plan.steps)

    def on_event(self, event: Event) -> None:
        values, who = event.values, (event.role, str(event.member))
        self._events.labels(event.kind).inc()
        for _, loss in losses_of(event):
            self._loss.set(loss)
        match event.kind:
            case "ticks":
                self._on_ticks(event, who)
            case "eval":
                for name, value in values.items():
                    self._eval.labels(name).set(number(value))
            case "usage":
                self._cpu.labels(*who).set(values["cpu_percent"])
                self._rss.labels(*who).set(values["rss_bytes"])
                if "gpu_bytes" in values:
                    self._gpu.labels(*who).set(values["gpu_bytes"])
            case "resumed":
                self._step.set(values["step"])
            case "restarted":
                self._step.set(values["from_step"])

    def _on_ticks(self, event: Event, who: tuple[str, str]) -> None:
        values = event.values
        self._sent.labels(*who).inc(values.get("bytes_sent", 0))
        for name, key in SHARES.items():
            self._seconds.labels(*who, name).inc(max(0.0, values.get(key, 0.0)))
        self._first = self._first or (event.role, event.member)
        if self._first == (event.role, event.member):
            self._examples.inc(values.get("examples", 0))
            self._step.set(values["last"])

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
