"""The terminal's side of a run: plan, live view, closing summary, errors, lists. Plain data in, rich renderables out.

Refreshes take time from the workers, who own the cores: at most 4 a second, none without an event, no thread.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.text import Text

from weft.errors import Interrupted, MemberFailed, WeftError
from weft.events import Event
from weft.plan import Plan
from weft.report.human import (
    format_bytes,
    format_count,
    format_members,
    format_metric,
    format_seconds,
    format_share,
    plan_examples,
    plan_length,
    plan_size,
)
from weft.report.summary import RESULT_KEYS, SHARES, Summary, number
from weft.report.widgets import SHARE_LOOK, Curve, Facts, Progress, share_bar

T = TypeVar("T")
K = TypeVar("K")

REFRESH_S = 0.25
LINE_EVERY_S = 5.0
MAX_ROWS = 8  # members shown one by one in the live view
TIER_STYLE = {"stable": "green", "beta": "yellow", "contrib": "magenta"}


# ------------------------------------------------------------------------------------------------------------- plan


def render_plan(plan: Plan) -> RenderableType:
    """About 20 lines at 80 columns: what runs where, what travels, what it takes."""
    training: list[tuple[str, RenderableType]] = [
        ("length", plan_length(plan)),
        ("checkpoints", plan.checkpoints),
        *(("auto", Text.assemble((name, "bold"), f" = {why}")) for name, why in plan.choices.items()),
        *(("note", note) for note in plan.notes),
    ]
    return Group(
        _title(plan, _tier(plan.tier)),
        Text(f"{plan_size(plan)} · {plan.dtype} · {plan_examples(plan)}"),
        Text(),
        Facts(plan.answers.items()),
        Text(),
        Facts([*_member_facts(plan), *_link_facts(plan), *_memory_facts(plan), *_step_facts(plan)]),
        Text(),
        Facts(training),
    )


def _member_facts(plan: Plan) -> list[tuple[str, str]]:
    """One row for members that do the same."""
    alike = _group_by(plan.members, lambda m: (m.role, m.device, m.does, m.examples_per_step))
    return [
        (
            format_members(role, [m.member for m in members]),
            " · ".join([device, *([f"{examples:,} examples a step"] if examples else []), does]),
        )
        for (role, device, does, examples), members in alike.items()
    ]


def _link_facts(plan: Plan) -> list[tuple[str, Text]]:
    alike = _group_by(plan.links, lambda link: (link.carrier, link.bytes_per_step, link.what))
    rows = []
    for (carrier, num_bytes, what), links in alike.items():
        who = links[0].members
        if len(links) > 1:
            who += f" … {links[-1].members} ({len(links)} links)"
        text = Text.assemble((format_bytes(num_bytes), "bold"), f" a step from each: {what}, {who}, over {carrier}")
        if num_bytes:
            slow, fast = (format_seconds(8 * num_bytes / bits_per_s) for bits_per_s in (100e6, 1e9))
            text.append(f" ({slow} at 100 Mbit/s, {fast} at 1 Gbit/s)", "dim")
        rows.append(("sends", text))
    return rows


def _memory_facts(plan: Plan) -> list[tuple[str, Text]]:
    alike = _group_by(plan.members, lambda m: (m.role, tuple(m.memory.items())))
    rows = []
    for (role, memory), members in alike.items():
        who = "each" if len(alike) == 1 else format_members(role, [m.member for m in members])
        parts = " + ".join(f"{purpose} {format_bytes(n)}" for purpose, n in memory if n)
        rows.append(("memory", Text.assemble((format_bytes(sum(n for _, n in memory)), "bold"), f" {who}: {parts}")))
    return rows


def _step_facts(plan: Plan) -> list[tuple[str, Text]]:
    if plan.step is None:
        return []
    parts = " + ".join(f"{what} {format_seconds(seconds)}" for what, seconds in plan.step.seconds.items() if seconds)
    predicted = f"{format_seconds(plan.step.whole_s)} predicted: {parts} ({plan.step.link})"
    if plan.step.tried_s:
        return [("step", Text.assemble((format_seconds(plan.step.tried_s), "bold"), f" in a trial; {predicted}"))]
    return [("step", Text(predicted))]


# -------------------------------------------------------------------------------------------------------- live view


class LiveView:
    """Shows a run while it goes. ``with LiveView(plan, console, interactive) as view: view.on_event(event) ...``

    ``interactive``: a picture redrawn in place, gone at the end (left standing when the run fails); otherwise a plain
    line every few seconds and at evaluations, saves and restarts, without any control code. Call from one thread.
    ``clock`` is in seconds.
    """

    def __init__(
        self, plan: Plan, console: Console, interactive: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.plan = plan
        self.summary = Summary()
        self._console = console
        self._clock = clock
        self._start = self._shown = clock()
        self._saved = Text()
        self._live = Live(console=console, auto_refresh=False, transient=True) if interactive else None

    def __enter__(self) -> Self:
        self._start = self._shown = self._clock()
        if self._live:
            self._live.start()
            self._draw()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._live:
            self._draw()
            self._live.transient = kind is None
            self._live.stop()

    def on_event(self, event: Event) -> None:
        news = self._news(event)
        self.summary.add(event)
        if news is None:
            self.on_idle()
        elif not self._live:
            self._print_plain(news.plain)
        elif event.kind == "saved":
            self._saved = news
            self.on_idle()
        elif event.kind == "eval":
            self._draw()
        else:
            self._live.console.print(news)  # stays, above the picture
            self._draw()

    def on_output(self, member: int, text: str) -> None:
        """What a member printed."""
        for line in text.splitlines():
            shown = Text.assemble((f"{member}| ", "dim"), Text.from_ansi(line))
            if self._live:
                self._live.console.print(shown)
            else:
                self._print_plain(shown.plain)

    def on_idle(self) -> None:
        """Show the present state if the last one has stood long enough; to be called while no event comes, too."""
        waited = self._clock() - self._shown
        if self._live and waited >= REFRESH_S:
            self._draw()
        elif not self._live and waited >= LINE_EVERY_S and self.summary.members:
            self._print_plain(self._line())
            self._shown = self._clock()

    def _news(self, event: Event) -> Text | None:
        """What an event tells a person, in a line; None if it only moves the figures or repeats what was said."""
        values, step = event.values, event.step
        match event.kind:
            case "eval":
                return Text(f"step {step}: held-out {_metrics(values)}")
            case "saved":
                seconds = format_seconds(values["seconds"])
                return Text(f"step {step}: saved {format_bytes(values['bytes'])} in {seconds}")
            case "balance":
                return Text(f"step {step}: {values['reason']}")
            case "equivalence":
                return Text(f"{values['text']}: {values['detail']}")
            case "resumed":
                return Text(f"resumed at step {values['step']} from {values['path']}", "bold")
            case "restarted":
                return Text(f"restart {values['attempt']}, from step {values['from_step']}", "bold yellow")
            case "warning" if values["text"] not in self.summary.warnings:
                return Text(f"warning: {values['text']}", "yellow")
            case "failed" if not self.summary.failures:  # the later ones are echoes
                cause = values["cause"].partition("\n")[0]
                return Text(f"{format_members(event.role, [event.member])} failed: {cause}", "bold red")
            case "stopped":
                return Text(f"step {step}: stopped, {values['reason']}", "yellow")
        return None

    def _print_plain(self, line: str) -> None:
        line = Text.from_ansi(line).plain  # a message may quote control codes
        self._console.print(line, style=None, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def _line(self) -> str:
        s = self.summary
        parts = [
            f"step {s.step}/{self.plan.steps} ({format_share(s.step / max(1, self.plan.steps))})",
            f"loss {format_metric(s.loss)}",
            f"{format_count(s.examples_per_s)} examples/s",
            _shares_text(s.shares).plain,
        ]
        return "  ".join([*parts, f"{left} left"] if (left := self._left()) else parts)

    def _left(self) -> str:
        speed = self.summary.steps_per_s
        return format_seconds(round((self.plan.steps - self.summary.step) / speed)) if speed else ""

    def _draw(self) -> None:
        assert self._live is not None
        self._live.update(self._picture(), refresh=True)
        self._shown = self._clock()

    def _picture(self) -> RenderableType:
        s, steps = self.summary, self.plan.steps
        title = _title(self.plan, Text(f"{format_seconds(round(self._clock() - self._start))} so far", "dim"))
        if not s.members:
            return Group(title, Text(f"starting: {len(s.started)} of {len(self.plan.members)} members are up", "dim"))
        done = format_share(s.step / max(1, steps))
        left = self._left()
        rows: list[tuple[str, RenderableType]] = [
            ("step", Progress(s.step, steps, f"{done}  {left} left" if left else done)),
            ("loss", Curve(s.curve.points, 2, s.loss)),
        ]
        if s.evals:
            at, metrics = s.evals[-1]
            rows.append(("held-out", Text.assemble((_metrics(metrics), "bold"), (f"  at step {at}", "dim"))))
        speed = f"{format_count(s.examples_per_s)} examples/s"
        rows.append(("speed", f"{speed} · {format_count(s.steps_per_s)} steps/s" if s.steps_per_s else speed))
        if s.balances:
            rows.append(("shares", _shares_of_batch(s)))
        return Group(title, Facts(rows), Text(), _MemberShares(s), self._saved)


class _MemberShares:
    """Where each member's time goes: a stacked bar and percentages, a row a member.

    Of many members: their mean, then those who wait least, as it is they for whom the others wait.
    """

    def __init__(self, summary: Summary) -> None:
        self.summary = summary

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        members = sorted(self.summary.members.items())
        rows: list[tuple[str, dict[str, float]]] = []
        if len(members) > MAX_ROWS:
            rows.append((f"mean of {len(members)}", self.summary.shares))
            members = sorted(members, key=lambda item: item[1].shares["waiting"])[: MAX_ROWS - 1]
        rows += [(f"{role} {member}", totals.shares) for (role, member), totals in members]
        margin = max(len(label) for label, _ in rows) + 2
        bar_width = max(10, min(options.max_width - margin - sum(len(name) + 2 for name in SHARES), 60))
        names = (Text(f"  {name}", SHARE_LOOK[name][1]) for name in SHARES)
        yield Text.assemble(" " * (margin + bar_width), *names)
        for label, shares in rows:
            percents = "".join(f"{format_share(share):>{len(name) + 2}}" for name, share in shares.items())
            yield Text.assemble((label.ljust(margin), "dim"), share_bar(shares, bar_width), percents)


# --------------------------------------------------------------------------------------------------- closing summary


def closing_summary(result: Mapping[str, Any], summary: Summary, plan: Plan) -> RenderableType:
    """What came out, in about ten lines. ``result`` is the run's result.json; metrics have keys of their own in it."""
    loss = number(result["loss"])
    notes: Mapping[str, float] = result.get("notes") or {}
    metrics = {"loss": loss} | {k: v for k, v in result.items() if k not in RESULT_KEYS and isinstance(v, int | float)}
    rows: list[tuple[str, RenderableType]] = [("held-out", Text(_metrics(metrics), "bold"))]
    if notes:
        rows.append(("", "; ".join(_note(name, value, loss) for name, value in notes.items())))
    rows.append(("train loss", Curve(summary.curve.points, 3, number(result["train_loss"]))))
    speed = f"{format_count(result['steps'])} steps in {format_seconds(result['seconds'])} · "
    rows.append(("speed", speed + f"{format_count(result['examples_per_s'])} examples/s"))
    if summary.members:
        rows += [("time", _shares_text(summary.shares)), ("sent", _sent(summary))]
    if summary.memory:
        rows.append(("memory", _memory(summary, plan)))
    if summary.balances:
        rows.append(("shares", _shares_of_batch(summary)))
    if result.get("equivalence"):
        rows.append(("checked", result["equivalence"]))
    if result.get("bottleneck"):
        rows.append(("bottleneck", Text(result["bottleneck"], "bold")))
    rows += [
        ("checkpoints", _checkpoints(summary)),
        ("run folder", Text(result["run_dir"], "bold")),
        ("go on", Text(_next_commands(result, plan), "cyan")),
    ]
    done = "done" if result["steps"] >= plan.steps else f"stopped at step {result['steps']} of {plan.steps}"
    return Group(_title(plan, Text(done, "bold green" if done == "done" else "bold yellow")), Facts(rows))


