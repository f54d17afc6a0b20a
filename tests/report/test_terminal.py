"""What stands on the screen, read back as text."""

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console, RenderableType

from weft.errors import ConfigError, Interrupted, MemberFailed, UnknownName
from weft.events import Event, EventLog, read_events
from weft.plan import LinkPlan, MemberPlan, Plan
from weft.report.summary import SHARES, Summary
from weft.report.terminal import (
    LINE_EVERY_S,
    MAX_ROWS,
    REFRESH_S,
    LiveView,
    closing_summary,
    render_error,
    render_patterns,
    render_plan,
    render_tasks,
)
from weft.report.widgets import braille_curve, share_bar

KINDS: list[tuple[str, dict[str, Any]]] = [
    ("plan", {"text": "", "facts": {}}),
    ("started", {"pid": 1}),
    (
        "ticks",
        {
            "first": 1,
            "last": 2,
            "loss": [2.0, None],
            "examples": 16.0,
            "compute_s": 0.3,
            "exchange_s": 0.1,
            "wait_s": 0.1,
            "data_s": 0.0,
            "bytes_sent": 1e6,
        },
    ),
    ("eval", {"loss": None, "accuracy": 0.5}),
    ("saved", {"path": "runs/x/checkpoints/2", "seconds": 0.1, "bytes": 1000}),
    ("balance", {"shares": [10, 6], "reason": "worker 1 takes 6 [of] 16"}),
    ("resumed", {"path": "runs/x/checkpoints/2", "step": 2}),
    ("failed", {"cause": "boom [red]\nsecond line", "traceback": ""}),
    ("restarted", {"attempt": 1, "from_step": 2}),
    ("warning", {"text": "hot \x1b[31mred\x1b[0m [bold]"}),
    ("stopped", {"reason": "asked to"}),
    ("finished", {"metrics": {"loss": 1.0}, "seconds": 3.0}),
    ("a kind of the future", {}),
]


def make_plan(workers: int = 2, **changes: Any) -> Plan:
    memory = {"parameters": 13_000_000, "gradients": 13_000_000, "optimizer": 26_000_000, "buffers": 0}
    facts: dict[str, Any] = {
        "task": "codelm",
        "pattern": "allreduce",
        "tier": "stable",
        "answers": {
            "where do parameters live": "on every worker",
            "who talks to whom": "all workers with all",
            "when": "each step, after backward",
            "what travels": "gradients",
            "how combined": "mean weighted by examples, summed in rank order",
        },
        "cluster": "local",
        "steps": 300,
        "epochs": 0.43,
        "batch": 8 * workers,
        "num_parameters": 3_260_000,
        "num_trainable": 3_260_000,
        "train_examples": 98_765,
        "test_examples": 7_654,
        "dtype": "float32",
        "members": [
            MemberPlan(role="worker", member=i, device="cpu", does="trains", examples_per_step=8, memory=memory)
            for i in range(workers)
        ],
        "links": [
            LinkPlan(
                members=f"{workers} workers",
                carrier="shm",
                bytes_per_step=12_500_000,
                what="gradients (float32)",
            )
        ],
        "checkpoints": "every 30 steps, the last 3 are kept",
        "choices": {"link": "shm: all workers are on this host"},
        "notes": ["running statistics are averaged at saves"],
    }
    return Plan(**facts | changes)


def text_of(renderable: RenderableType, width: int = 80, **options: Any) -> str:
    file = io.StringIO()
    Console(file=file, width=width, **options).print(renderable)
    return file.getvalue()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def ticks(member: int, step: int, **values: Any) -> Event:
    standard = {"first": step, "last": step, "loss": [2.0], "examples": 16, "bytes_sent": 0}
    times = {"compute_s": 0.7, "exchange_s": 0.1, "wait_s": 0.2, "data_s": 0.0}
    return Event(kind="ticks", member=member, step=step, time=float(step), values=standard | times | values)


def result(**changes: Any) -> dict[str, Any]:
    return {
        "loss": 2.44,
        "train_loss": 2.39,
        "accuracy": 0.9712,
        "steps": 300,
        "seconds": 41.2,
        "examples_per_s": 523.4,
        "bytes_sent": 25_000_000,
        "world": 2,
        "run_dir": "runs/a",
        "notes": {"unigram entropy": 3.31},
    } | changes


# plan


