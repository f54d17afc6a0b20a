"""Whole runs on data that streams: every example once an epoch over kills, resumes and other worlds; bad streams refused."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.streaming import FORMATS, write_shards
from tests.laws.reference import Regression
from tests.streaming_task import Counting, Shuffled, Stateful, Watched
from tests.variants import rest_slow
from torch.utils.data import TensorDataset

import weft
from weft.compare import final_parameters
from weft.data import Shards
from weft.errors import ConfigError, DataError, Incompatible, MemberFailed, TaskError
from weft.events import read_events
from weft.patterns.batches import Batches
from weft.patterns.feeds import Streamed
from weft.patterns.randomness import host_state, seed_everything, set_host_state
from weft.testing import kill

CPU = torch.device("cpu")

SIZES = [31, 7, 40, 25, 30, 22, 28, 20]  # 203 in all
STEPS_PER_EPOCH = 21
TASK = f"{Path(__file__).parent / 'streaming_task.py'}:Watched"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent), prepend=":")


def seeded(value: int) -> torch.Tensor:
    """The state of Python's and numpy's generators after such a seed."""
    seed_everything(value)
    return host_state()


class Notes:
    """What the members of a run wrote down, attempt by attempt."""

    def __init__(self, run_dir: Path, notebook: Path) -> None:
        self.draws: dict[int, dict[int, list[int]]] = {}  # step -> rank -> ids, of the attempt that counted
        self.opened: list[dict[int, set[str]]] = []  # of each attempt, by rank
        for event in read_events(run_dir / "events.jsonl"):
            if event.kind in ("plan", "restarted", "resumed"):
                self.opened.append({})
            if event.kind in ("restarted", "resumed"):
                begin = event.values.get("from_step", event.values.get("step"))
                self.draws = {step: draw for step, draw in self.draws.items() if step < begin}
            if event.kind == "started":
                self.read(event.member, notebook / f"{event.values['pid']}.jsonl")

    def read(self, rank: int, file: Path) -> None:
        for line in file.read_text().splitlines() if file.exists() else ():
            kind, *what = json.loads(line)
            if kind == "opened":
                self.opened[-1].setdefault(rank, set()).add(what[0])
            else:
                self.draws.setdefault(what[0], {})[rank] = what[1]

    def epochs(self) -> list[list[int]]:
        epochs: list[list[int]] = [[] for _ in range(-(-len(self.draws) // STEPS_PER_EPOCH))]
        for step, by_rank in self.draws.items():
            epochs[step // STEPS_PER_EPOCH] += [i for ids in by_rank.values() for i in ids]
        return epochs


def job(tmp_path: Path, data: str, **options: Any) -> dict[str, Any]:
    (tmp_path / "notes").mkdir()
    return {
        "task": TASK,
        "task_options": {"data": data, "notebook": str(tmp_path / "notes"), **options},
        "run_dir": tmp_path / "run",
        "save_every": 7,
    }


def run_through_kills(tmp_path: Path, data: str, **options: Any) -> Notes:
    """50 steps: 3 workers, one killed at step 31; then 2, one killed at step 40; then 4."""
    run_dir = tmp_path / "run"
    with pytest.raises(MemberFailed, match="killed by SIGKILL"):
        weft.run(**job(tmp_path, data, **options), workers=3, faults=[kill(rank=1, step=31)])
    with pytest.raises(MemberFailed, match="killed by SIGKILL"):
        weft.resume(run_dir, workers=2, faults=[kill(rank=0, step=40)])
    assert weft.resume(run_dir, workers=4).steps == 50
    resumed = [e.values["step"] for e in read_events(run_dir / "events.jsonl") if e.kind == "resumed"]
    assert resumed == [28, 35]
    return Notes(run_dir, tmp_path / "notes")


def assert_each_once(notes: Notes) -> None:
    assert sorted(notes.draws) == list(range(50))
    first, second, third = notes.epochs()
    assert sorted(first) == sorted(second) == list(range(203))
    assert len(third) == 80
    assert max(Counter(third).values()) == 1


@pytest.mark.multiprocess
@pytest.mark.parametrize("kind", rest_slow(["npy", *sorted(set(FORMATS) - {"npy"})]))
def test_every_record_once_an_epoch_over_kills_and_other_worlds(tmp_path: Path, kind: str) -> None:
    data = write_shards(tmp_path / "data", SIZES, kind)
    assert_each_once(run_through_kills(tmp_path, data, buffer_mb=16 * 60 / (1 << 20) if kind != "parquet" else 64))


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.parametrize("stream", ["shuffled", "counting", "stateful"])
def test_every_example_of_a_stream_once_over_kills_and_other_worlds(tmp_path: Path, stream: str) -> None:
    notes = run_through_kills(tmp_path, stream)
    assert_each_once(notes)
    (tmp_path / "alone").mkdir()
    weft.run(**job(tmp_path / "alone", stream), workers=1, steps=50)
    alone = Notes(tmp_path / "alone" / "run", tmp_path / "alone" / "notes").draws
    together = {step: {0: [i for rank in sorted(draw) for i in draw[rank]]} for step, draw in notes.draws.items()}
    assert together == alone, "joined batches do not depend on the world"


@pytest.mark.multiprocess
@pytest.mark.parametrize("data", rest_slow(["npy", "shuffled", "stateful"]))
def test_a_resume_in_the_same_world_is_bit_equal(tmp_path: Path, data: str) -> None:
    results = []
    for name, faults in [("undisturbed", []), ("killed", [kill(rank=1, step=31)])]:
        place = tmp_path / name
        place.mkdir()
        source = write_shards(place / "data", SIZES, data) if data == "npy" else data
        result = weft.run(**job(place, source), workers=2, restarts=len(faults), faults=faults)
        results.append(final_parameters(result.run_dir))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.multiprocess
def test_a_worker_opens_only_its_own_files(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES, "csv")
    weft.run(**job(tmp_path, data, buffer_mb=16 * 60 / (1 << 20)), workers=3)
    (opened,) = Notes(tmp_path / "run", tmp_path / "notes").opened
    assert sorted(opened) == [0, 1, 2]
    assert sorted(file for files in opened.values() for file in files) == [f"s00{k}.csv" for k in range(8)]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_changed_between_start_and_resume_is_named(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES, "npy")
    with pytest.raises(MemberFailed):
        weft.run(**job(tmp_path, data), workers=2, faults=[kill(rank=1, step=31)])
    path = tmp_path / "data" / "s003.npy"
    kept = path.rename(tmp_path / "kept")
    with pytest.raises(DataError, match=r"s003.npy has vanished"):
        weft.resume(tmp_path / "run")
    path.write_bytes(kept.read_bytes())
    with pytest.raises(DataError, match=r"s003.npy has changed .*written again"):
        weft.resume(tmp_path / "run")
    kept.rename(path)
    assert weft.resume(tmp_path / "run").steps == 50


@pytest.mark.multiprocess
def test_a_file_that_changes_during_a_run_is_named(tmp_path: Path) -> None:
    data = write_shards(tmp_path / "data", SIZES, "npy")

    class Meddle:
        def on_plan(self, plan: Any) -> None:
            with (tmp_path / "data" / "s003.npy").open("ab") as file:
                file.write(b"x")

        def on_event(self, event: Any) -> None: ...
        def on_output(self, member: int, text: str) -> None: ...
        def on_idle(self) -> None: ...

    with pytest.raises(MemberFailed, match=r"DataError: .*s003.npy has changed"):
        weft.run(**job(tmp_path, data), workers=2, observer=Meddle())


def test_ranks_that_are_seeded_apart_see_a_shuffled_stream_alike() -> None:
    """Its order comes from torch's global generator; and the ranks' own generators are left as they were."""
    feeds = [Streamed(Shuffled(30), 8, rank, 3, 0, Batches(None, Given(None), CPU, torch.float32)) for rank in range(3)]
    states = [seeded(100 + rank) for rank in range(3)]
    drawn: list[int] = []
    for _ in range(8):
        for rank, feed in enumerate(feeds):
            set_host_state(states[rank])
            torch.manual_seed(rank)
            drawn += feed.batch(feed.next().indices).tolist()
            assert torch.equal(host_state(), states[rank])
    assert sorted(drawn) == sorted([*range(30)] * 2)


@settings(max_examples=50)
@given(
    st.integers(4, 40),
    st.integers(1, 12),
    st.sampled_from([Counting, Shuffled, Stateful]),
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 6)), min_size=1, max_size=5),
)
def test_a_stream_is_drawn_once_an_epoch_over_any_stops_and_resizes(
    n: int, batch: int, stream: type[Counting], legs: list[tuple[int, int]]
) -> None:
    seen: dict[int, list[int]] = {}
    saved: tuple[Any, Any] | None = None
    for world, steps in [*legs, (2, n)]:
        feeds = [
            Streamed(stream(n), batch, r, world, 0, Batches(None, Given(None), CPU, torch.float32))
            for r in range(world)
        ]
        if saved is not None:
            for feed in feeds:
                feed.load_state_dict(json.loads(json.dumps(saved[0])))
                feed.load_stream_state(saved[1])
        for _ in range(steps):
            draws = [feed.next() for feed in feeds]
            assert len({draw[1:] for draw in draws}) == 1
            assert sum(len(draw.indices) for draw in draws) == draws[0].total
            for feed, draw in zip(feeds, draws):
                if len(draw.indices):
                    seen.setdefault(draw.epoch, []).extend(int(i) for i in feed.batch(draw.indices))
            saved = feeds[-1].state_dict(), feeds[-1].stream_state()
    *whole, last = seen.values()
    assert sorted(seen) == list(range(len(seen)))
    assert all(sorted(epoch) == list(range(n)) for epoch in whole)
    assert len(set(last)) == len(last)


# -- what is evaluated


class Held(Regression):
    """All of its rows held out too: in shards, or in memory."""

    def __init__(self, folder: str, streams: bool) -> None:
        super().__init__()
        self.folder, self.streams = folder, streams

    def data(self) -> Any:
        rows = Shards(f"{self.folder}/*.npy", batch_transform=lambda a: (a[:, :6], a[:, 6:]))
        if self.streams:
            return rows, rows
        table = torch.from_numpy(self.table())
        return rows, TensorDataset(table[:, :6], table[:, 6:])

    def table(self) -> Any:
        import numpy as np

        return np.concatenate([np.load(f"{self.folder}/{k}.npy") for k in range(4)])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_held_out_shards_are_all_evaluated(tmp_path: Path) -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    for k in range(4):
        np.save(tmp_path / f"{k}.npy", rng.normal(size=(20 + 7 * k, 7)))
    losses = [
        weft.run(
            Held(str(tmp_path), streams), workers=2, steps=5, dtype="float64", run_dir=tmp_path / f"run{streams}"
        ).loss
        for streams in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)


# -- what is refused, before any worker starts where that is possible


class Given(Watched):
    def __init__(self, train: Any, held_out: Any = None, **wrong: Any) -> None:
        super().__init__("", "")
        self.pair = (train, TensorDataset(torch.arange(20)) if held_out is None else held_out)
        vars(self).update(wrong)

    def data(self) -> Any:
        return self.pair

    def note(self, *what: Any) -> None:
        pass


def refused(kind: type[Exception], *words: str, task: weft.Task, tmp_path: Path, **settings: Any) -> None:
    with pytest.raises(kind) as caught:
        weft.run(task, cluster="inprocess", run_dir=tmp_path / "run", **settings)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    if kind is not MemberFailed:
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("stream", "settings", "kind", "words"),
    [
        (Counting(90), {"epochs": 2}, ConfigError, ["Counting has no length", "--steps", "__len__"]),
        (Counting(0), {"steps": 2}, DataError, ["Counting yields no examples"]),
        (Counting(8), {"steps": 2}, ConfigError, ["batch 10", "8 examples", "--batch 8"]),
        (Counting(2), {"steps": 2, "workers": 4}, DataError, ["4 workers", "2 training examples"]),
        (Counting(5, 90), {"epochs": 2}, DataError, ["ended after 5", "says 90", "each worker must see them all"]),
        (Counting(90), {"steps": 2, "partition": "random"}, Incompatible, ["'random'", "a stream", "--partition"]),
        (Counting(85, 90), {"epochs": 2}, MemberFailed, ["Counting ended after 85", "90 were expected"]),
        (Counting(100, 90), {"epochs": 2}, MemberFailed, ["Counting gave more than 90", "__len__"]),
        (Counting(100, 95), {"epochs": 2}, MemberFailed, ["Counting gave more than 95", "__len__"]),
    ],
)
def test_streams_that_cannot_be(
    tmp_path: Path, stream: Any, settings: dict[str, Any], kind: type[Exception], words: list[str]
) -> None:
    refused(kind, *words, task=Given(stream), tmp_path=tmp_path, **settings)


class Waning(Counting):
    def __iter__(self) -> Any:
        self.n -= 5
        return super().__iter__()


def test_a_stream_that_gives_less_in_its_second_pass(tmp_path: Path) -> None:
    words = ["Waning ended after", "in epoch 2", "were expected"]
    refused(MemberFailed, *words, task=Given(Waning(100)), tmp_path=tmp_path, steps=40)


class Growing(Counting):
    def __iter__(self) -> Any:
        self.n += 5
        return super().__iter__()


def test_a_stream_that_gives_more_in_its_second_pass(tmp_path: Path) -> None:
    refused(MemberFailed, "Growing gave more than", "in epoch 2", task=Given(Growing(100)), tmp_path=tmp_path, steps=40)


def test_a_held_out_set_may_not_be_a_stream(tmp_path: Path) -> None:
    refused(
        TaskError,
        "held-out",
        "Counting",
        "map-style",
        "Shards",
        task=Given(Counting(50), Counting(9)),
        tmp_path=tmp_path,
    )


def test_shards_that_cannot_be(tmp_path: Path) -> None:
    def shards(sizes: list[int], **settings: Any) -> Shards:
        folder = tmp_path / f"data{len(list(tmp_path.iterdir()))}"
        return Shards(write_shards(folder, sizes, "npy"), **settings)

    def no(kind: type[Exception], *words: str, task: weft.Task, **settings: Any) -> None:
        refused(kind, *words, task=task, tmp_path=tmp_path, **settings)

    no(DataError, "3 workers", "2 shards", "split=2", task=Given(shards([20, 20])), workers=3)
    no(ConfigError, "batch 50", "40 examples", task=Given(shards([20, 20])), batch=50)
    no(Incompatible, "'by-key'", "shards", task=Given(shards([20, 20])), partition="by-key")
    no(DataError, "hold no records", task=Given(shards([0])))
    both = Given(shards([20], batch_transform=torch.tensor), collate=torch.stack)
    no(TaskError, "collate", "batch_transform", task=both)
    no(DataError, "no file matches", task=Given(Shards(tmp_path / "*.npy")))
    no(DataError, "hold no records", task=Given(shards([20]), shards([0])))


# -- records to batches


@pytest.mark.parametrize("how", ["neither", "transform", "batch_transform", "collate"])
def test_every_way_from_records_to_batches_trains_alike(tmp_path: Path, how: str) -> None:
    data = write_shards(tmp_path / "data", [30, 25], "npy")
    ways: dict[str, Any] = {
        "neither": Given(
            Shards(data), loss=lambda m, b: Watched.loss(Given(None), m, b if isinstance(b, list) else b[:, 0])
        ),
        "transform": Given(Shards(data, transform=lambda row: int(row[0]))),
        "batch_transform": Given(Shards(data, batch_transform=lambda rows: rows[:, 0])),
        "collate": Given(Shards(data), collate=lambda rows: torch.tensor([int(row[0]) for row in rows])),
    }
    losses = [
        weft.run(task, cluster="inprocess", steps=8, workers=2, run_dir=tmp_path / name).train_loss
        for name, task in (("how", ways[how]), ("reference", ways["batch_transform"]))
    ]
    assert losses[0] == losses[1]


def test_the_plan_tells_unequal_shares(tmp_path: Path) -> None:
    plans = []

    class Keep:
        def on_plan(self, plan: Any) -> None:
            plans.append(plan)

        def on_event(self, event: Any) -> None: ...
        def on_output(self, member: int, text: str) -> None: ...
        def on_idle(self) -> None: ...

    data = Shards(write_shards(tmp_path / "data", [75, 25], "npy"), batch_transform=lambda rows: rows[:, 0])
    weft.run(Given(data), cluster="inprocess", workers=2, steps=2, batch=20, run_dir=tmp_path / "r1", observer=Keep())
    weft.run(Given(Counting(90)), cluster="inprocess", workers=2, steps=2, run_dir=tmp_path / "r2", observer=Keep())
    assert [m.examples_per_step for m in plans[0].members] == [15, 5]
    assert plans[0].train_examples == 100
    assert plans[0].members[0].memory["data"] == sum(f.stat().st_size for f in (tmp_path / "data").iterdir())
    assert any("2 shard(s)" in note for note in plans[0].notes)
    assert (plans[1].train_examples, plans[1].epochs) == (None, None)
    assert any("a resume goes through it again" in note for note in plans[1].notes)