def _note(name: str, value: float, loss: float) -> str:
    """A note of an entropy or a loss is a yardstick of the loss: say how far below it the result is."""
    text = f"{name} {value:.4g}"
    if "entropy" not in name and "loss" not in name:
        return text
    gap = value - loss
    return f"{abs(gap):.2f} {'below' if gap >= 0 else 'ABOVE'} {text}" if math.isfinite(gap) else text


def _sent(summary: Summary) -> str:
    each = [m.bytes_per_step for m in summary.members.values()]
    least, most = format_bytes(min(each)), format_bytes(max(each))
    between = least if least == most else f"{least} to {most}"
    return f"{format_bytes(summary.bytes_sent)} in all · {between} a step from each"


def _memory(summary: Summary, plan: Plan) -> str:
    """Of the member that took most."""
    who, most = max(summary.memory.items(), key=lambda item: item[1])
    predicted = next((sum(m.memory.values()) for m in plan.members if (m.role, m.member) == who), 0)
    return f"{format_bytes(most)} at most in a step of one worker · {format_bytes(predicted)} predicted"


def _shares_of_batch(summary: Summary) -> str:
    """Of each batch, by worker; of many workers the least and the most."""
    shares = summary.balances[-1][1]
    shown = " + ".join(map(str, shares)) if len(shares) <= MAX_ROWS else f"{min(shares)} to {max(shares)}"
    times = f"{n} times" if (n := len(summary.balances)) > 1 else "once"
    return f"{shown} of {sum(shares)} examples · changed {times}"