def test_plan_is_compact_and_tells_what_travels() -> None:
    text = text_of(render_plan(make_plan()))
    assert len(text.splitlines()) <= 25
    assert max(map(len, text.splitlines())) <= 80
    flat = " ".join(text.split())
    for told in (
        "codelm · allreduce · 2 workers · local · stable",
        "3.26M parameters · float32 · 98,765 examples to train on, 7,654 held out",
        "who talks to whom all workers with all",
        "12.5 MB a step from each: gradients (float32), 2 workers, over shm",
        "(1 s at 100 Mbit/s, 100 ms at 1 Gbit/s)",  # 12.5 MB are 100 Mbit
        "52 MB each: parameters 13 MB + gradients 13 MB + optimizer 26 MB",
        "300 steps of 16 examples = 0.43 epochs",
        "link = shm: all workers are on this host",
        "running statistics are averaged at saves",
    ):
        assert told in flat
    assert "buffers" not in flat  # nothing in them


def test_members_that_do_the_same_share_a_row() -> None:
    others = make_plan(8).members[1:]
    other = MemberPlan(role="worker", member=0, device="cpu", does="trains and saves", examples_per_step=8, memory={})
    assert "workers 0-7  cpu · 8 examples a step · trains" in text_of(render_plan(make_plan(8)))
    text = text_of(render_plan(make_plan(8, members=[other, *others])))
    assert "worker 0     cpu · 8 examples a step · trains and saves" in text
    assert "workers 1-7  cpu · 8 examples a step · trains\n" in text
    assert "52 MB workers 1-7: parameters" in text


def test_links_that_carry_the_same_share_a_row() -> None:
    links = [
        LinkPlan(members=f"worker {i} -> worker {i + 1}", carrier="tcp", bytes_per_step=1000, what="activations")
        for i in range(3)
    ]
    flat = " ".join(text_of(render_plan(make_plan(4, links=links))).split())
    assert flat.count("activations") == 1
    assert "worker 0 -> worker 1 … worker 2 -> worker 3 (3 links)" in flat


def test_several_choices_stand_under_one_label() -> None:
    text = text_of(render_plan(make_plan(choices={"link": "shm: one host", "device": "cpu: no GPU was found"})))
    assert "auto         link = shm: one host\n             device = cpu: no GPU was found\n" in text


def test_frozen_parameters_are_told() -> None:
    assert "3.26M parameters (5,130 trained)" in text_of(render_plan(make_plan(num_trainable=5130)))


def test_markup_in_a_plan_is_only_text() -> None:
    assert "see [red]x[/red]" in text_of(render_plan(make_plan(notes=["see [red]x[/red]"])))


# live view


@pytest.mark.parametrize("force_terminal", [False, True])
def test_not_interactive_means_no_control_code_whatever_happens(force_terminal: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=force_terminal, width=80)
    clock = Clock()
    with LiveView(make_plan(), console, interactive=False, clock=clock) as view:
        for kind, values in KINDS:
            clock.now += LINE_EVERY_S
            view.on_event(Event(kind=kind, member=0, step=2, values=values))
        view.on_output(1, "said \x1b[31mred\x1b[0m\nand more\n")
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", text)
    assert text.splitlines() == [
        "step 2/300 (1 %)  loss nan  32 examples/s  compute 60 %  communication 20 %  waiting 20 %  data 0 %",
        "step 2: held-out loss nan  accuracy 0.5000",
        "step 2: saved 1 kB in 100 ms",
        "step 2: worker 1 takes 6 [of] 16",
        "resumed at step 2 from runs/x/checkpoints/2",
        "worker 0 failed: boom [red]",
        "restart 1, from step 2",
        "warning: hot red [bold]",
        "step 2: stopped, asked to",
        text.splitlines()[9],
        text.splitlines()[10],
        "1| said red",
        "1| and more",
    ]


