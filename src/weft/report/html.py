"""A run as one page that explains it: self-contained, without script, readable offline, on a phone, in print."""

from __future__ import annotations

import datetime
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import msgspec
from markupsafe import Markup

from weft import __version__
from weft.config import PLAN, REPORT, Config, RunFolder
from weft.errors import RunFolderError, WeftError
from weft.events import read_events
from weft.patterns import registry
from weft.plan import Plan
from weft.report.charts import GLYPHS, area_chart, html_table, line_chart, share_bars, share_legend
from weft.report.history import History, Mark, Member, Outcome, Who, spread
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
from weft.report.summary import SHARES
from weft.sections import Chart, Line, Section

MAX_LINES = 8  # members drawn one by one; of more: the least, the median, the greatest
MAX_AREAS = 16
MAX_STRETCHES = 100  # of time
STRETCH_S = 0.5  # members tell of their time some times a second
MAX_EVENTS = 300
OTHER = "other"  # evaluating, saving, starting: what no share tells of

OUTCOMES: dict[Outcome, str] = {
    "finished": "finished",
    "failed": "failed",
    "stopped": "interrupted",
    "going": "still going",
    "lost": "ended without a word",
}


def write_report(run_dir: str | Path, out: Path | None = None) -> Path:
    """The page of a run, in whatever state it is. Raises RunFolderError if there is no run, or nowhere to write."""
    folder = RunFolder.open(run_dir)
    target = out or folder.path / REPORT
    page = render(folder)
    partial = target.with_name(f".{target.name}.part")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot write the report {str(target)!r}: {error.strerror}. Choose another --out."
        ) from error
    return target


def render(folder: RunFolder) -> str:
    config, plan, writer = folder.config(), read_plan(folder), folder.writer()
    history = History(read_events(folder.events) if folder.events.exists() else ())
    page = Page(folder, config, plan, history, writer)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weft.report"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html.j2").render(page=page)


def read_plan(folder: RunFolder) -> Plan | None:
    path = folder.path / PLAN
    try:
        return msgspec.json.decode(path.read_bytes(), type=Plan)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise RunFolderError(f"{str(path)!r} is damaged or of another version of Weft: {error}") from error


class Part(NamedTuple):
    """A section of the page."""

    key: str
    title: str
    body: Markup