def _checkpoints(summary: Summary) -> str:
    saves = summary.saves
    text = f"{len(saves)} saved"
    if saves:
        text += f", the last at step {saves[-1].step} ({format_bytes(saves[-1].values['bytes'])})"
    if summary.restarts:
        text += f" · restarted from step {', '.join(map(str, summary.restarts))}"
    return text


def _next_commands(result: Mapping[str, Any], plan: Plan) -> str:
    """A finished run is not resumed but compared."""
    run = result["run_dir"]
    return f"weft resume {run}" if result["steps"] < plan.steps else f"weft diff {run} OTHER_RUN"


# ------------------------------------------------------------------------------------------------------------ errors


def render_error(error: WeftError) -> RenderableType:
    """The cause in red; where a member raised, its traceback with library frames dimmed, then the echoes in a line.

    Print it with ``soft_wrap=True``: the terminal wraps, and copied or searched lines are whole.
    """
    if isinstance(error, Interrupted):
        return Text(error.message, "yellow")
    cause, after = error.message, ""
    if isinstance(error, MemberFailed) and error.cause:
        before, found, after = error.message.partition(error.cause)
        cause = before + (found or f"\n{error.cause}")
    first, *more = cause.splitlines() or [type(error).__name__]
    parts = [Text.assemble(("error: ", "bold red"), (first, "red")), *(Text(line) for line in more)]
    if isinstance(error, MemberFailed) and error.traceback and not error.page:
        parts.append(_traceback(f"traceback of member {error.member}:", error.traceback))
    if isinstance(error, MemberFailed) and error.page:
        parts += [Text(f"  {line}".rstrip(), "dim") for line in error.page.splitlines()]
    rest = after.split("\n")[1:]
    if isinstance(error, MemberFailed) and error.page:
        rest = [line for line in rest if line not in error.page]
    parts += [Text(line, "dim" if line.startswith("(then, because of it") else "") for line in rest]
    return Group(*parts)


