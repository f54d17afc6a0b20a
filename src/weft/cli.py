"""The command line. Every command is a thin call of what Python users call; nothing here imports torch unless it must."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperCommand

from weft.config import CHECKED_STEPS
from weft.errors import CheckpointError, ConfigError, WeftError

if TYPE_CHECKING:
    from weft.clusters.base import Session
    from weft.config import Config

FIRST_WORD_S = 5.0  # rank 0's, before another rank tells of an error

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Train one task under any distributed pattern. Start with: weft run digits --workers 2",
)
ckpt = typer.Typer(no_args_is_help=True, help="Look at the checkpoints of a run.")
app.add_typer(ckpt, name="ckpt")

TaskArgument = Annotated[
    str, typer.Argument(help="a shipped task (see `weft tasks`), path/to/file.py:MyTask or package.module:MyTask")
]
PatternOption = Annotated[str, typer.Option("--pattern", "-p", help="how it is distributed (see `weft patterns`)")]
TaskSettings = Annotated[
    list[str],
    typer.Option(
        "-t", help="an option of the task, key=value; may be given again", default_factory=list, show_default=False
    ),
]
Data = Annotated[str | None, typer.Option(metavar="FILE", help="short for -t data=FILE, a file or a glob in quotes")]
PatternSettings = Annotated[
    list[str],
    typer.Option(
        "-o", help="an option of the pattern, key=value; may be given again", default_factory=list, show_default=False
    ),
]
Workers = Annotated[
    int | None,
    typer.Option("--workers", "-w", help="how many workers [default: 1, or as many as torchrun started]"),
]
Steps = Annotated[int | None, typer.Option(help="length in joined batches")]
Epochs = Annotated[float | None, typer.Option(help="length in passes over the training set (instead of --steps)")]
Batch = Annotated[int | None, typer.Option(help="the joined batch of all workers [default: the task's]")]
Seed = Annotated[int, typer.Option(help="all randomness follows from it")]
Dtype = Annotated[str, typer.Option(help="float32 or float64")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda")]
Partition = Annotated[
    str,
    typer.Option(
        help="who gets which examples: shuffle (dealt anew each epoch), random, stratified, contiguous, dirichlet:0.3, ..."
    ),
]
Balance = Annotated[
    str,
    typer.Option(
        help="none: equal shares of a batch; auto: shares by each worker's measured speed, for the same update"
    ),
]
Compress = Annotated[
    str | None,
    typer.Option(
        help="fewer bytes for what is exchanged: none, int8, topk:0.01, ... (`weft patterns`), or auto: what pays here; short for -o compress="
    ),
]
Link = Annotated[str, typer.Option(help="what carries exchanges: auto, shm, tcp, gloo, nccl")]
Port = Annotated[
    int, typer.Option(help="with --link tcp: worker r listens on port + r of the loopback address (0: any free)")
]
Collective = Annotated[
    str,
    typer.Option(
        help="how messages all-reduce (--link tcp): direct, tree, ring, halving, or auto: by size, world and the link's speed"
    ),
]
Threads = Annotated[int, typer.Option(help="compute threads of each worker")]
Deadline = Annotated[
    float, typer.Option("--deadline", help="seconds that a worker waits for another before the run fails, 0.01 or more")
]
SaveEvery = Annotated[
    int | None, typer.Option(help="steps between checkpoints [default: a tenth of the run; 0: only at the end]")
]
EvalEvery = Annotated[int, typer.Option(help="steps between evaluations on held-out data (0: only at the end)")]
Keep = Annotated[int, typer.Option(help="how many checkpoints are kept")]
Restarts = Annotated[int, typer.Option(help="how often the run may come back by itself after a failure")]
Trace = Annotated[bool, typer.Option("--trace", help="record what each member does when: trace.json, for Perfetto")]
TensorBoard = Annotated[bool, typer.Option("--tensorboard", help="write TensorBoard events into the run folder")]
MetricsPort = Annotated[
    int,
    typer.Option(help="serve Prometheus metrics on this port of the loopback address (0: any free; -1: none)"),
]
CheckEquivalence = Annotated[
    int,
    typer.Option(
        metavar="[K]",
        help=f"first compare K steps with one process's, gradient by gradient, and do not train if they differ [K: {CHECKED_STEPS}]",
        show_default=False,
    ),
]
Tolerance = Annotated[
    float | None,
    typer.Option(
        help="of --check-equivalence: largest difference, relative to the gradient's norm [default: by dtype]"
    ),
]
RunDir = Annotated[Path | None, typer.Option(help="folder of the run [default: a new one in runs/]")]
Cluster = Annotated[
    str,
    typer.Option(
        help="where it runs: local (processes), inprocess (threads), torchrun (the processes it started), or auto: torchrun if it started us, else local"
    ),
]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="under torchrun: let several hosts talk unencrypted and unauthenticated")
]
Json = Annotated[
    bool,
    typer.Option("--json", help="print the result, or the error, as one JSON object, the last line of stdout"),
]
RunArgument = Annotated[Path, typer.Argument(help="the folder of a run")]


class _TrainingCommand(TyperCommand):
    """Typer has no options whose value may be left out."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for here, arg in enumerate(args):
            if arg == "--check-equivalence" and not re.match(r"[-+]?\d", "".join(args[here + 1 : here + 2])):
                args = [*args[:here], f"{arg}={CHECKED_STEPS}", *args[here + 1 :]]
        return super().parse_args(ctx, args)


