"""Frames to a live server, drawn by key, as a broken, old or hostile member may send them: refused by name, or taken for what they are. Never
another error, never memory beyond what the server gave for such a frame, and nothing of them is in the model."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tests.laws.reference import Odd
from tests.variants import rest_slow

import weft
from weft.comm.wire import Head, Kind
from weft.errors import CommError, Incompatible, TaskError
from weft.patterns import serving
from weft.servers import messages as m

NUMBERS = (-(2**62), -1, 0, 1, 2, 3, 7, 100, 2**31, 2**62)
FLOATS = (0.0, 1.0, -1.0, float("nan"), float("inf"), 1e308)


def number(dice: random.Random) -> int:
    return dice.choice(NUMBERS)


def numbers(dice: random.Random) -> list[int]:
    return [number(dice) for _ in range(dice.randrange(4))]


def message(dice: random.Random) -> Any:
    real = dice.choice(FLOATS)
    done = m.Done(number(dice), number(dice), dice.choice(FLOATS), real, number(dice))
    return dice.choice(
        [
            m.Join([("0.weight", numbers(dice), "float64")] * dice.randrange(3)),
            m.Ask(done),
            m.Ask(None, number(dice), number(dice)),
            m.Pull(number(dice), number(dice)),
            m.Look(number(dice), number(dice), number(dice)),
            m.Push(0, dice.randrange(3), 0, 1.0, [], [dice.randrange(13)]),
            m.Push(number(dice), number(dice), number(dice), real, numbers(dice), numbers(dice)),
            m.State(number(dice), b"{}", [("x", numbers(dice), dice.choice(["float32", "nonsense", "nn"]))]),
            m.Square(number(dice), real),
            m.Close(number(dice), number(dice), numbers(dice), real),
            m.Apply(number(dice), real),
            m.Leave(),
            m.Finish(),
            m.Values(number(dice)),
        ]
    )


def mutated(dice: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(dice.choice((0, 0, 1, 2, 8))):
        changed[dice.randrange(len(changed))] ^= 1 << dice.randrange(8)
    return bytes(changed[: dice.choice((len(changed), len(changed), dice.randrange(len(changed) + 1)))])


def attack(server: serving.Lead, frames: int) -> dict[str, int]:
    """How many were refused, taken, or ended the run by name."""
    seen = {"refused": 0, "taken": 0, "ended": 0}
    server.send = lambda *_: None  # type: ignore[method-assign,assignment]
    server.ctx.tell = lambda *_, **__: None
    largest = 64 * (server.flat.nbytes + 4096)
    for k in range(frames):
        dice = random.Random(k)
        server.reading = dict.fromkeys(range(3), 0)
        meta = mutated(dice, m.encode(message(dice)))
        try:
            expected = server.payload_of(m.decode(meta))
        except CommError:
            expected = 0
        size = dice.choice((expected, expected, expected, 0, 1, expected + 8, 2**40))
        head = Head(Kind.DATA, dice.choice((0, 1, 2, 2, 4, 99)), 0, k, meta, size)
        try:
            views = server.place(head)
        except CommError:
            seen["refused"] += 1
            continue
        assert sum(map(len, views)) == size <= largest
        for view in views:
            view[:] = dice.randbytes(len(view)) if dice.random() < 0.3 else bytes(len(view))
        say = m.decode(meta)
        try:
            getattr(server, serving.handler_of(say))(head.sender, say, views)
            seen["taken"] += 1
        except (CommError, Incompatible, TaskError):
            seen["ended"] += 1
    return seen


@pytest.mark.parametrize("frames", rest_slow([4000, 50_000]))
def test_a_server_takes_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frames: int) -> None:
    seen: list[dict[str, int]] = []
    model: list[torch.Tensor] = []

    def run(server: serving.Lead) -> Any:
        before = server.holding.memory.copy()
        seen.append(attack(server, frames))
        model.append(torch.from_numpy(before == server.holding.memory))
        return iter(())

    monkeypatch.setattr(serving.Lead, "run", run)
    settings: dict[str, Any] = {"cluster": "inprocess", "workers": 3, "steps": 5, "batch": 17, "dtype": "float64"}
    with pytest.raises(weft.WeftError):  # it never began
        weft.run(Odd(), weft.ParameterServer(servers=2), run_dir=tmp_path / "run", **settings)
    assert [sum(each.values()) for each in seen] == [frames]
    assert all(count > frames // 200 for count in seen[0].values()), seen
    assert bool(model[0].all()), "an update was made"


def test_a_message_of_another_schema_is_an_error() -> None:
    with pytest.raises(CommError, match="schema"):
        m.decode(msgspec.msgpack.encode(["push", 1]))