def _traceback(title: str, text: str) -> Text:
    body = Text.assemble((f"  {title}", "dim"))
    style = ""
    for line in text.rstrip().splitlines():
        if line.startswith("  File "):
            style = "dim" if _is_library(line) else ""
        elif not line.startswith(" "):
            style = "dim" if line.startswith("Traceback") else "bold"
        body.append(f"\n  {line}", style)
    return body


def _is_library(path: str) -> bool:
    return any(part in path for part in ("site-packages", "/weft/", "<frozen ", "/lib/python3"))


# ------------------------------------------------------------------------------------------------------------- lists


def render_patterns(rows: Iterable[Mapping[str, Any]]) -> RenderableType:
    """``rows``: name, tier, summary, options as (name, type, default, doc)."""
    return _list(rows, "-o")


def render_tasks(rows: Iterable[Mapping[str, Any]]) -> RenderableType:
    """``rows``: name, summary, options as (name, type, default, doc)."""
    return _list(rows, "-t")


def _list(rows: Iterable[Mapping[str, Any]], flag: str) -> RenderableType:
    parts: list[RenderableType] = []
    for row in rows:
        head = Text.assemble((row["name"], "bold"))
        if "tier" in row:
            head.append(" ").append_text(_tier(row["tier"]))
        parts += [head, Facts([("", row["summary"])])]
        options = [
            (f"{flag} {name}={default}", Text.assemble(f"{doc} " if doc else "", (f"({kind})", "dim")))
            for name, kind, default, doc in row["options"]
        ]
        parts.append(Facts(options, indent=4, style="cyan"))
        parts.append(Text())
    return Group(*parts[:-1])


# -------------------------------------------------------------------------------------------------------- shared pieces


def _title(plan: Plan, right: Text) -> Text:
    counts = Counter(m.role for m in plan.members)
    who = " + ".join(f"{n} {role}{'s' if n > 1 else ''}" for role, n in counts.items())
    return Text.assemble((plan.task, "bold"), " · ", (plan.pattern, "bold"), f" · {who} · {plan.cluster} · ", right)


def _tier(tier: str) -> Text:
    return Text(tier, TIER_STYLE.get(tier, ""))


def _metrics(metrics: Mapping[str, float | None]) -> str:
    return "  ".join(f"{name} {format_metric(number(value))}" for name, value in metrics.items())


def _shares_text(shares: Mapping[str, float]) -> Text:
    return Text("  ").join(Text(f"{name} {format_share(share)}", SHARE_LOOK[name][1]) for name, share in shares.items())


def _group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups
