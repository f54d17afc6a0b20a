"""TensorBoard's own reader and a real scrape over HTTP read back what a run told."""

from __future__ import annotations

import math
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.report.runs import event, make_plan, tick

import weft
from weft.config import RunFolder
from weft.errors import AddressInUse, ConfigError
from weft.events import Event, read_events
from weft.plan import Plan
from weft.report.observers import Observers, Silent
from weft.report.tensorboard import TensorBoardWriter
from weft.testing import raise_error


def scalars(folder: Path, tag: str) -> dict[int, float]:
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return {s.step: s.value for s in accumulator.Scalars(tag)}


@pytest.mark.multiprocess
def test_tensorboard_reads_what_the_run_told(tmp_path: Path) -> None:
    result = weft.run("digits-mlp", workers=2, steps=40, eval_every=20, tensorboard=True, run_dir=tmp_path / "run")
    folder = tmp_path / "run" / "tensorboard"
    events = list(read_events(tmp_path / "run" / "events.jsonl"))
    told = {
        step: loss
        for e in events
        if e.kind == "ticks" and e.member == 0
        for step, loss in enumerate(e.values["loss"], e.values["first"])
    }
    assert scalars(folder, "train/loss") == pytest.approx(told, rel=1e-6)
    assert len(told) == 40
    accuracy = {e.step: e.values["accuracy"] for e in events if e.kind == "eval"}
    assert scalars(folder, "eval/accuracy") == pytest.approx(accuracy, rel=1e-6)
    assert scalars(folder, "eval/loss")[40] == pytest.approx(result.loss, rel=1e-6)
    sent = sum(e.values["bytes_sent"] for e in events if e.kind == "ticks" and e.member == 1)
    assert sum(scalars(folder, "bytes_sent/worker-1").values()) == pytest.approx(sent, rel=1e-6)
    assert min(scalars(folder, "usage/rss_bytes/worker-0").values()) > 10e6


def test_tensorboard_forgets_what_a_restart_took_back(tmp_path: Path) -> None:
    writer = TensorBoardWriter(tmp_path)
    writer.on_plan(make_plan(1, 40))
    told = [
        tick(1.0, 0, 1, [1.0, 2.0, 3.0, 4.0, None, 6.0]),
        event("restarted", 2.0, attempt=1, from_step=3),
        tick(3.0, 0, 4, [40.0, 50.0]),
    ]
    for each in told:
        writer.on_event(each)
    writer.close()
    assert scalars(tmp_path, "train/loss") == {1: 1.0, 2: 2.0, 3: 3.0, 4: 40.0, 5: 50.0}


def scrape(address: str) -> dict[tuple[str, ...], float]:
    text = urllib.request.urlopen(address, timeout=10).read().decode()
    return {
        (s.name, *(f"{k}={v}" for k, v in sorted(s.labels.items()))): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


class Scraper(Silent):
    """Scrapes the run from within, while it goes."""

    def __init__(self) -> None:
        self.address = ""
        self.found: dict[tuple[str, ...], float] = {}
        self.step = 0

    def on_plan(self, plan: Plan) -> None:
        self.address = plan.choices["metrics"].split()[0]

    def on_event(self, event: Event) -> None:
        if event.kind == "saved" and event.step == 20:
            self.found = scrape(self.address)
        if event.kind == "ticks" and event.member == 0 and not self.found:
            self.step = event.values["last"]


@pytest.mark.multiprocess
def test_prometheus_scrapes_a_run_that_goes(tmp_path: Path) -> None:
    scraper = Scraper()
    weft.run(
        "digits-mlp", workers=2, steps=40, save_every=20, metrics_port=0, run_dir=tmp_path / "run", observer=scraper
    )
    found = scraper.found
    assert scraper.address.startswith("http://127.0.0.1:")
    assert found["weft_step",] == scraper.step == 20
    assert found["weft_steps",] == 40
    assert math.isfinite(found["weft_train_loss",])
    assert found["weft_run_info", "cluster=local", "pattern=allreduce", "task=digits-mlp"] == 1
    assert found["weft_rss_bytes", "member=0", "role=worker"] > 10e6
    ticks = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e.kind == "ticks" and e.step <= 20]
    told = sum(e.values["bytes_sent"] for e in ticks if e.member == 0)
    assert found["weft_sent_bytes_total", "member=0", "role=worker"] == told > 0
    assert found["weft_examples_total",] == sum(e.values["examples"] for e in ticks if e.member == 0)
    with pytest.raises(urllib.error.URLError):
        scrape(scraper.address)


