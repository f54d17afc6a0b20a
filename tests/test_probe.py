"""`weft probe` and `--compress auto` in whole: on threads, processes, hosts of 100 Mbit/s; what was chosen survives a resume."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from rich.console import Console
from tests.clusters.test_torchrun import finished, on_two_hosts
from tests.laws.reference import Regression
from tests.test_payoff import BF16, TOPK, WHOLE, probe_of

import weft
from weft import AllReduce, LocalSGD, driver, measure
from weft.clusters import PRELOAD, pick_cluster
from weft.codecs import spec
from weft.comm import probe
from weft.compare import final_parameters
from weft.config import RunFolder
from weft.cost import LinkSpeed
from weft.driver.probe import TABLE
from weft.driver.requests import make_probe_config
from weft.errors import ConfigError, Incompatible, MemberFailed
from weft.events import read_events
from weft.payoff import Probe, choose
from weft.report.observers import Silent
from weft.report.probe import render_probe
from weft.testing import Fault, kill, throttle
from weft.testing.hosts import hosts

HUNDRED_MBIT = 12.5e6  # bytes a second
SETTINGS = {"link": "auto", "device": "auto", "threads": 1, "deadline_s": 60.0, "insecure": False}


def kinds(run_dir: Path) -> list[str]:
    return [event.kind for event in read_events(RunFolder(run_dir).events)]


def plan_of(run_dir: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((run_dir / "plan.json").read_text())
    return plan


def assert_whole(found: Probe, world: int) -> None:
    """Structure only: how quick this machine is, is its own affair."""
    pairs = [row.members for row in found.links[:-1]]
    assert pairs == [[a, b] for a in range(world) for b in range(a + 1, world)]
    assert found.links[-1].members == list(range(world))
    assert all(row.latency_s > 0 and row.bytes_per_s > 0 for row in found.links)
    assert [way.compress for way in found.ways] == ["none", *TABLE]
    assert all(way.encode_s > 0 and way.decode_s > 0 for way in found.ways[1:])
    assert all(way.bytes_sent < 1.01 * found.ways[0].bytes_sent for way in found.ways)
    assert {way.compress: way.arrivals for way in found.ways}["int8"] == world
    assert {way.compress: way.arrivals for way in found.ways}["powersgd:4"] == 1


# -- weft probe


@pytest.mark.parametrize("task", [None, "digits-mlp"])
def test_threads_are_probed_with_and_without_a_task(task: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "THOROUGH", probe.QUICK)
    monkeypatch.setattr(measure, "BUDGET_S", {True: 0.0})
    monkeypatch.setattr(measure, "MAX_NUMEL", {True: 1 << 16})
    place, said = pick_cluster("inprocess"), list[str]()
    config = make_probe_config(task, place, {}, 3, **SETTINGS)
    with place.open(PRELOAD) as session:
        found = driver.probe(config, session, Silent(), said.append)
    assert_whole(found, 3)
    assert (found.step_s > 0) == (task is not None)
    assert found.choice.why == "inside this host nothing pays"
    assert said[1:5] == [
        "worker 0 and worker 1",
        "worker 0 and worker 2",
        "worker 1 and worker 2",
        "all 3 workers at once",
    ]
    assert msgspec.convert(msgspec.to_builtins(found), Probe) == found


class WithoutMomentum(Regression):
    """None of its optimizers has a momentum that could be taken before a codec."""

    def __init__(self, kind: str = "adagrad") -> None:
        super().__init__()
        self.kind = kind

    def optimizer(self, params: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return {
            "adagrad": lambda: torch.optim.Adagrad(params, lr=0.01),
            "sgd": lambda: torch.optim.SGD(params, lr=0.01),
            "nesterov": lambda: torch.optim.SGD(params, lr=0.01, momentum=0.9, nesterov=True),
        }[self.kind]()


@pytest.mark.parametrize("kind", ["adagrad", "sgd", "nesterov"])
def test_a_task_without_momentum_is_probed_and_runs_by_auto(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "THOROUGH", probe.QUICK)
    monkeypatch.setattr(measure, "BUDGET_S", {True: 0.0})
    place = pick_cluster("inprocess")
    config = make_probe_config("tests.test_probe:WithoutMomentum", place, {"kind": kind}, 2, **SETTINGS)
    with place.open(PRELOAD) as session:
        found = driver.probe(config, session, Silent(), lambda _: None)
    assert [way.compress for way in found.ways] == ["none", *TABLE]
    auto = AllReduce(compress="auto")
    result = weft.run(WithoutMomentum(kind), auto, "inprocess", workers=2, steps=2, run_dir=tmp_path / "run")
    assert result.steps == 2


@pytest.mark.multiprocess
def test_between_processes_auto_is_told_what_has_no_momentum_to_take(tmp_path: Path) -> None:
    slow = [throttle(rank, 400_000) for rank in range(2)]
    auto = AllReduce(compress="auto")
    weft.run(WithoutMomentum("sgd"), auto, workers=2, steps=2, link="tcp", faults=slow, run_dir=tmp_path / "run")
    assert "left out: SGD has no momentum to take before it" in plan_of(tmp_path / "run")["choices"]["compress"]


@pytest.mark.multiprocess
@pytest.mark.parametrize("link", ["tcp", pytest.param("shm", marks=pytest.mark.slow)])
def test_the_command_prints_one_object(link: str) -> None:
    command = [sys.executable, "-m", "weft", "probe", "--link", link, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    advice = told.pop("advice")
    found = msgspec.convert(told, Probe)
    assert_whole(found, 2)
    assert found.nbytes == 6 * 1024 * 1024 * 4
    assert advice.endswith(".")


def test_the_table_has_a_row_for_each_link_and_codec() -> None:
    slow = LinkSpeed(1e-3, HUNDRED_MBIT)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(render_probe(probe_of(slow, choose(WHOLE, [BF16, TOPK], slow, 25_000_000))))
    lines = [line.split("  ") for line in console.export_text().splitlines()]
    rows = {cells[0]: [c.strip() for c in cells[1:] if c.strip()] for cells in lines}
    assert rows["all 2 at once"] == ["1 ms", "12.5", "100 Mbit/s"]
    assert rows["bf16"] == ["25 GB/s", "25 GB/s", "50 %", "1 s", "1.99x", "50 Gbit/s"]
    assert rows["topk:0.01"] == ["1.2 GB/s", "5 GB/s", "1 %", "47 ms", "42.6x", "7.92 Gbit/s"]


@pytest.mark.parametrize(
    ("task", "options", "workers", "settings", "says"),
    [
        (None, {}, 1, {}, "one worker has no link to measure"),
        (None, {"size": "2"}, 2, {}, "no task: write weft probe TASK"),
        (None, {}, 2, {"link": "shm"}, "use --link inproc"),
        (None, {}, 2, {"link": "tpc"}, "unknown link 'tpc'"),
    ],
)
def test_what_cannot_be_probed_is_refused(
    task: str | None, options: dict[str, str], workers: int, settings: dict[str, Any], says: str
) -> None:
    place = pick_cluster("inprocess")

    def ask() -> None:
        config = make_probe_config(task, place, options, workers, **{**SETTINGS, **settings})
        with place.open(PRELOAD) as session:
            driver.probe(config, session, Silent(), lambda _: None)

    with pytest.raises(ConfigError, match=says):
        ask()


def probe_two_hosts() -> Probe:
    with hosts(2, rate="100mbit") as pair:
        here, there = on_two_hosts(pair, ["-m", "weft", "probe", "--json", "--insecure"])
        (code, out, err), (other_code, other_out, other_err) = finished(here), finished(there)
        assert (code, other_code) == (0, 0), err + other_err
    told = json.loads((out.strip() or other_out.strip()).splitlines()[-1])
    assert "pays here" in told.pop("advice")
    return msgspec.convert(told, Probe)


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_hosts_at_100_mbit_are_found_to_be_so() -> None:
    """What else runs on the machine may spoil a measurement: one of three must be right."""
    rates = []
    for _ in range(3):
        found = probe_two_hosts()
        assert_whole(found, 2)
        assert found.choice.compress != "none"
        rates.append([row.bytes_per_s for row in found.links])
        if rates[-1] == pytest.approx([HUNDRED_MBIT] * len(rates[-1]), rel=0.1):
            return
    pytest.fail(f"bytes per second of each link, three times: {rates}, and they are {HUNDRED_MBIT:g}")


# -- --compress auto


@pytest.mark.parametrize(
    ("workers", "pattern", "why"),
    [
        (1, AllReduce(compress="auto"), "one worker has nobody to talk to"),
        (2, AllReduce(compress="auto"), "inside this host nothing pays"),
        (2, LocalSGD(every=2, compress="auto"), "inside this host nothing pays"),
    ],
)
def test_where_nothing_can_pay_nothing_is_measured(tmp_path: Path, workers: int, pattern: Any, why: str) -> None:
    run_dir = tmp_path / "run"
    weft.run(Regression(), pattern, "inprocess", workers=workers, steps=4, run_dir=run_dir)
    assert plan_of(run_dir)["choices"]["compress"] == f"none (auto: {why})"
    assert "measured" not in kinds(run_dir)
    assert RunFolder(run_dir).config().pattern_options["compress"] == "none"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_auto_is_recorded_and_a_stopped_run_goes_on_by_it(tmp_path: Path) -> None:
    """On a slow link a codec is chosen. When the run is resumed the link is quick: who measured again would choose another.
    The truth is a run that was told the codec by name, and never stopped."""
    job: dict[str, Any] = {"workers": 2, "steps": 24, "batch": 60, "save_every": 8, "link": "tcp"}
    slow = [throttle(rank, 400_000) for rank in range(2)]
    with pytest.raises(MemberFailed):
        weft.run("digits-mlp", AllReduce(compress="auto"), faults=[*slow, kill(1, 19)], run_dir=tmp_path / "run", **job)
    config = RunFolder(tmp_path / "run").config()
    chosen = config.pattern_options["compress"]
    assert chosen in AllReduce.auto_compress
    assert spec.CODECS[spec.parse(chosen).name].biased, "nothing of this would wait, and a resume be too easy"
    assert config.measured is not None
    assert config.measured.compress == chosen
    assert config.measured.bytes_per_s < 4e6
    assert plan_of(tmp_path / "run")["choices"]["compress"].startswith(f"{chosen} (auto: at ")
    weft.resume(tmp_path / "run")
    assert kinds(tmp_path / "run").count("measured") == 1
    assert plan_of(tmp_path / "run")["choices"]["compress"].startswith(f"{chosen} (auto, as recorded: at ")
    weft.run("digits-mlp", AllReduce(compress=chosen), run_dir=tmp_path / "calm", **job)
    a, b = final_parameters(tmp_path / "calm"), final_parameters(tmp_path / "run")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize(("before", "after"), [(2, 3), (1, 2)])
def test_in_another_world_it_is_measured_anew(tmp_path: Path, before: int, after: int) -> None:
    """A codec that holds something back stays; where there was none, one may be chosen."""
    run_dir = tmp_path / "run"
    slow = [throttle(rank, 400_000) for rank in range(after)]
    job: dict[str, Any] = {"steps": 24, "batch": 60, "save_every": 8, "run_dir": run_dir}
    if before > 1:
        job |= {"link": "tcp"}
    faults = [*slow[:before], kill(0, 19)] if before > 1 else [kill(0, 19)]
    with pytest.raises(MemberFailed):
        weft.run("digits-mlp", AllReduce(compress="auto"), workers=before, faults=faults, **job)
    was = RunFolder(run_dir).config().pattern_options["compress"]
    assert (was == "none") == (before == 1)
    weft.resume(run_dir, workers=after, link="tcp", faults=slow)
    config, told = RunFolder(run_dir).config(), plan_of(run_dir)["choices"]["compress"]
    assert config.measured is not None
    assert config.measured.world == after
    assert f"measured anew for {after} workers over tcp" in told
    if before > 1:
        assert config.pattern_options["compress"] == was
        assert "chosen when the run began, and kept" in told
    else:
        assert config.pattern_options["compress"] != "none"


@pytest.mark.slow
@pytest.mark.multiprocess
def test_meetings_are_compressed_by_what_is_known_to_learn(tmp_path: Path) -> None:
    slow = [throttle(rank, 100_000) for rank in range(2)]
    pattern = LocalSGD(every=4, compress="auto")
    weft.run("digits-mlp", pattern, workers=2, steps=12, link="tcp", faults=slow, run_dir=tmp_path / "run")
    assert RunFolder(tmp_path / "run").config().pattern_options["compress"] in LocalSGD.auto_compress


@pytest.mark.multiprocess
def test_who_dies_while_the_link_is_measured_is_named(tmp_path: Path) -> None:
    always = Fault("kill", 1)
    with pytest.raises(MemberFailed, match="worker 1 failed while the link was measured: killed by SIGKILL"):
        weft.run(
            "digits-mlp", AllReduce(compress="auto"), workers=2, link="tcp", faults=[always], run_dir=tmp_path / "run"
        )
    assert not (tmp_path / "run").exists()


def test_auto_stands_only_where_all_workers_meet() -> None:
    with pytest.raises(Incompatible, match="compress=auto"):
        LocalSGD(island=2, within=AllReduce(compress="auto"))


@pytest.mark.hosts
@pytest.mark.slow
@pytest.mark.multiprocess
def test_between_hosts_auto_compresses_and_says_why(tmp_path: Path) -> None:
    command = ["run", "codelm", "-t", "size=tiny", "--steps", "6", "--compress", "auto", "--insecure"]
    with hosts(2, rate="100mbit") as pair:
        here, there = on_two_hosts(pair, ["-m", "weft", *command, "--run-dir", str(tmp_path / "run")])
        (code, _, err), (other_code, _, other_err) = finished(here), finished(there)
        assert (code, other_code) == (0, 0), err + other_err
    config = RunFolder(tmp_path / "run").config()
    assert config.measured is not None
    assert config.measured.bytes_per_s == pytest.approx(HUNDRED_MBIT, rel=0.5)  # beside other tests
    assert config.pattern_options["compress"] != "none"
    assert " Mbit/s " in plan_of(tmp_path / "run")["choices"]["compress"]
