"""What pays: the choice against a search of its own, the break-even against the seconds on both sides of it."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.cost import LinkSpeed
from weft.payoff import (
    MIN_GAIN,
    Choice,
    LinkRow,
    Probe,
    Way,
    advice,
    break_even,
    choose,
    format_rate,
    format_time,
)

FAST = LinkSpeed(10e-6, 20e9)
WHOLE = Way(compress="none", bytes_sent=25e6, rounds=2)
BF16 = Way(compress="bf16", bytes_sent=12.5e6, rounds=2, encode_s=1e-3, decode_s=1e-3)
TOPK = Way(compress="topk:0.01", bytes_sent=25e4, rounds=2, encode_s=20e-3, decode_s=5e-3)

speeds = st.builds(LinkSpeed, st.floats(1e-6, 1e-2), st.floats(1e4, 1e11))
ways = st.builds(
    Way,
    compress=st.just("codec"),
    bytes_sent=st.floats(1, 1e9),
    rounds=st.integers(1, 20),
    encode_s=st.floats(0, 1),
    decode_s=st.floats(0, 1),
)


def named(found: list[Way]) -> list[Way]:
    return [
        Way(compress=f"codec {k}", bytes_sent=w.bytes_sent, rounds=w.rounds, encode_s=w.encode_s, decode_s=w.decode_s)
        for k, w in enumerate(found)
    ]


def test_a_slow_link_takes_the_strongest_and_a_quick_one_none() -> None:
    at_100_mbit = choose(WHOLE, [BF16, TOPK], LinkSpeed(1e-3, 12.5e6), 25_000_000)
    assert at_100_mbit == Choice("topk:0.01", "at 100 Mbit/s 25 MB take 2 s whole, 47 ms so: 43x")
    inside = choose(WHOLE, [BF16, TOPK], FAST, 25_000_000)
    assert inside.compress == "none"
    assert inside.why == "at 160 Gbit/s 25 MB take 1.27 ms whole, and no codec makes that 1.2x quicker"


def test_what_computing_hides_pays_nothing() -> None:
    slow = LinkSpeed(1e-3, 12.5e6)
    assert choose(WHOLE, [TOPK], slow, 25_000_000, between_s=9.5).compress == "topk:0.01"
    hidden = choose(WHOLE, [TOPK], slow, 25_000_000, between_s=20.0)
    assert hidden.compress == "none"
    assert "beside 20 s of computing" in hidden.why


def test_a_stronger_codec_must_pay_for_itself() -> None:
    """Not against the whole, but against the gentler one."""
    link = LinkSpeed(1e-5, 300e6)
    assert BF16.seconds(link) > TOPK.seconds(link)
    assert choose(WHOLE, [BF16, TOPK], link, 25_000_000, between_s=0.1).compress == "bf16"
    assert choose(WHOLE, [TOPK], link, 25_000_000, between_s=0.1).compress == "topk:0.01"


@given(st.lists(ways, max_size=4), ways, speeds, st.floats(0, 10))
def test_the_choice_is_never_slower_and_always_worth_it(
    found: list[Way], whole: Way, speed: LinkSpeed, s: float
) -> None:
    whole = Way(compress="none", bytes_sent=whole.bytes_sent, rounds=whole.rounds)
    found = named(found)
    chosen = choose(whole, found, speed, 1000, s).compress
    total = {way.compress: s + way.seconds(speed) for way in (whole, *found)}
    if chosen == "none":
        assert all(total["none"] < MIN_GAIN * total[way.compress] for way in found)
        return
    at = [way.compress for way in found].index(chosen)
    assert total["none"] >= MIN_GAIN * total[chosen]
    assert all(total[chosen] < MIN_GAIN * total[way.compress] for way in found[at + 1 :]), "a later one would pay"


@given(ways, ways, st.floats(0, 1e-2))
def test_below_the_break_even_it_pays_and_above_it_does_not(whole: Way, way: Way, latency_s: float) -> None:
    whole = Way(compress="none", bytes_sent=whole.bytes_sent, rounds=whole.rounds)
    rate = break_even(whole, way, latency_s)

    def pays(at: float) -> bool:
        return way.seconds(LinkSpeed(latency_s, at)) < whole.seconds(LinkSpeed(latency_s, at))

    if rate == 0:
        assert not pays(1e15) or way.rounds < whole.rounds
        assert way.bytes_sent >= whole.bytes_sent
    elif math.isinf(rate):
        assert way.bytes_sent < whole.bytes_sent
        assert way.seconds(LinkSpeed(latency_s, 1e6)) <= whole.seconds(LinkSpeed(latency_s, 1e6))
    elif 1e-3 < rate < 1e12 and whole.bytes_sent - way.bytes_sent > 1e-3 * whole.bytes_sent:
        assert pays(rate / 1.01)
        assert not pays(rate * 1.01)


def probe_of(speed: LinkSpeed, choice: Choice, step_s: float = 0.0) -> Probe:
    return Probe(
        world=2,
        carrier="gloo",
        links=[LinkRow(members=[0, 1], latency_s=speed.latency_s, bytes_per_s=speed.bytes_per_s)],
        what="25 MB",
        nbytes=25_000_000,
        compressible=25_000_000,
        step_s=step_s,
        ways=[WHOLE, BF16, TOPK],
        choice=choice,
    )


def test_the_advice_is_a_sentence() -> None:
    slow = LinkSpeed(1e-3, 12.5e6)
    said = advice(probe_of(slow, choose(WHOLE, [BF16, TOPK], slow, 25_000_000)))
    assert said == "--compress topk:0.01 pays here: at 100 Mbit/s 25 MB take 2 s whole, 47 ms so: 43x."
    assert advice(probe_of(FAST, choose(WHOLE, [BF16], FAST, 25_000_000))) == (
        "Nothing pays at 160 Gbit/s: send gradients whole."
    )
    hidden = advice(probe_of(slow, choose(WHOLE, [TOPK], slow, 25_000_000, 20.0), 20.0))
    assert hidden.startswith("Send gradients whole: at 100 Mbit/s")
    assert "43x quicker by topk:0.01" in hidden


@pytest.mark.parametrize(
    ("rate", "words"), [(12.5e6, "100 Mbit/s"), (999.9e3 / 8, "1 Mbit/s"), (1e12, "8 Tbit/s"), (math.inf, "any")]
)
def test_rates_are_as_networks_are_sold(rate: float, words: str) -> None:
    assert format_rate(rate) == words


def test_times_have_three_digits() -> None:
    assert [format_time(s) for s in (1.2345e-5, 0.05, 123.4)] == ["12.3 us", "50 ms", "123 s"]