def _training_command(act: Callable[[Config, Session, _Terminal, Path | None], None]) -> Callable[..., None]:
    """A command that takes everything that describes a run."""

    def command(
        task: TaskArgument,
        t: TaskSettings,
        o: PatternSettings,
        pattern: PatternOption = "allreduce",
        data: Data = None,
        workers: Workers = None,
        steps: Steps = None,
        epochs: Epochs = None,
        batch: Batch = None,
        seed: Seed = 0,
        dtype: Dtype = "float32",
        device: Device = "auto",
        partition: Partition = "shuffle",
        balance: Balance = "none",
        compress: Compress = None,
        link: Link = "auto",
        port: Port = 0,
        collective: Collective = "auto",
        threads: Threads = 1,
        deadline_s: Deadline = 60.0,
        save_every: SaveEvery = None,
        eval_every: EvalEvery = 0,
        keep: Keep = 3,
        restarts: Restarts = 0,
        trace: Trace = False,
        tensorboard: TensorBoard = False,
        metrics_port: MetricsPort = -1,
        insecure: Insecure = False,
        check_equivalence: CheckEquivalence = 0,
        tolerance: Tolerance = None,
        run_dir: RunDir = None,
        cluster: Cluster = "auto",
        json_: Json = False,
    ) -> None:
        from weft.clusters import follows

        request = locals().copy()
        settings = {name: request[name] for name in SETTINGS}
        if data is not None:
            t = [*t, f"data={os.path.abspath(data)}"]  # a resume may start elsewhere
        if compress is not None:
            o = [*o, f"compress={compress}"]
        session, config = _open(task, t, pattern, o, cluster, settings)
        with session, _terminal(json_, follows(config.cluster)) as terminal:
            act(config, session, terminal, run_dir)

    command.__doc__ = act.__doc__
    return command


#: Of the arguments of a training command, those that are fields of Config by the same name.
SETTINGS = (
    *(
        "workers",
        "steps",
        "epochs",
        "batch",
        "seed",
        "dtype",
        "device",
        "partition",
        "balance",
        "link",
        "port",
        "collective",
    ),
    *(
        "threads",
        "deadline_s",
        "save_every",
        "eval_every",
        "keep",
        "restarts",
        "trace",
        "tensorboard",
        "metrics_port",
        "insecure",
        "check_equivalence",
        "tolerance",
    ),
)


def _run(config: Config, session: Session, terminal: _Terminal, run_dir: Path | None) -> None:
    """Train a task, and print what came out."""
    from weft import driver

    terminal.close_with(driver.start(config, session, terminal, run_dir, driver.Interrupts(lasting=True)))


def _explain(config: Config, session: Session, terminal: _Terminal, run_dir: Path | None) -> None:
    """Print the plan of a run and stop: who does what, bytes per step and link, memory per worker."""
    from weft import driver

    if run_dir is not None:
        raise ConfigError(f"run_dir={str(run_dir)!r}: explain writes nothing, leave --run-dir out.")
    plan = driver.explain(config, session, terminal)
    if terminal.as_json:
        import msgspec

        terminal.print_json(msgspec.to_builtins(plan))


app.command("run", cls=_TrainingCommand)(_training_command(_run))
app.command("explain", cls=_TrainingCommand)(_training_command(_explain))


