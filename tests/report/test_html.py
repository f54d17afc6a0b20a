"""The page of a run in every state: whole, self-contained, true to the events, and safe with hostile text."""

from __future__ import annotations

import fcntl
import math
import os
import re
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.report.runs import event, make_folder, tick, usage, whole_run

import weft
from weft.config import LOCK, TaskRef
from weft.errors import RunFolderError
from weft.events import Event, read_events
from weft.patterns.allreduce import AllReduce
from weft.report.charts import make_axis, round_step, time_axis
from weft.report.html import render, write_report
from weft.sections import Chart, Line, Section, Table
from weft.usage import Usage

SECTIONS = [
    "Learning",
    "Where time went",
    "What travelled",
    "Processor and memory",
    "What happened",
    "The plan",
    "Settings in full",
]
VOID = {"meta", "link", "br"}


class Checker(HTMLParser):
    """Tags close in order; ids are unique; nothing points outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.refers: list[str] = []
        self.text: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "data", "action"):
                self.refers.append(value or "")
            assert not name.startswith("on"), f"a handler: {name}"

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))
    assert all(r.startswith("#") or r == "data:," for r in checker.refers), checker.refers
    assert {r[1:] for r in checker.refers if r.startswith("#")} <= set(checker.ids)
    assert "script" not in checker.tags
    style = page[page.index("<style>") : page.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r'd="[^"]*(nan|inf)', page), "a path through what is no number"
    svgs = checker.tags.count("svg")
    assert page.count("<title>") + page.count('<title id="') >= svgs
    return checker


def page_of(path: Path, events: Iterable[Event], **config: object) -> tuple[str, str]:
    """The page, and its text."""
    page = render(make_folder(path, events, **config))
    return page, " ".join(" ".join(check(page).text).split())


def test_a_finished_run(tmp_path: Path) -> None:
    _, text = page_of(tmp_path / "run", whole_run())
    for section in SECTIONS:
        assert section in text
    for words in ("finished", "40 of 40", "0.8750", "2 kB", "4 kB", "500 B", "worker 1", "250 MB", "checkpoints/step"):
        assert words in text, words
    assert "50 MB" in text, "grown from 200 to 250 MB"


STATES = {
    "nothing but a plan": [event("plan", 0.0, text="")],
    "no event at all": [],
    "started": [event("plan", 0.0, text=""), event("started", 0.1, 0, pid=5), usage(0.1, 0, 5)],
    "one step": [event("plan", 0.0, text=""), event("started", 0.1, 0, pid=5), tick(0.2, 0, 1, [1.0])],
    "all NaN": whole_run(losses=[None] * 40),
    "one NaN": whole_run(losses=[1.0] * 20 + [None] + [1.0] * 19),
    "constant": whole_run(losses=[0.0] * 40),
    "huge": whole_run(losses=[1e300] * 39 + [1e-300]),
    "many steps": whole_run(steps=5000, losses=[1.0 + (k == 2345) * 1e6 for k in range(5000)]),
    "many workers": whole_run(workers=40),
    "same instant": [tick(0.0, 0, 1, [1.0]), usage(0.0, 0, 1), event("failed", 0.0, 0, cause="at once", traceback="")],
    "clock went back": [*whole_run(), usage(-5.0, 0, 100), tick(-4.0, 0, 41, [1.0])],
    "GPU": [*whole_run(), usage(2.0, 0, 100, gpu_bytes=10**9, peak_gpu_bytes=2 * 10**9, gpu_percent=55)],
}


@pytest.mark.parametrize("state", STATES)
def test_every_state_has_a_page(tmp_path: Path, state: str) -> None:
    workers = 40 if state == "many workers" else 2
    page, text = page_of(tmp_path / "run", STATES[state], workers=workers)
    for section in SECTIONS:
        assert section in text
    if state == "one NaN":
        assert "1 not finite (NaN or infinite), the first at 21" in text
    if state == "all NaN":
        assert "40 not finite" in text
        assert "training: no finite value" in text
    if state == "many steps":
        assert "1000001" in text.replace(",", "") or "1.000e+06" in text, "the spike is told"
        assert len(page) < 400_000
    if state == "many workers":
        assert "greatest of 40" in text
        assert "worker 39" in text
    if state == "GPU":
        assert "GPU busy" in text
        assert "2 GB" in text


@settings(max_examples=30)
@given(
    losses=st.lists(st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False)), min_size=1, max_size=300),
    restart=st.integers(0, 40),
)
def test_any_losses_have_a_page(
    tmp_path_factory: pytest.TempPathFactory, losses: list[float | None], restart: int
) -> None:
    events = whole_run(steps=len(losses), losses=losses)[:-1]
    events += [event("failed", 99, 0, cause="x", traceback=""), event("restarted", 99, attempt=1, from_step=restart)]
    page_of(tmp_path_factory.mktemp("any") / "run", events, steps=len(losses))


def test_a_failed_run_leads_with_its_cause(tmp_path: Path) -> None:
    cause = "RuntimeError: <script>alert(1)</script> & more"
    events = [*whole_run()[:-3], event("failed", 2.5, 1, cause=cause, traceback="Traceback\n  File <x>\nRuntimeError")]
    page, text = page_of(tmp_path / "run", events)
    assert "failed" in text
    assert "worker 1 failed after step 40" in text
    assert "<script>" in text, "as text"
    assert "<script>" not in page
    assert "Traceback of worker 1" in text


def test_hostile_names_are_text(tmp_path: Path) -> None:
    evil = '"><img src=x onerror=alert(1)>'
    page, text = page_of(tmp_path / "run", [*whole_run(), event("warning", 1.0, text=evil)], task=TaskRef(name=evil))
    assert "<img" not in page
    assert text.count(evil) >= 2


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path) -> None:
    _, text = page_of(tmp_path / "run", [*whole_run()[:-1], event("stopped", 3.0, 0, 40, reason="asked to")])
    assert "interrupted" in text
    assert f"weft resume {tmp_path / 'run'}" in text


def test_a_run_that_is_still_going_says_so(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", whole_run()[:-3])
    assert "ended without a word" in render(folder)
    with folder.locked():
        text = " ".join(check(render(folder)).text)
    assert "still going" in text
    assert folder.writer() is None
    with (folder.path / LOCK).open() as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # asking left no lock behind


def test_a_restart_shows_what_was_taken_back(tmp_path: Path) -> None:
    events = [*whole_run()[:-3], event("failed", 2.2, 1, cause="killed by SIGKILL", traceback="")]
    events += [event("restarted", 2.4, attempt=1, from_step=20, reason="killed"), tick(3.0, 0, 21, [0.1] * 20)]
    page, text = page_of(tmp_path / "run", events)
    assert "taken back by a restart" in text
    assert 'class="mark restarted"' in page
    assert "attempt 1, from step 20: killed" in text


def test_threads_of_one_process_are_one_line(tmp_path: Path) -> None:
    events = [e for e in whole_run() if e.kind != "usage"] + [usage(t, m, 77) for t in (0.1, 1.0, 2.0) for m in (0, 1)]
    _, text = page_of(tmp_path / "run", events)
    assert "workers 0-1" in text


def test_a_pattern_adds_its_own_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sections(self: AllReduce, events: Iterable[Event]) -> list[Section]:
        num = sum(e.kind == "ticks" for e in events)
        chart = Chart("Distance", "round", [Line("d", [0, 1, 2], [3.0, math.nan, 1.0])])
        return [Section("Consensus", f"{num} ticks were told.", [chart], [Table(["peer", "x"], [["a<b", 1.5]])])]

    monkeypatch.setattr(AllReduce, "sections", sections)
    _, text = page_of(tmp_path / "run", whole_run())
    for words in ("Consensus", "8 ticks were told.", "Distance", "a<b", "1.5"):
        assert words in text


def test_a_torn_last_line_is_no_reason_to_fail(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", whole_run()[:-1])
    with folder.events.open("ab") as file:
        file.write(b'{"kind":"tic')
    assert "ended without a word" in render(folder)


def test_the_page_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "run", whole_run())
    assert write_report(folder.path) == folder.path / "report.html"
    out = write_report(folder.path, tmp_path / "other.html")
    assert out.read_text().endswith("</html>\n") or out.read_text().endswith("</html>")
    with pytest.raises(RunFolderError, match="Choose another --out"):
        write_report(folder.path, tmp_path / "no" / "such" / "place.html")
    with pytest.raises(RunFolderError, match="does not exist"):
        write_report(tmp_path / "nowhere")
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    """A line drawn across would tell of losses that never were."""
    losses = [1.0] * 20 + [None] + [1.0] * 19
    page, _ = page_of(tmp_path / "run", whole_run(losses=losses))
    (path,) = re.findall(r'<path class="line c0" d="([^"]*)"/>', page[: page.index('id="time"')])[:1]
    assert path.count("M") == 2


# -- axes


@given(st.floats(1e-99, 1e99))
def test_round_steps_are_the_next_round_number(rough: float) -> None:
    step = round_step(rough)
    assert rough * (1 - 1e-6) <= step <= rough * 5.000001 * 1.0001 or math.isinf(step)


@given(st.lists(st.floats(-1e99, 1e99), min_size=1, max_size=20), st.booleans(), st.booleans(), st.booleans())
def test_axes_hold_every_value(values: list[float], from_zero: bool, may_log: bool, rounded: bool) -> None:
    axis = make_axis(values, str, from_zero=from_zero, may_log=may_log, rounded=rounded)
    for value in values:
        assert -1e-6 <= axis.place(value) <= 1 + 1e-6
    for place, _ in axis.ticks:
        assert -1e-6 <= place <= 1 + 1e-6
    assert len(axis.ticks) <= 20


@given(st.floats(1e-3, 1e7))
def test_time_axes_have_a_few_ticks(seconds: float) -> None:
    axis = time_axis(seconds)
    assert 1 <= len(axis.ticks) <= 130
    assert all(0 <= place <= 1 + 1e-9 for place, _ in axis.ticks)
    if seconds < 6 * 86400:
        assert 2 <= len(axis.ticks) <= 8


def test_time_axes_speak_of_minutes_and_hours() -> None:
    assert [text for _, text in time_axis(600.0).ticks] == ["0 min", "2 min", "4 min", "6 min", "8 min", "10 min"]
    assert time_axis(20_000.0).ticks[1][1] == "1 h"


def test_members_tell_what_they_use_from_start_to_end(tmp_path: Path) -> None:
    """Also in a run that is over in less than a second."""
    weft.run("digits-mlp", cluster="inprocess", workers=2, steps=3, run_dir=tmp_path / "run")
    told = [e for e in read_events(tmp_path / "run" / "events.jsonl") if e.kind == "usage"]
    for member in range(2):
        first, *_, last = (e for e in told if e.member == member)
        assert (first.step, last.step) == (0, 3)
        assert last.values["pid"] == os.getpid()
        assert 0 < last.values["rss_bytes"] <= last.values["peak_rss_bytes"]
        rss = psutil.Process().memory_info().rss
        assert 0.2 * rss < last.values["rss_bytes"] < 5 * rss
        assert last.values["cpu_percent"] > 0


def test_cpu_is_what_the_process_computed_since_the_sample_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = {"monotonic": 100.0, "process_time": 7.0}
    for name in now:
        monkeypatch.setattr(f"weft.usage.time.{name}", lambda name=name: now[name])
    usage = Usage()
    for wall, cpu in ((2.0, 1.0), (1.0, 3.0), (4.0, 0.0)):  # half a core, three cores, asleep
        now["monotonic"] += wall
        now["process_time"] += cpu
        assert usage.sample()["cpu_percent"] == pytest.approx(100 * cpu / wall)
    assert usage.sample()["cpu_percent"] == 0.0, "no time has passed"
