"""Frames to a live server, drawn by key, as a broken, old or hostile member may send them: refused by name, or taken for what they are. Never
another error, never memory beyond what the server gave for such a frame, and nothing of them is in the model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.laws.reference import Odd
from tests.variants import rest_slow

import weft
from weft.comm.wire import Head, Kind
from weft.errors import CommError, Incompatible, TaskError
from weft.patterns import leading
from weft.servers import messages as m
from weft.servers.views import Told, View

NUMBERS = (-(2**62), -1, 0, 1, 2, 3, 7, 100, 2**31, 2**62)
FLOATS = (0.0, 1.0, -1.0, float("nan"), float("inf"), 1e308)


def number(dice: random.Random) -> int:
    return dice.choice(NUMBERS)


def numbers(dice: random.Random) -> list[int]:
    return [number(dice) for _ in range(dice.randrange(4))]


def message(dice: random.Random) -> Any:
    real = dice.choice(FLOATS)
    done = m.Done(number(dice), number(dice), number(dice), dice.choice(FLOATS), real, number(dice))
    epoch, shard, other = dice.choice((0, 0, 0, number(dice))), dice.choice((0, 0, number(dice))), number(dice)
    view = View(other, dice.choice((3, 4, other)), [numbers(dice) for _ in range(2)], [numbers(dice) for _ in range(2)])
    return dice.choice(
        [
            m.Join([("0.weight", numbers(dice), "float64")] * dice.randrange(3)),
            m.Ask(epoch, done),
            m.Ask(epoch, None, number(dice), number(dice)),
            m.Pull(epoch, shard, number(dice), number(dice)),
            m.Look(epoch, shard, number(dice), number(dice), number(dice)),
            m.Push(epoch, 0, 0, dice.randrange(3), 0, 1.0, [], [dice.randrange(13)]),
            m.Push(epoch, shard, number(dice), number(dice), number(dice), real, numbers(dice), numbers(dice)),
            m.Copy(epoch, shard, number(dice), number(dice), real, numbers(dice), [dice.randrange(13)]),
            m.State(
                epoch, shard, number(dice), b"{}", [("x", numbers(dice), dice.choice(["float32", "nonsense", "nn"]))]
            ),
            m.Joined(epoch, shard, number(dice), real),
            m.Close(epoch, number(dice), number(dice), numbers(dice), real),
            m.Apply(epoch, number(dice), real),
            m.Collect(epoch, shard, number(dice)),
            m.Busy(epoch, dice.random() < 0.5),
            m.Misses(epoch, number(dice)),
            m.Propose(number(dice), view),
            m.Grant(number(dice), view, Told(number(dice), other, [], other, numbers(dice))),
            m.Deny(number(dice), number(dice)),
            m.Install(view, number(dice), real, [(0, other)], other, numbers(dice)),
            m.Ready(number(dice)),
            m.Moved(view),
            m.Leave(),
            m.Finish(),
            m.Values(epoch, shard, number(dice)),
        ]
    )


def mutated(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((0, 0, 1, 2, 8))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed[: dice.choice((len(changed), len(changed), dice.randrange(len(changed) + 1)))])


def attack(server: leading.Lead, frames: int, senders: tuple[int, ...]) -> dict[str, int]:
    """How many were refused, taken, or ended the run by name."""
    seen = {"refused": 0, "taken": 0, "ended": 0}
    server.send = lambda *_: None  # type: ignore[method-assign,assignment]
    server.ctx.tell = lambda *_, **__: None
    largest = max(64 * (max(flat.nbytes for flat in server.flats) + 4096), server.most_state_bytes)
    for k in range(frames):
        dice = random.Random(k)
        for shard in server.shards.values():
            shard.reading = dict.fromkeys(range(3), 0)
        meta = mutated(dice, m.encode(message(dice)))
        try:
            expected = server.payload_of(m.decode(meta))
        except (CommError, IndexError):
            expected = 0
        size = dice.choice((expected, expected, expected, 0, 1, expected + 8, 2**40))
        head = Head(Kind.DATA, dice.choice(senders), 0, k, meta, size)
        try:
            views = server.place(head)
        except CommError:
            seen["refused"] += 1
            continue
        assert sum(map(len, views)) == size <= largest
        for view in views:
            view[:] = dice.randbytes(len(view)) if dice.random() < 0.3 else bytes(len(view))
        try:
            server.take(head.sender, m.decode(meta), views)
            seen["taken"] += 1
        except (CommError, Incompatible, TaskError):
            seen["ended"] += 1
    return seen


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("frames", rest_slow([4000, 50_000]))
def test_a_server_takes_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int, replicas: int) -> None:
    """Of another server everything, of workers and strangers; servers of a run with replicas believe each other about who leads."""
    kind = leading.Lead if replicas == 1 else leading.Replicated
    seen: list[dict[str, int]] = []
    model: list[bool] = []

    def run(server: leading.Lead) -> Any:
        if server.rank == 3:
            before = {n: shard.holding.memory.copy() for n, shard in server.shards.items()}
            seen.append(attack(server, frames, (0, 1, 2, 2, 99) if replicas > 1 else (0, 1, 2, 2, 4, 99)))
            model.append(all(bool((before[n] == server.shards[n].holding.memory).all()) for n in before))
        return iter(())

    monkeypatch.setattr(kind, "run", run)
    settings: dict[str, Any] = {"cluster": "inprocess", "workers": 3, "steps": 5, "batch": 17, "dtype": "float64"}
    pattern = weft.ParameterServer(servers=2, replicas=replicas)
    with pytest.raises(weft.WeftError):  # it never began
        weft.run(Odd(), pattern, run_dir=tmp_path / "run", **settings)
    assert [sum(each.values()) for each in seen] == [frames]
    assert all(count > frames // 200 for count in (seen[0]["refused"], seen[0]["taken"])), seen
    assert model == [True], "an update was made"


def test_another_server_may_say_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then it is wrong about who leads, or what is held; no other error than that comes of it."""
    seen: list[dict[str, int]] = []

    def run(server: leading.Replicated) -> Any:
        if server.rank == 3:
            seen.append(attack(server, 20_000, (0, 1, 2, 4, 4, 4)))
        return iter(())

    monkeypatch.setattr(leading.Replicated, "run", run)
    settings: dict[str, Any] = {"cluster": "inprocess", "workers": 3, "steps": 5, "batch": 17, "dtype": "float64"}
    with pytest.raises(weft.WeftError):
        weft.run(Odd(), weft.ParameterServer(servers=2, replicas=2), run_dir=tmp_path / "run", **settings)
    assert seen[0]["taken"] > 100


def test_a_message_of_another_schema_is_an_error() -> None:
    with pytest.raises(CommError, match="schema"):
        m.decode(msgspec.msgpack.encode(["push", 1]))