@app.command()
def resume(
    run_dir: RunArgument,
    o: PatternSettings,
    pattern: Annotated[
        str | None, typer.Option("--pattern", "-p", help="another pattern (see `weft patterns`)")
    ] = None,
    compress: Compress = None,
    cluster: Annotated[str | None, typer.Option(help="another place: local, inprocess, torchrun")] = None,
    workers: Annotated[int | None, typer.Option("--workers", "-w", help="another number of workers")] = None,
    balance: Annotated[str | None, typer.Option(help="another way to share a batch: none or auto")] = None,
    link: Annotated[str | None, typer.Option(help="another carrier")] = None,
    port: Annotated[int | None, typer.Option(help="another first port for --link tcp")] = None,
    collective: Annotated[str | None, typer.Option(help="another way to all-reduce by messages")] = None,
    threads: Annotated[int | None, typer.Option(help="compute threads of each worker")] = None,
    save_every: Annotated[int | None, typer.Option(help="steps between checkpoints")] = None,
    eval_every: Annotated[int | None, typer.Option(help="steps between evaluations")] = None,
    keep: Annotated[int | None, typer.Option(help="how many checkpoints are kept")] = None,
    restarts: Annotated[int | None, typer.Option(help="how often the run may come back by itself")] = None,
    deadline: Annotated[float | None, typer.Option(help="seconds that a worker waits for another")] = None,
    trace: Annotated[bool | None, typer.Option(help="record what each member does when")] = None,
    tensorboard: Annotated[bool | None, typer.Option(help="write TensorBoard events")] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="serve Prometheus metrics (0: any free port; -1: none)")
    ] = None,
    insecure: Insecure = False,
    json_: Json = False,
) -> None:
    """Go on with a run from its newest good checkpoint, also under another pattern or with other options of it."""
    from weft import driver
    from weft.clusters import follows, under_torchrun
    from weft.options import parse_assignments

    if compress is not None:
        o = [*o, f"compress={compress}"]
    options = parse_assignments(o, "pattern")
    with _terminal(json_, under_torchrun() and follows("torchrun")) as terminal:
        result = driver.resume(
            run_dir,
            pattern=pattern,
            pattern_options=options,
            cluster=cluster,
            workers=workers,
            balance=balance,
            link=link,
            port=port,
            collective=collective,
            threads=threads,
            save_every=save_every,
            eval_every=eval_every,
            keep=keep,
            restarts=restarts,
            deadline_s=deadline,
            trace=trace,
            tensorboard=tensorboard,
            metrics_port=metrics_port,
            insecure=insecure,
            observer=terminal,
            interrupts=driver.Interrupts(lasting=True),
        )
        terminal.close_with(result)


@app.command()
def probe(
    t: TaskSettings,
    task: Annotated[
        str | None, typer.Argument(help="whose gradients are to be exchanged [default: 25 MB of matrices]")
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", "-w", help="how many workers [default: 2, or as many as torchrun started]"),
    ] = None,
    link: Link = "auto",
    device: Device = "auto",
    threads: Threads = 1,
    deadline_s: Deadline = 60.0,
    insecure: Insecure = False,
    cluster: Cluster = "auto",
    json_: Json = False,
) -> None:
    """Measure every link between workers and every codec: what an exchange takes, and which --compress pays here."""
    from weft.clusters import PRELOAD, follows, pick_cluster

    place = pick_cluster(cluster)
    with place.open(PRELOAD) as session, _terminal(json_, follows(place.name)) as terminal:
        from weft import driver
        from weft.driver.requests import make_probe_config
        from weft.options import parse_assignments

        settings = {"link": link, "device": device, "threads": threads, "deadline_s": deadline_s, "insecure": insecure}
        config = make_probe_config(task, place, parse_assignments(t, "task"), workers, **settings)
        terminal.show_probe(lambda say: driver.probe(config, session, terminal, say))


@app.command()
def diff(
    run_a: RunArgument,
    run_b: RunArgument,
    json_: Json = False,
) -> None:
    """The largest absolute difference of two runs' final parameters, and relative to their global norm."""
    from weft.compare import diff_runs

    found = diff_runs(run_a, run_b)
    if json_:
        _print_json({"max_abs": found.max_abs, "name": found.name, "relative_to_norm": found.relative_to_norm})
    else:
        print(
            f"largest difference {found.max_abs:.3g} (in {found.name}), {found.relative_to_norm:.3g} of the global norm of {run_a}"
        )