@pytest.fixture
def taken() -> Any:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_port_in_use_is_refused_before_any_work(tmp_path: Path, taken: int) -> None:
    with pytest.raises(AddressInUse, match=rf"metrics_port={taken}.*Choose another --metrics-port, or 0"):
        weft.run("digits-mlp", cluster="inprocess", steps=2, metrics_port=taken, run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists(), "a refused run leaves nothing behind"


@pytest.mark.parametrize("port", [-2, 65536])
def test_no_such_port(tmp_path: Path, port: int) -> None:
    with pytest.raises(ConfigError, match=rf"metrics_port={port}"):
        weft.run("digits-mlp", cluster="inprocess", steps=2, metrics_port=port, run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    ("missing", "settings", "extra"),
    [
        ("tensorboard", "tensorboard=True", "weft[tensorboard]"),
        ("prometheus_client", "metrics_port=0", "weft[prometheus]"),
    ],
)
def test_a_missing_extra_says_what_to_install(tmp_path: Path, missing: str, settings: str, extra: str) -> None:
    code = (
        f"import sys; sys.modules[{missing!r}] = None\nimport weft\n"
        f"try: weft.run('digits-mlp', cluster='inprocess', steps=2, {settings}, run_dir={str(tmp_path / 'run')!r})\n"
        "except weft.ConfigError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert f"pip install '{extra}'" in done.stdout
    assert not (tmp_path / "run").exists()


def test_exporters_keep_torch_out_of_the_launcher() -> None:
    code = (
        "import sys, weft.report.html, weft.report.trace, weft.report.tensorboard, weft.report.prometheus\n"
        "assert not {'torch', 'tensorflow'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def test_a_resume_may_change_who_listens(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    with pytest.raises(weft.WeftError):
        weft.run(
            "digits-mlp",
            cluster="inprocess",
            steps=20,
            workers=2,
            save_every=5,
            run_dir=run_dir,
            tensorboard=True,
            faults=[raise_error(rank=1, step=12)],
        )
    weft.resume(run_dir, tensorboard=False, metrics_port=0, trace=True)
    config = RunFolder.open(run_dir).config()
    assert (config.tensorboard, config.metrics_port, config.trace) == (False, 0, True)
    assert (run_dir / "trace.json").exists()
    assert len(list((run_dir / "tensorboard").iterdir())) == 1


class Breaks:
    name = "--breaks"
    choices: dict[str, str] = {}

    def __init__(self) -> None:
        self.heard = 0

    def on_plan(self, plan: Plan) -> None: ...

    def on_event(self, event: Event) -> None:
        self.heard += 1
        raise OSError("the disk is full")

    def close(self) -> None: ...


def test_an_exporter_that_fails_is_told_and_left_out() -> None:
    class Hears(Silent):
        def __init__(self) -> None:
            self.kinds: list[str] = []
            self.texts: list[str] = []

        def on_event(self, event: Event) -> None:
            self.kinds.append(event.kind)
            if event.kind == "warning":
                self.texts.append(event.values["text"])

    hears, breaks = Hears(), Breaks()
    observers = Observers(hears, [breaks])
    for _ in range(3):
        observers.on_event(event("plan", 0.0, text=""))
    observers.close()
    assert breaks.heard == 1
    assert hears.kinds == ["plan", "warning", "plan", "plan"]
    assert hears.texts == ["--breaks gave up: OSError: the disk is full. The run itself goes on."]