@pytest.mark.parametrize("interactive", [False, True])
def test_every_kind_is_accepted_also_as_read_back_from_the_log(interactive: bool, tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    for kind, values in KINDS:
        log.write(Event(kind=kind, member=0, step=2, values=values))
    log.close()
    console = Console(file=io.StringIO(), force_terminal=interactive, width=80)
    with LiveView(make_plan(), console, interactive) as view:
        for event in read_events(tmp_path / "events.jsonl"):
            view.on_event(event)
    assert view.summary.step == 2
    assert len(text_of(closing_summary(result(loss=None, train_loss=None), view.summary, view.plan))) > 0


def test_a_plain_line_comes_every_few_seconds_only() -> None:
    console = Console(file=io.StringIO(), width=80)
    clock = Clock()
    with LiveView(make_plan(), console, interactive=False, clock=clock) as view:
        for step in range(1, 101):
            clock.now = step * 0.1
            view.on_event(ticks(0, step))
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert [line.split("  ")[0] for line in lines] == ["step 50/300 (17 %)", "step 100/300 (33 %)"]
    assert lines[0].endswith("4 min 10 s left")  # 250 steps at 1 step a second, by the events' clock


def test_the_picture_is_redrawn_at_most_four_times_a_second() -> None:
    clock = Clock()
    drawn: list[float] = []
    view = LiveView(make_plan(), Console(file=io.StringIO(), force_terminal=True), interactive=True, clock=clock)
    picture = view._picture
    view._picture = lambda: drawn.append(clock.now) or picture()  # type: ignore[func-returns-value,method-assign]
    with view:
        drawn.clear()
        for step in range(1, 101):
            clock.now = step / 64  # exact in binary
            view.on_event(ticks(step % 2, step))
        inside = list(drawn)
    assert inside == [k * REFRESH_S for k in range(1, 7)]


def test_the_picture_shows_progress_loss_evaluation_speed_and_every_member() -> None:
    clock = Clock()
    view = LiveView(make_plan(), Console(file=io.StringIO()), interactive=False, clock=clock)
    assert "starting: 0 of 2 members are up" in text_of(view._picture())
    for step in range(1, 151):
        view.on_event(ticks(0, step))
        view.on_event(ticks(1, step, compute_s=0.9, wait_s=0.0))
    view.on_event(Event(kind="eval", step=100, values={"loss": 2.5, "accuracy": 0.9672}))
    clock.now = 65.0
    for width in (80, 120):
        text = text_of(view._picture(), width)
        lines = text.splitlines()
        assert max(map(len, lines)) <= width
        assert "1 min 05 s so far" in text
        assert "150 of 300  ━" in text
        assert "50 %  2 min 30 s left" in text
        assert "loss 2.500  accuracy 0.9672  at step 100" in text
        assert "16 examples/s · 1 steps/s" in text
        assert re.search(r"worker 0  █+▓+▒+ +70 % +10 % +20 % +0 %", text)
        assert re.search(r"worker 1  █+▓+ +90 % +10 % +0 % +0 %", text)


def test_of_many_members_the_mean_and_those_who_wait_least_are_shown() -> None:
    view = LiveView(make_plan(64), Console(file=io.StringIO()), interactive=False)
    for member in range(64):
        wait_s = 0.0 if member == 40 else 0.2
        view.on_event(ticks(member, 1, wait_s=wait_s))
    shown = re.findall(r"^(mean of 64|worker \d+)", text_of(view._picture()), flags=re.MULTILINE)
    assert len(shown) == MAX_ROWS
    assert shown[:2] == ["mean of 64", "worker 40"]


@pytest.mark.parametrize("fails", [False, True])
def test_the_picture_goes_when_all_is_well_and_stays_when_not(fails: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    try:
        with LiveView(make_plan(), console, interactive=True) as view:
            view.on_event(ticks(0, 1))
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    erase = "\x1b[2K"
    tail = console.file.getvalue().rpartition("worker 0")[2]  # type: ignore[attr-defined]
    assert (erase in tail) is not fails


def test_warnings_and_failures_are_told_once() -> None:
    console = Console(file=io.StringIO(), width=80)
    with LiveView(make_plan(), console, interactive=False) as view:
        for member in (1, 0):
            view.on_event(Event(kind="warning", member=member, values={"text": "hot"}))
        view.on_event(Event(kind="failed", member=1, values={"cause": "boom", "traceback": ""}))
        view.on_event(Event(kind="failed", member=0, values={"cause": "connection reset", "traceback": ""}))
        view.on_event(Event(kind="restarted", values={"attempt": 1, "from_step": 0}))
        view.on_event(Event(kind="failed", member=0, values={"cause": "again", "traceback": ""}))
    assert console.file.getvalue().splitlines() == [  # type: ignore[attr-defined]
        "warning: hot",
        "worker 1 failed: boom",
        "restart 1, from step 0",
        "worker 0 failed: again",
    ]


# closing summary


def closed() -> Summary:
    summary = Summary()
    for step in range(1, 301):
        for member in range(2):
            summary.add(ticks(member, step, loss=[2 + 3 / step], bytes_sent=1000 * (member + 1)))
    summary.add(Event(kind="saved", step=300, values={"path": "x", "seconds": 0.1, "bytes": 39_000_000}))
    return summary


def test_closing_summary_of_a_finished_run() -> None:
    text = text_of(closing_summary(result(), closed(), make_plan()))
    assert len(text.splitlines()) <= 13
    flat = " ".join(text.split())
    for told in (
        "codelm · allreduce · 2 workers · local · done",
        "held-out loss 2.440 accuracy 0.9712",
        "0.87 below unigram entropy 3.31",
        "300 steps in 41.2 s · 523 examples/s",
        "compute 70 % communication 10 % waiting 20 % data 0 %",
        "900 kB in all · 1 kB to 2 kB a step from each",
        "1 saved, the last at step 300 (39 MB)",
        "run folder runs/a",
        "weft diff runs/a OTHER_RUN",
    ):
        assert told in flat
    assert "weft resume" not in flat
    assert re.search(r"[\u2801-\u28ff].* 2\.390$", text, flags=re.MULTILINE)


def test_shares_and_bottleneck_stand_in_the_live_view_and_at_the_end() -> None:
    summary = closed()
    summary.add(Event(kind="balance", member=0, step=17, values={"shares": [9, 7], "reason": ""}))
    summary.add(Event(kind="balance", member=0, step=34, values={"shares": [10, 6], "reason": ""}))
    said = "waiting for worker 1: --balance auto has [done] what it can"
    flat = " ".join(text_of(closing_summary(result(bottleneck=said), summary, make_plan())).split())
    assert "shares 10 + 6 of 16 examples · changed 2 times" in flat
    assert f"bottleneck {said}" in flat
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with LiveView(make_plan(), console, interactive=True) as view:
        view.on_event(ticks(0, 1))
        view.on_event(Event(kind="balance", member=0, step=17, values={"shares": [1] * 9 + [3], "reason": "so it is"}))
        drawn = console.file.getvalue()  # type: ignore[attr-defined]
    assert "step 17: so it is" in drawn
    assert "1 to 3 of 12 examples · changed once" in drawn


def test_closing_summary_of_a_stopped_run_says_how_to_go_on() -> None:
    flat = " ".join(text_of(closing_summary(result(steps=120), Summary(), make_plan())).split())
    assert "stopped at step 120 of 300" in flat
    assert "weft resume runs/a" in flat


def test_a_loss_above_its_yardstick_is_told_and_other_notes_are_just_shown() -> None:
    notes = {"unigram entropy": 2.0, "classes": 10.0}
    assert "0.44 ABOVE unigram entropy 2; classes 10" in text_of(
        closing_summary(result(notes=notes), closed(), make_plan())
    )


# errors

TRACEBACK = """Traceback (most recent call last):
  File "/x/site-packages/weft/member.py", line 88, in main
    drive(points)
  File "/home/me/mine.py", line 12, in loss
    return F.cross_entropy(model(x), y)
ValueError: sizes differ
"""


def test_a_member_s_failure_leads_with_the_cause_then_its_traceback_then_what_to_do() -> None:
    echoes = "(then, because of it: worker 0, 2: PeerLost)"
    hint = "Go on from the newest checkpoint with: weft resume runs/x"
    error = MemberFailed(
        f"worker 1 failed at step 5: ValueError: sizes differ\n{echoes}\n{hint}",
        member=1,
        cause="ValueError: sizes differ",
        traceback=TRACEBACK,
    )
    lines = text_of(render_error(error)).splitlines()
    assert lines[0] == "error: worker 1 failed at step 5: ValueError: sizes differ"
    assert lines[1] == "  traceback of member 1:"
    assert [line[2:] for line in lines[2:-2]] == TRACEBACK.splitlines()
    assert lines[-2:] == [echoes, hint]
    colored = text_of(render_error(error), force_terminal=True, color_system="standard", no_color=False)
    assert f"\x1b[2m{echoes}" in colored
    assert f"\n{hint}" in colored


def test_library_frames_are_dim_and_the_user_s_are_not() -> None:
    error = MemberFailed("worker 1 failed", member=1, traceback=TRACEBACK)
    text = text_of(render_error(error), force_terminal=True, color_system="standard", no_color=False)
    assert re.search(r"\x1b\[2m *File \"/x/site-packages", text.replace("  \x1b[2m", "\x1b[2m"))
    assert re.search(r"^ +File \"/home/me/mine.py\"", text, flags=re.MULTILINE)


def test_a_cause_of_several_lines_is_no_echo() -> None:
    cause = "TaskError: Mine.loss returned a list\nwrite:\n  return x.mean()"
    lines = text_of(render_error(MemberFailed(f"worker 0 failed: {cause}", member=0, cause=cause))).splitlines()
    assert lines == [
        "error: worker 0 failed: TaskError: Mine.loss returned a list",
        "write:",
        "  return x.mean()",
    ]


def test_a_cause_that_the_message_leaves_out_is_told() -> None:
    lines = text_of(render_error(MemberFailed("worker 0 died", member=0, cause="killed by SIGKILL"))).splitlines()
    assert lines == ["error: worker 0 died", "killed by SIGKILL"]


def test_a_config_error_shows_its_message_whole_and_nothing_else() -> None:
    error = ConfigError("wrong [bold]\nwrite:\n    x = 1")
    error.__cause__ = KeyError("x")
    assert text_of(render_error(error)).splitlines() == ["error: wrong [bold]", "write:", "    x = 1"]


def test_soft_wrapped_errors_keep_their_lines_whole() -> None:
    error = UnknownName.of("pattern", "alreduce", [f"pattern-{i}" for i in range(20)])
    console = Console(file=io.StringIO(), width=40)
    console.print(render_error(error), soft_wrap=True)
    assert console.file.getvalue() == f"error: {error.message}\n"  # type: ignore[attr-defined]


def test_an_interrupt_is_no_error() -> None:
    assert text_of(render_error(Interrupted("stopped at step 5: weft resume runs/a"))).startswith("stopped at step 5")


# lists


def test_patterns_and_tasks_show_every_option_with_type_default_and_doc() -> None:
    options = [("every", "int", "10", "steps between exchanges"), ("clip", "float|none", "None", "")]
    rows: list[dict[str, Any]] = [
        {"name": "local-sgd", "tier": "beta", "summary": "Train alone, then average.", "options": options},
        {"name": "allreduce", "tier": "stable", "summary": "Average gradients.", "options": []},
    ]
    assert text_of(render_patterns(rows)) == (
        "local-sgd beta\n"
        "  Train alone, then average.\n"
        "    -o every=10   steps between exchanges (int)\n"
        "    -o clip=None  (float|none)\n"
        "\n"
        "allreduce stable\n"
        "  Average gradients.\n"
    )
    tasks = [{"name": "digits", "summary": "Scanned digits.", "options": [("width", "int", "16", "channels")]}]
    assert text_of(render_tasks(tasks)) == "digits\n  Scanned digits.\n    -t width=16  channels (int)\n"


# pieces


@given(st.lists(st.floats(0, 1e6), min_size=4, max_size=4), st.integers(1, 100))
def test_a_bar_fills_its_width_and_no_part_is_off_by_a_cell(seconds: list[float], width: int) -> None:
    bar = share_bar(dict(zip(SHARES, seconds, strict=True)), width)
    assert bar.cell_len == width
    if sum(seconds) > 0:
        for glyph, part in zip("█▓▒░", seconds, strict=True):
            assert abs(bar.plain.count(glyph) - part / sum(seconds) * width) < 1 + 1e-6


def test_a_curve_falls_from_the_top_left_to_the_bottom_right() -> None:
    assert braille_curve([3, 2, 1, 0], 2, 1) == ["⠑⢄"]
    assert braille_curve([1, 0], 1, 2) == ["⢱", "⢸"]  # one dot, then the whole way down


def test_curves_keep_their_size_and_leave_gaps() -> None:
    assert braille_curve([], 5, 2) == ["", ""]
    assert braille_curve([1.0] * 4, 2, 1) == ["⣀⣀"]
    assert braille_curve([1.0, math.nan, math.nan, 1.0], 2, 1) == ["⡀⢀"]
    assert braille_curve([1.0, math.nan, math.nan, 0.0], 2, 1) == ["⠁⢀"]  # no line across
    assert [len(line) for line in braille_curve([5.0, 1.0, 3.0], 7, 3)] == [7, 7, 7]