@app.command()
def export(
    run_dir: RunArgument,
    to: Annotated[str, typer.Option(help="safetensors, or torch: a state_dict saved by torch.save")] = "safetensors",
    output: Annotated[
        Path | None, typer.Option(help="the file to write [default: model.safetensors or model.pt in the run's folder]")
    ] = None,
    step: Annotated[int | None, typer.Option(help="of this checkpoint [default: the newest good one]")] = None,
    force: Annotated[bool, typer.Option("--force", help="overwrite the file if it exists")] = False,
    json_: Json = False,
) -> None:
    """Write the model of a run to one ordinary file that plain torch reads."""
    from weft.exporting import export as write

    done = write(run_dir, to, output, step=step, force=force)
    for why in done.skipped:
        print(f"warning: skipped a damaged checkpoint: {why}", file=sys.stderr)
    if json_:
        _print_json({"path": str(done.path), "step": done.step, "tensors": done.num_tensors, "bytes": done.bytes})
    else:
        print(f"{done.path}  step {done.step}  {done.num_tensors} tensors  {done.bytes / 1e6:.2f} MB")


@app.command()
def report(
    run_dir: RunArgument,
    out: Annotated[
        Path | None, typer.Option(help="the page to write [default: report.html in the run's folder]")
    ] = None,
) -> None:
    """Write a page that explains a run: curves, where time went, what travelled, what happened. It opens offline."""
    from weft.report.html import write_report

    print(write_report(run_dir, out))


@app.command()
def trace(
    run_dir: RunArgument,
    out: Annotated[
        Path | None, typer.Option(help="the file to write [default: trace.json in the run's folder]")
    ] = None,
) -> None:
    """Join what a traced run has recorded so far; a run does it by itself when it ends, unless its launcher was killed."""
    from weft.config import SPANS, TRACE, RunFolder
    from weft.events import read_events
    from weft.report.trace import merge

    folder = RunFolder.open(run_dir)
    print(merge(folder.path / SPANS, out or folder.path / TRACE, read_events(folder.events)))


@app.command()
def tasks() -> None:
    """The shipped tasks and their options."""
    from weft.loading import load_class
    from weft.options import describe
    from weft.report.terminal import render_tasks
    from weft.tasks import TASKS

    rows = [
        {"name": name, "summary": entry.summary, "options": describe(load_class(entry.target))}
        for name, entry in TASKS.items()
    ]
    Console().print(render_tasks(rows))


@app.command()
def patterns() -> None:
    """What each pattern is for, its options, defaults and support tier."""
    from weft.options import describe
    from weft.patterns.registry import PATTERNS
    from weft.report.terminal import render_patterns

    rows = [{"name": n, "tier": p.tier, "summary": p.summary, "options": describe(p)} for n, p in PATTERNS.items()]
    Console().print(render_patterns(rows))


@ckpt.command("list")
def ckpt_list(run_dir: RunArgument) -> None:
    """The checkpoints of a run, oldest first."""
    from weft.config import RunFolder
    from weft.resilience import checkpoint

    paths = checkpoint.list_checkpoints(RunFolder.open(run_dir).checkpoints)
    for path in paths:
        try:
            manifest = checkpoint.read_manifest(path)
        except CheckpointError as error:
            print(f"{path}  DAMAGED: {error}")
            continue
        size = sum(f.stat().st_size for f in path.iterdir())
        print(f"{path}  step {manifest.step}  {manifest.world} workers  {size / 1e6:.2f} MB")
    if not paths:
        print("no checkpoints yet")


@ckpt.command("verify")
def ckpt_verify(run_dir: RunArgument) -> None:
    """Read every byte of every checkpoint; exit status 1 if one is damaged."""
    from weft.config import RunFolder
    from weft.resilience import checkpoint

    paths = checkpoint.list_checkpoints(RunFolder.open(run_dir).checkpoints)
    bad = 0
    for path in paths:
        problems = checkpoint.verify(path)
        bad += bool(problems)
        print(f"{path}  {'good' if not problems else 'DAMAGED: ' + '; '.join(problems)}")
    if not paths:
        print("no checkpoints yet")
    if bad:
        raise typer.Exit(1)


@app.command()
def version() -> None:
    """The version of Weft."""
    from weft import __version__

    print(__version__)


