"""Does a codec pay on this link? What was measured in, a table and a choice with its reason out. Pure.

An exchange whose one worker sends n bytes in r rounds takes  r alpha + n beta + what the codec computes; alpha and 1/beta are those of
the link (Hockney). A codec pays where the bytes that it saves take longer than it does: on links slower than its break-even.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from weft.cost import LinkSpeed

#: A step must be so many times quicker for a codec to be chosen, and again for each one that takes more from the gradients.
MIN_GAIN = 1.2


class Way(msgspec.Struct, frozen=True, kw_only=True):
    """One way to make an exchange, as one worker sees it."""

    compress: str
    bytes_sent: float
    rounds: int  # messages that wait for one another
    encode_s: float = 0.0  # with what error feedback takes
    decode_s: float = 0.0  # of all that arrives
    arrivals: int = 1  # payloads that each worker decodes: one sum, or everybody's

    def seconds(self, speed: LinkSpeed) -> float:
        return self.rounds * speed.latency_s + self.bytes_sent / speed.bytes_per_s + self.encode_s + self.decode_s


class Choice(msgspec.Struct, frozen=True):
    compress: str
    why: str


class LinkRow(msgspec.Struct, frozen=True, kw_only=True):
    """``members``: two, or all (then: what each of them sends and receives while all do)."""

    members: list[int]
    latency_s: float
    bytes_per_s: float

    @property
    def speed(self) -> LinkSpeed:
        return LinkSpeed(self.latency_s, self.bytes_per_s)


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """``links``: pairs, and last all at once. ``ways``: whole first, then by each codec, in the order of what they take away;
    ``nbytes``: what is exchanged, as it is; ``compressible``: of that, what a codec gets to see."""

    world: int
    carrier: str
    links: list[LinkRow]
    what: str
    nbytes: int
    compressible: int
    step_s: float  # of computing between two exchanges; 0: not known
    ways: list[Way]
    choice: Choice

    @property
    def speed(self) -> LinkSpeed:
        return self.links[-1].speed


def choose(whole: Way, ways: Sequence[Way], speed: LinkSpeed, nbytes: int, between_s: float = 0.0) -> Choice:
    """``ways``: those that may be chosen, the gentlest first. ``nbytes``: what is exchanged; ``between_s``: computing between two
    exchanges. Each way must make the time from one exchange to the next MIN_GAIN times shorter than the best before it."""
    best = whole
    for way in ways:
        if between_s + best.seconds(speed) >= MIN_GAIN * (between_s + way.seconds(speed)):
            best = way
    begin = f"at {format_rate(speed.bytes_per_s)} {format_size(nbytes)} take {format_time(whole.seconds(speed))} whole"
    if best is whole:
        beside = f" beside {format_time(between_s)} of computing" if between_s else ""
        return Choice(whole.compress, f"{begin}{beside}, and no codec makes that {MIN_GAIN:g}x quicker")
    gain = whole.seconds(speed) / best.seconds(speed)
    return Choice(best.compress, f"{begin}, {format_time(best.seconds(speed))} so: {gain:.2g}x")


def break_even(whole: Way, way: Way, latency_s: float) -> float:
    """The bytes a second of a link on which both take the same time: on a slower one ``way`` pays. 0: on none; inf: on every one."""
    saved = whole.bytes_sent - way.bytes_sent
    costs = way.encode_s + way.decode_s + (way.rounds - whole.rounds) * latency_s
    if saved <= 0:
        return 0.0
    return saved / costs if costs > 0 else math.inf


def advice(probe: Probe) -> str:
    """One sentence."""
    whole, choice = probe.ways[0], probe.choice
    if choice.compress != whole.compress:
        return f"--compress {choice.compress} pays here: {choice.why}."
    best = min(probe.ways[1:], key=lambda way: way.seconds(probe.speed), default=whole)
    rate = format_rate(probe.speed.bytes_per_s)
    if best.seconds(probe.speed) >= whole.seconds(probe.speed):
        return f"Nothing pays at {rate}: send gradients whole."
    gain = whole.seconds(probe.speed) / best.seconds(probe.speed)
    return f"Send gradients whole: {choice.why} (the exchange alone would be {gain:.2g}x quicker by {best.compress})."


def format_rate(bytes_per_s: float) -> str:
    """As networks are sold: 11_900_000 -> "95.2 Mbit/s"."""
    return _scaled(8 * bytes_per_s, ["bit/s", "kbit/s", "Mbit/s", "Gbit/s", "Tbit/s"])


def format_size(nbytes: float) -> str:
    return _scaled(nbytes, ["B", "kB", "MB", "GB", "TB"])


def format_time(seconds: float) -> str:
    return _scaled(seconds * 1e6, ["us", "ms", "s"])


def _scaled(value: float, units: Sequence[str]) -> str:
    if not math.isfinite(value):
        return "any"
    value, last = float(f"{value:.3g}"), len(units) - 1
    k = 0
    while k < last and abs(value) >= 1000:
        value, k = float(f"{value / 1000:.3g}"), k + 1
    return f"{value:g} {units[k]}"