class Page:
    """What the template asks for."""

    def __init__(
        self, folder: RunFolder, config: Config, plan: Plan | None, history: History, writer: int | None
    ) -> None:
        self.folder, self.config, self.plan, self.history, self.writer = folder, config, plan, history, writer
        self.result = folder.result() or {}
        self.outcome = history.outcome(writer)
        self.members = dict(sorted(history.members.items()))
        self.stretches = max(1, min(MAX_STRETCHES, int(history.seconds / STRETCH_S)))

    @property
    def title(self) -> str:
        return f"{self.config.task.name} by {self.config.pattern}"

    @property
    def status(self) -> str:
        return OUTCOMES[self.outcome]

    @property
    def limit(self) -> str:
        """What limited the run, and what would help."""
        return str(self.result.get("bottleneck") or "")

    @property
    def told(self) -> str:
        """The outcome in a sentence."""
        h, of = self.history, f" of {self.plan.steps:,}" if self.plan else ""
        match self.outcome:
            case "finished":
                return f"It did all {h.step:,} steps in {format_seconds(h.seconds)}."
            case "going":
                return f"Process {self.writer} is at step {h.step:,}{of}; this page shows the run as it was at {self.made}."
            case "stopped":
                return f"It was stopped at step {h.step:,}{of}, and saved. Go on with: weft resume {self.folder.path}"
            case "failed":
                event = self.history.failure
                assert event is not None
                who = format_members(event.role, [event.member])
                return f"{who} failed after step {h.step:,}{of}: {event.values['cause']}"
            case "lost":
                return f"The last that is known is step {h.step:,}{of}: its launcher was killed, or the machine went down. Go on with: weft resume {self.folder.path}"

    @property
    def made(self) -> str:
        return f"{datetime.datetime.now().astimezone():%Y-%m-%d %H:%M:%S %Z}"

    @property
    def version(self) -> str:
        return __version__

    @property
    def facts(self) -> list[tuple[str, str]]:
        """The figures at the top."""
        h = self.history
        rows = [
            ("workers", str(self.config.workers)),
            ("steps", f"{h.step:,}" + (f" of {self.plan.steps:,}" if self.plan else "")),
            ("time", format_seconds(h.seconds)),
        ]
        for name, stretch in h.evals.items():
            if stretch.values:
                rows.append((f"held-out {name}", format_metric(stretch.values[-1])))
        late = h.loss.values[-50:]
        if late:
            rows.append(("training loss", format_metric(sum(late) / len(late))))
        if self.result.get("examples_per_s"):
            rows.append(("speed", f"{format_count(self.result['examples_per_s'])} examples/s"))
        rows.append(("sent in all", format_bytes(sum(m.num_bytes for m in self.members.values()))))
        if peak := max((_peak(m, "peak_rss_bytes") for m in self.members.values()), default=0.0):
            rows.append(("peak memory", f"{format_bytes(peak)} a process"))
        if h.started_at is not None:
            rows.append(("started", f"{datetime.datetime.fromtimestamp(h.started_at).astimezone():%Y-%m-%d %H:%M:%S}"))
        if equivalence := self.result.get("equivalence"):
            rows.append(("checked", equivalence))
        if h.launches > 1:
            rows.append(("launches", str(h.launches)))
        return rows

    @functools.cached_property
    def parts(self) -> list[Part]:
        found = [
            Part("curves", "Learning", self._curves()),
            Part("time", "Where time went", self._time()),
            Part("traffic", "What travelled", self._traffic()),
            Part("usage", "Processor and memory", self._usage()),
            Part("events", "What happened", self._events()),
            Part("plan", "The plan", self._plan()),
        ]
        for number, section in enumerate(self._own_sections()):
            found.append(Part(f"own{number}", section.title, render_section(section, f"own{number}")))
        return [*found, Part("config", "Settings in full", self._config())]

    # -- sections

    def _curves(self) -> Markup:
        h = self.history
        if not h.loss.steps and not h.evals:
            return _note("No step has ended yet.")
        lines = [Line("training", h.loss.steps, h.loss.values)] if h.loss.steps else []
        held_out = h.evals.get("loss")
        if held_out and held_out.steps:
            lines.append(Line("held-out", held_out.steps, held_out.values, dots=True))
        faint = [Line("", undone.steps, undone.values) for undone in h.undone]
        charts = []
        if lines:
            chart = Chart("Loss", "step", lines)
            charts.append(line_chart("loss", chart, format_metric, faint=faint, noisy=True))
        for number, (name, stretch) in enumerate(h.evals.items()):
            if name != "loss" and stretch.steps:
                line = Line("held-out", stretch.steps, stretch.values, dots=True)
                charts.append(line_chart(f"metric{number}", Chart(f"Held-out {name}", "step", [line]), format_metric))
        return Markup("").join(charts)

    def _time(self) -> Markup:
        if not any(m.ticks for m in self.members.values()):
            return _note("No member has told of its time yet.")
        names = [*SHARES, OTHER]
        rows: list[tuple[str, ...]] = []
        bars: list[tuple[str, dict[str, float]]] = []
        areas: list[Markup] = []
        for who, member in self.members.items():
            if not member.ticks:
                continue
            shares = self._shares(member)
            bars.append((_name(who), shares))
            seconds = {name: member.total(name) for name in SHARES}
            rows.append(
                (
                    _name(who),
                    *(f"{format_seconds(seconds[n])} ({format_share(shares[n])})" for n in SHARES),
                    format_share(shares[OTHER]),
                )
            )
            if len(areas) < MAX_AREAS:
                parts = self._shares_over_time(member)
                key = f"time-{who[0]}-{who[1]}"
                areas.append(area_chart(key, _name(who), parts, self._span, self._loud))
        left_out = len(bars) - len(areas)
        return (
            Markup(
                "<p>Compute is forward, backward and the optimizer; communication is moving and adding up; waiting is for "
                "others to come to an exchange: who waits least is who the others wait for. Other is starting, evaluating and saving: over time, what is left blank.</p>"
            )
            + share_legend(names)
            + share_bars(bars)
            + html_table(["member", *SHARES, OTHER], rows, "Time by member")
            + Markup("<h3>Over time</h3>")
            + self._mark_legend()
            + Markup('<div class="many">{}</div>').format(Markup("").join(areas))
            + (_note(f"{left_out} more members are in the table only.") if left_out > 0 else Markup(""))
        )

    def _shares(self, member: Member) -> dict[str, float]:
        """Of the time since the member's first sign of life in each launch; what was not told of is other."""
        told = {name: member.total(name) for name in SHARES}
        whole = max(self.history.seconds - member.ticks[0].begin, sum(told.values())) or 1.0
        shares = {name: s / whole for name, s in told.items()}
        return shares | {OTHER: max(0.0, 1 - sum(shares.values()))}

    def _shares_over_time(self, member: Member) -> dict[str, list[float]]:
        width = self._span / self.stretches
        parts = {
            name: [
                s / width
                for s in spread(((t.begin, t.end, t.seconds[name]) for t in member.ticks), self._span, self.stretches)
            ]
            for name in SHARES
        }
        for b in range(self.stretches):  # clocks of a tick's ends and of its parts differ by a little
            if (whole := sum(shares[b] for shares in parts.values())) > 1:
                for shares in parts.values():
                    shares[b] /= whole
        return parts

    def _traffic(self) -> Markup:
        members = {w: m for w, m in self.members.items() if m.ticks}
        if not any(m.num_bytes for m in members.values()):
            return _note("Nothing travelled between members.")
        lines = [
            Line(_name(who), *self._rate((t.begin, t.end, t.num_bytes) for t in m.ticks)) for who, m in members.items()
        ]
        chart = Chart("Bytes sent per second", "", _few(lines), from_zero=True)
        rows: list[tuple[object, ...]] = [
            (_name(w), format_bytes(m.num_bytes), format_bytes(m.num_bytes / max(1, m.steps)), m.steps)
            for w, m in members.items()
        ]
        rows.append(("all", format_bytes(sum(m.num_bytes for m in members.values())), "", ""))
        by_member = html_table(["member", "sent", "a step", "steps done"], rows, "Bytes by member")
        links = Markup("")
        if self.plan and self.plan.links:
            alone = len(self.plan.links) == 1
            links = html_table(
                ["link", "carrier", "what", "planned: a step from each", "measured"],
                [
                    (
                        k.members,
                        k.carrier,
                        k.what,
                        format_bytes(k.bytes_per_step),
                        _span([(m.num_bytes if alone else m.sent.get(k.group, 0)) / m.steps for m in members.values()]),
                    )
                    for k in self.plan.links
                ],
                "Bytes by link",
            )
        return self._over_time("traffic", chart, lambda v: f"{format_bytes(v)}/s") + links + by_member

    def _usage(self) -> Markup:
        """Ranks that are threads of one process are one line."""
        processes: dict[Any, tuple[list[Who], list[tuple[float, dict[str, Any]]]]] = {}
        for who, member in self.members.items():
            pids = frozenset(values["pid"] for _, values in member.usage)
            whose, samples = processes.setdefault(pids or who, ([], []))
            whose.append(who)
            samples += member.usage
        rows, labelled = [], []
        for whose, samples in processes.values():
            if not samples:
                continue
            samples.sort(key=lambda s: s[0])
            label = format_members(whose[0][0], [member for _, member in whose])
            labelled.append((label, samples))
            cpu, rss = [v["cpu_percent"] for _, v in samples[1:]], [v["rss_bytes"] for _, v in samples]
            row = [label, _mean(cpu, "{:.0f} %"), f"{max(cpu, default=0):.0f} %", format_bytes(sum(rss) / len(rss))]
            row += [format_bytes(max(v["peak_rss_bytes"] for _, v in samples))]
            if any("gpu_bytes" in v for _, v in samples):
                row += [format_bytes(max(v.get("peak_gpu_bytes", 0) for _, v in samples))]
            rows.append(row)
        if not rows:
            return _note("No member has told what it uses.")
        columns = ["process", "CPU, mean", "CPU, greatest", "memory, mean", "memory, peak"]
        if any(len(row) > len(columns) for row in rows):
            columns.append("GPU memory, peak")
        table = html_table(columns, [[*row, *[""] * (len(columns) - len(row))] for row in rows], "Use by process")
        charts = []
        for key, title, text in (
            ("cpu_percent", "Processor (100 % is one core)", lambda v: f"{v:.0f} %"),
            ("rss_bytes", "Memory (resident)", format_bytes),
            ("gpu_bytes", "GPU memory held", format_bytes),
            ("gpu_percent", "GPU busy (the whole device)", lambda v: f"{v:.0f} %"),
        ):
            lines = [line for label, samples in labelled if (line := _usage_line(label, samples, key)).xs]
            if lines:
                charts.append(self._over_time(key, Chart(title, "", _few(lines), from_zero=True), text))
        return Markup("").join(charts) + table

    def _events(self) -> Markup:
        marks = [m for m in self.history.marks if m.kind != "eval"]
        if not marks:
            return _note("Nothing yet.")
        loud = [m for m in marks if m.kind not in ("saved", "started")]
        room = max(0, MAX_EVENTS - len(loud))
        quiet = [m for m in marks if m.kind in ("saved", "started")]
        shown = loud[-MAX_EVENTS:] + (
            quiet if len(quiet) <= room else quiet[: room // 2] + quiet[len(quiet) - (room - room // 2) :]
        )
        shown.sort(key=lambda m: m.time)
        rows = [
            (
                format_seconds(max(0.0, m.time)),
                m.step,
                Markup('<b class="{}">{} {}</b>').format(m.kind, GLYPHS.get(m.kind, "·"), m.kind),
                m.who,
                m.text,
            )
            for m in shown
        ]
        more = len(marks) - len(shown)
        note = (
            _note(f"{more} checkpoints and starts between are left out; all are in events.jsonl.")
            if more
            else Markup("")
        )
        failure = self.history.failure
        trace = Markup("")
        if failure is not None and failure.values.get("traceback"):
            trace = Markup("<h3>Traceback of {}</h3><pre>{}</pre>").format(
                format_members(failure.role, [failure.member]), failure.values["traceback"].rstrip()
            )
        return html_table(["at", "step", "what", "who", "more"], rows, "Events") + note + trace

    def _plan(self) -> Markup:
        plan = self.plan
        if plan is None:
            return _note("The run ended before its plan was made.")
        members = [
            (_name((m.role, m.member)), m.device, m.does, m.examples_per_step) for m in plan.members[:MAX_EVENTS]
        ]
        memory = []
        for m in plan.members[:MAX_EVENTS]:
            whole = sum(m.memory.values())
            parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in m.memory.items() if n)
            memory.append(
                (_name((m.role, m.member)), format_bytes(whole), parts, *self._measured_memory((m.role, m.member)))
            )
        sizes = [
            (
                "parameters",
                plan_size(plan),
            ),
            ("length", plan_length(plan)),
            ("examples", plan_examples(plan)),
            ("checkpoints", plan.checkpoints),
            *plan.choices.items(),
            *(("note", note) for note in plan.notes),
        ]
        return (
            html_table(["", ""], [*plan.answers.items(), *sizes], f"{plan.task} by {plan.pattern} ({plan.tier})")
            + html_table(["member", "device", "does", "examples a step"], members, "Who does what")
            + html_table(
                ["member", "predicted", "of which", "measured: in a step", "between steps", "whole process"],
                memory,
                "Memory",
            )
            + _note(
                "Measured in the first steps, beyond what the process had before it made the model: at the peak of a step, and between "
                "two. The whole process also holds the data, Python and libraries, and, where it writes checkpoints, what it gathers for "
                "them. On a GPU: torch's tensors, and for the whole process all that torch holds there."
            )
        )

    def _measured_memory(self, who: Who) -> tuple[str, str, str]:
        member = self.members.get(who)
        if member is None:
            return "", "", ""
        inside, between = (
            format_bytes(member.memory[key]) if key in member.memory else "" for key in ("peak_bytes", "held_bytes")
        )
        whole = _peak(member, "peak_gpu_bytes") or _peak(member, "peak_rss_bytes")
        return inside, between, format_bytes(whole) if whole else ""

    def _own_sections(self) -> Sequence[Section]:
        """The pattern's own. A plan of a later version, or settings it refuses, leave the rest of the page as it is."""
        try:
            pattern = registry.build(self.config.pattern, self.config.pattern_options)
        except WeftError as error:
            return [Section(self.config.pattern, f"Its own section is missing: {error}")]
        return pattern.sections(read_events(self.folder.events) if self.folder.events.exists() else ())

    def _config(self) -> Markup:
        text = msgspec.json.format(msgspec.json.encode(self.config, enc_hook=str), indent=2).decode()
        return Markup("<details><summary>config.json</summary><pre>{}</pre></details>").format(text)

    # -- pieces

    @property
    def _span(self) -> float:
        return self.history.seconds or 1.0

    @property
    def _loud(self) -> list[Mark]:
        return [m for m in self.history.marks if m.kind in GLYPHS and m.kind != "finished"]

    def _rate(self, amounts: Iterable[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
        """Amount per second in each stretch of time, as a line with a level for each."""
        width = self._span / self.stretches
        levels = [n / width for n in spread(amounts, self._span, self.stretches)]
        xs = [b * width for b in range(self.stretches + 1)]
        return [x for b in range(self.stretches) for x in xs[b : b + 2]], [n for n in levels for _ in (0, 1)]

    def _over_time(self, key: str, chart: Chart, text: Callable[[float], str]) -> Markup:
        return line_chart(key, chart, text, seconds=self._span, marks=self._loud)

    def _mark_legend(self) -> Markup:
        kinds = [kind for kind in GLYPHS if any(m.kind == kind for m in self._loud)]
        items = Markup("").join(Markup('<li><b class="{}">{}</b> {}</li>').format(k, GLYPHS[k], k) for k in kinds)
        return Markup('<ul class="legend">{}</ul>').format(items) if kinds else Markup("")


def render_section(section: Section, key: str) -> Markup:
    """A pattern's own."""
    body = Markup("<p>{}</p>").format(section.text) if section.text else Markup("")
    for number, chart in enumerate(section.charts):
        body += line_chart(f"{key}-{number}", chart, format_metric)
    for table in section.tables:
        body += html_table(table.columns, table.rows)
    return body


def _usage_line(label: str, samples: Sequence[tuple[float, dict[str, Any]]], key: str) -> Line:
    """A gap where another process took over; the first sample of each has no time behind it to be busy in."""
    xs: list[float] = []
    ys: list[float] = []
    pid = None
    for time, values in samples:
        new, pid = values["pid"] != pid, values["pid"]
        if new and xs:
            xs.append(time)
            ys.append(math.nan)
        if key not in values or (new and key == "cpu_percent"):
            continue
        xs.append(time)
        ys.append(float(values[key]))
    return Line(label, xs, ys, dots=len(xs) < 3)


def _few(lines: list[Line]) -> list[Line]:
    """Too many to tell apart become the least, the median and the greatest, each over equal stretches of x."""
    if len(lines) <= MAX_LINES:
        return lines
    xs = [x for line in lines for x in line.xs]
    low, high = min(xs), max(xs)
    num = max(1, min(MAX_STRETCHES, min(len(line.xs) for line in lines)))
    width = (high - low) / num or 1.0
    columns: list[list[float]] = [[] for _ in range(num)]
    for line in lines:
        for x, y in zip(line.xs, line.ys):
            if math.isfinite(y):
                columns[min(num - 1, int((x - low) / width))].append(y)
    middles = [low + (b + 0.5) * width for b in range(num)]
    picks: dict[str, Callable[[list[float]], float]] = {
        "greatest": max,
        "median": lambda c: sorted(c)[len(c) // 2],
        "least": min,
    }
    return [
        Line(f"{name} of {len(lines)}", middles, [pick(c) if c else math.nan for c in columns])
        for name, pick in picks.items()
    ]


def _name(who: Who) -> str:
    return format_members(who[0], [who[1]])


def _span(bytes_per_step: Sequence[float]) -> str:
    least, most = format_bytes(min(bytes_per_step)), format_bytes(max(bytes_per_step))
    return least if least == most else f"{least} to {most}"


def _peak(member: Member, key: str) -> float:
    return max((float(values.get(key, 0)) for _, values in member.usage), default=0.0)


def _mean(values: Sequence[float], text: str) -> str:
    return text.format(sum(values) / len(values)) if values else "?"


def _note(text: str) -> Markup:
    return Markup('<p class="note">{}</p>').format(text)