# -- what the commands share ---------------------------------------------------------------------------------------


def _open(
    task: str, t: list[str], pattern: str, o: list[str], cluster: str, settings: dict[str, Any]
) -> tuple[Any, Any]:
    """Start the cluster first: it imports torch while we import what we need and read the rest of the request."""
    from weft.clusters import PRELOAD, pick_cluster

    place = pick_cluster(cluster)
    session = place.open(PRELOAD)
    try:
        from weft import driver
        from weft.options import parse_assignments

        task_options, pattern_options = parse_assignments(t, "task"), parse_assignments(o, "pattern")
        return session, driver.make_config(task, pattern, place, task_options, pattern_options, **settings)
    except BaseException:
        session.close()
        raise


class _Terminal:
    """Shows a run on the console: on stderr where stdout is for JSON. ``quiet``: another process of the run does."""

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        self.console = Console(stderr=as_json)
        self.view: Any = None
        self.plan: Any = None

    def on_plan(self, plan: Any) -> None:
        from weft.report.terminal import LiveView, render_plan

        self.plan = plan
        self.console.print(render_plan(plan))
        self.view = LiveView(plan, self.console, self.console.is_terminal)

    def on_event(self, event: Any) -> None:
        if self.view is None:
            if event.kind == "warning":
                self.console.print(f"warning: {event.values['text']}", markup=False)
            elif event.kind == "trying":
                self.console.print(event.values["text"], markup=False, highlight=False)
            return
        if event.kind == "plan":
            self.view.__enter__()
        self.view.on_event(event)

    def on_output(self, member: int, text: str) -> None:
        if self.view is not None:
            self.view.on_output(member, text)
        else:
            self.console.print(text.rstrip(), markup=False, highlight=False)

    def on_idle(self) -> None:
        if self.view is not None:
            self.view.on_idle()

    def close_with(self, result: Any) -> None:
        from weft.report.terminal import closing_summary

        if self.view is not None:
            summary = self.view.summary
            self.leave(None)
            self.console.print(closing_summary(result.as_json(), summary, self.plan))
        self.print_json(result.as_json())

    def show_probe(self, measure: Callable[[Callable[[str], None]], Any]) -> None:
        import msgspec

        from weft.payoff import advice
        from weft.report.probe import render_probe

        with self.console.status("measuring") as status:  # nothing where nobody looks
            found = measure(lambda what: status.update(f"measuring: {what}"))
        if self.as_json:
            self.print_json({**msgspec.to_builtins(found), "advice": advice(found)})
        elif not self.quiet:
            self.console.print(render_probe(found))

    def print_json(self, value: dict[str, Any]) -> None:
        """If it was asked for, and unless another process of the run does."""
        if self.as_json and not self.quiet:
            _print_json(value)

    def leave(self, error: BaseException | None) -> None:
        if self.view is not None:
            self.view.__exit__(type(error) if error else None, error, None)
            self.view = None


@contextmanager
def _terminal(as_json: bool, quiet: bool) -> Iterator[_Terminal]:
    terminal = _Terminal(as_json, quiet)
    try:
        yield terminal
    except BaseException as error:
        terminal.leave(error)
        raise


def _print_json(value: dict[str, Any]) -> None:
    import math

    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in value.items()}
    print(json.dumps(clean, default=str), flush=True)


def _follows() -> bool:
    """Whether the user hears of this run from another process of torchrun's."""
    from weft.clusters import follows

    return "TORCHELASTIC_RUN_ID" in os.environ and follows("torchrun")


def _tell(error: WeftError) -> None:
    """Once for a run: the processes of torchrun often meet the same error, and when the first ends, torchrun ends all. Who
    is still here after a while has something of its own to say."""
    from weft.report.terminal import render_error

    console = Console(stderr=True)
    if _follows():
        _let_speak()
        console.print(f"rank {os.environ.get('RANK', '?')}: ", end="")
    console.print(render_error(error), soft_wrap=True)


def _let_speak() -> None:
    """Rank 0: torchrun ends it when another process ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    time.sleep(FIRST_WORD_S)


def main() -> None:
    try:
        app()
    except WeftError as error:
        if not error.told:
            _tell(error)
        else:
            _let_speak()
        if "--json" in sys.argv and not _follows():
            _print_json({"error": error.message, "kind": type(error).__name__})
        sys.exit(error.code)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(141)


if __name__ == "__main__":
    main()
