"""One member in each process that torchrun started: rank 0's process drives the run, the others follow it.

Every process keeps its member as `local` does, by a zygote of its own. A follower passes commands from rank 0 to its zygote
and brings back what the zygote says, over one TCP connection (a star round rank 0). Where rank 0 listens stands in
torchrun's rendezvous store, which may also hold what an earlier attempt left there: so an address is tried until one
answers to its secret, and fresh random names keep the attempts' other keys apart.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import itertools
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import psutil

from weft.clusters.base import (
    Call,
    Cluster,
    Exited,
    LinkSpec,
    MemberSpec,
    Message,
    Seat,
    SessionEvent,
    StopAsked,
    StoreSpec,
)
from weft.clusters.pipe import LIMIT, Closed, Pipe
from weft.clusters.processes import ProcessSession, translate
from weft.clusters.zygote import STOP, encode_start
from weft.company import die_with_parent
from weft.cost import HIERARCHICAL
from weft.errors import CommError, ConfigError, DeadlineExceeded, Incompatible, MemberFailed, from_wire, to_wire

MARK = "TORCHELASTIC_RUN_ID"  # who has it was started by torchrun
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
NEEDED = (*NUMBERS, "MASTER_ADDR", MARK)

STORE_KEEPER = -2  # the member id of the process that publishes our address
WHERE = "weft/where"
HELLO_S = 5.0  # for one attempt to reach an address that was found
LINGER_S = 2.0  # for followers to take the outcome
WAKE_S = 0.5  # how often a follower looks whether it was signalled
MAX_HELLO = 1 << 20
MAX_STRANGERS = 64

_opened = itertools.count(1)  # a program may run several jobs; after a restart they come in the same order


@dataclass(frozen=True)
class Place:
    """What torchrun tells each of its processes. ``job``: the same after a restart, another in another job."""

    rank: int
    world: int
    local_rank: int
    local_world: int
    master_addr: str
    master_port: int
    restart: int
    agent_store: bool  # torchrun's own process keeps the store at the master's address; else rank 0 has to
    job: str

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Place:
        """Raises ConfigError if torchrun did not start this process, or its variables are not whole."""
        if MARK not in environ:
            raise ConfigError(
                f"the cluster 'torchrun' needs torchrun ({MARK} is not set): start with "
                "`torchrun --nproc-per-node 2 -m weft run TASK`, or use --cluster local."
            )
        if missing := [name for name in NEEDED if not environ.get(name)]:
            raise ConfigError(
                f"torchrun's environment is not whole: {MARK} is set, {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not. Start by torchrun itself, or unset {MARK} and use --cluster local."
            )
        numbers = {}
        for name in NUMBERS:
            if not environ[name].isdecimal():
                raise ConfigError(
                    f"{name}={environ[name]!r} in the environment is not a number: start by torchrun itself."
                )
            numbers[name] = int(environ[name])
        rank, world, local_rank, local_world, port, restart = numbers.values()
        if not (rank < world and local_rank < local_world <= world):
            raise ConfigError(
                f"the environment says rank {rank} of {world}, {local_rank} of {local_world} on this host, which cannot be: "
                "start by torchrun itself."
            )
        run_id = environ[MARK]
        if run_id == "none":  # the user gave no --rdzv-id: what lasts over restarts is torchrun's own process
            parent = psutil.Process(os.getppid())
            run_id = f"{datetime.fromtimestamp(parent.create_time()):%Y%m%d-%H%M%S}-{parent.pid}"
        job = "".join(c if c.isalnum() or c in "-_." else "_" for c in run_id)
        agent_store = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(rank, world, local_rank, local_world, environ["MASTER_ADDR"], port, restart, agent_store, job)

    @property
    def on_one_host(self) -> bool:
        return self.local_world == self.world

    def store(self, deadline_s: float) -> dict[str, Any]:
        """Where ``publish`` and ``look_up`` find it."""
        return {"host": self.master_addr, "port": self.master_port, "deadline_s": deadline_s}

    def address(self, environ: Mapping[str, str]) -> str:
        """Of this host, as the others reach it: of the interface in GLOO_SOCKET_IFNAME, else of the one from which this host
        reaches the master."""
        if self.on_one_host:
            return "127.0.0.1"
        if name := environ.get("GLOO_SOCKET_IFNAME"):
            of_all = psutil.net_if_addrs()
            found = [a.address for a in of_all.get(name, ()) if a.family == socket.AF_INET]
            if not found:
                have = ", ".join(sorted(n for n, of in of_all.items() if any(a.family == socket.AF_INET for a in of)))
                raise ConfigError(
                    f"GLOO_SOCKET_IFNAME={name!r} has no IPv4 address here. Interfaces that have: {have}."
                )
            return str(found[0])
        try:
            known = socket.getaddrinfo(self.master_addr, self.master_port, type=socket.SOCK_DGRAM)
            family, kind, _, _, target = known[0]
            with socket.socket(family, kind) as probe:
                probe.connect(target)  # sends nothing: the kernel only chooses the route
                return str(probe.getsockname()[0])
        except OSError as error:
            raise ConfigError(
                f"this host cannot reach MASTER_ADDR={self.master_addr!r} ({error}): give torchrun --rdzv-endpoint, and "
                "--local-addr on the first host, as an address that all hosts know."
            ) from error


def publish(seat: Seat) -> None:
    """Entry: tell the store where rank 0 listens. Where nobody keeps a store, keep it, for as long as the run lasts."""
    from weft.comm.torchdist import connect_store

    given = seat.spec.payload
    store = connect_store(
        given["host"], given["port"], prefix="weft", deadline_s=given["deadline_s"], serve=given["serve"]
    )
    store.set(WHERE, given["where"])
    seat.send({"published": True})
    while given["serve"]:
        signal.pause()


def look_up(seat: Seat) -> None:
    """Entry: wait until the store tells where rank 0 listens."""
    from weft.comm.torchdist import connect_store

    given = seat.spec.payload
    store = connect_store(given["host"], given["port"], prefix="weft", deadline_s=given["deadline_s"])
    seat.send({"where": store.get(WHERE).decode()})


class TorchrunSession(ProcessSession):
    """What leader and followers share: a zygote of their own, an address, torchrun's facts."""

    def __init__(self, place: Place, preload: Sequence[str]) -> None:
        die_with_parent(os.getppid())  # torchrun killed outright takes us along
        self.place = place
        self.host = place.address(os.environ)
        number = next(_opened)
        self.launch = place.job if number == 1 else f"{place.job}-{number}"
        self.restart = place.restart
        super().__init__(preload, env=_nccl_interface(self.host))

    def _check_network(self, insecure: bool) -> None:
        if _is_loopback(self.host):
            return
        if not insecure:
            raise ConfigError(
                f"the {self.place.world} processes stand on several hosts (this one is {self.host}), and what travels between "
                "them (torchrun's rendezvous, Gloo or NCCL, our own messages) is neither encrypted nor authenticated: add "
                "--insecure if you trust the network between them."
            )
        self.notes = (
            "between hosts nothing is encrypted or authenticated: torchrun's rendezvous, gradients, our messages (--insecure)",
        )


class Leader(TorchrunSession):
    """Rank 0's process: to the driver a session like any other, whose members happen to stand elsewhere."""

    def __init__(self, place: Place, preload: Sequence[str]) -> None:
        super().__init__(place, preload)
        self._others: dict[int, Pipe] = {}
        self._alive: set[int] = set()  # ranks whose member runs
        self._first: dict[int, int] = {0: 0}  # of each rank, the first rank on its host
        self._token = secrets.token_hex(16)
        self._starts = itertools.count()

    def join(self, request: Mapping[str, str], deadline_s: float, insecure: bool) -> bool:
        from weft.comm.tcp import listen

        if self.place.world == 1:
            return True
        self._check_network(insecure)
        until = time.monotonic() + deadline_s
        with listen(self.host, insecure=insecure) as listener:
            answer = secrets.token_hex(16)
            where = Where(self.host, listener.getsockname()[1], self._token, answer)
            self._publish(msgspec.json.encode(where).decode(), deadline_s)
            requests = self._gather(listener, answer, until, deadline_s)
        if words := differences(request, requests):
            raise ConfigError(words)
        by_host = itertools.groupby(sorted(self._first), key=lambda rank: self._first[rank])
        self.hosts = tuple(tuple(ranks) for _, ranks in by_host)
        return True

    def _publish(self, where: str, deadline_s: float) -> None:
        payload = self.place.store(deadline_s) | {"serve": not self.place.agent_store, "where": where}
        super().start([MemberSpec(STORE_KEEPER, "store keeper", f"{__name__}:publish", payload)], [])
        while True:
            for event in super().poll(1.0):
                if isinstance(event, Message):
                    return
                if isinstance(event, Exited):
                    raise _unreachable(event, self.place)

    def _gather(
        self, listener: socket.socket, answer: str, until: float, deadline_s: float
    ) -> dict[int, dict[str, str]]:
        """Wait for all others, and let them in who know the token. Returns what each was asked to run."""
        requests: dict[int, dict[str, str]] = {}
        strangers: list[Pipe] = []
        try:
            while missing := sorted(set(range(1, self.place.world)) - requests.keys()):
                left = until - time.monotonic()
                if left <= 0:
                    raise DeadlineExceeded(
                        f"of {self.place.world} processes, rank {', '.join(map(str, missing))} did not come within "
                        f"{deadline_s:g} s: see what torchrun tells of them, or give a longer --deadline.",
                        tuple(missing),
                    )
                waiting: list[socket.socket | Pipe] = [listener, *strangers]
                ready = select.select(waiting, [], [], left)[0]
                for stranger in [s for s in strangers if s in ready]:
                    try:
                        hello = self._hello(stranger)
                    except Closed:
                        strangers.remove(stranger)
                        stranger.close()
                        continue
                    if hello is not None:
                        strangers.remove(stranger)
                        self._others[hello.rank] = stranger
                        requests[hello.rank] = hello.request
                        self._first[hello.rank] = hello.rank - hello.local_rank  # torchrun counts host by host
                        self._tell(stranger, {"answer": answer})
                if listener in ready:
                    if len(strangers) == MAX_STRANGERS:
                        strangers.pop(0).close()
                    strangers.append(Pipe(_ready(listener.accept()[0], deadline_s), limit=MAX_HELLO))
            return requests
        finally:
            for stranger in strangers:
                stranger.close()

    def _hello(self, stranger: Pipe) -> Hello | None:
        """What it said; None: not all of it has come. Raises Closed if it is not one of ours."""
        messages = stranger.read()
        if not messages:
            return None
        try:
            hello = msgspec.convert(messages[0], Hello)
        except msgspec.ValidationError as error:
            raise Closed(f"no hello: {error}") from error
        known = hmac.compare_digest(hello.token.encode(), self._token.encode())
        if not known or not 0 < hello.rank < self.place.world or hello.rank in self._others:
            raise Closed(f"a stranger said hello as rank {hello.rank}")
        stranger.limit = LIMIT
        return hello

    def start(self, members: Sequence[MemberSpec], links: Sequence[LinkSpec]) -> None:
        if not links:
            super().start(members, links)
            return
        if len(members) != self.place.world:
            raise ConfigError(
                f"the pattern needs {len(members)} members, and torchrun started {self.place.world} processes, each for one: "
                f"start {len(members)} (--nnodes times --nproc-per-node)."
            )
        prefix = f"weft/{self._token}/{next(self._starts)}"
        links = [
            dataclasses.replace(
                link,
                host=self.host,
                store=StoreSpec(self.place.master_addr, self.place.master_port, f"{prefix}/{number}"),
            )
            for number, link in enumerate(links)
        ]
        self._alive = set(range(self.place.world))
        self._send(encode_start(members[:1], links))
        for rank, pipe in self._others.items():
            self._tell(pipe, encode_start([_without_task(members[rank])], links))

    def request_stop(self) -> None:
        super().request_stop()
        self._tell_all({"do": "signal", "signal": int(STOP)})

    def ask(self) -> None:
        super().ask()
        self._tell_all({"do": "ask"})

    def kill(self) -> None:
        super().kill()
        self._tell_all({"do": "signal", "signal": int(signal.SIGKILL)})

    def poll(self, timeout_s: float) -> list[SessionEvent]:
        events: list[SessionEvent] = []
        ready = select.select([self._pipe, *self._others.values()], [], [], timeout_s)[0]
        if self._pipe in ready:
            events += [e for e in super().poll(0) if isinstance(e, StopAsked) or e.member != STORE_KEEPER]
        for rank, pipe in list(self._others.items()):
            if pipe in ready:
                events += self._hear(rank, pipe)
        for event in events:
            if isinstance(event, Exited):
                self._alive.discard(event.member)
        return events

    def _hear(self, rank: int, pipe: Pipe) -> list[SessionEvent]:
        try:
            return [StopAsked(rank) if m["event"] == "stop" else translate(m | {"member": rank}) for m in pipe.read()]
        except Closed:
            self._others.pop(rank).close()
            lost = MemberFailed(f"the process of rank {rank}, which torchrun started, is gone", member=rank)
            if rank not in self._alive:
                raise lost from None
            return [Exited(rank, 1, 0, to_wire(lost))]

    def finish(self, outcome: dict[str, Any]) -> None:
        self._tell_all({"do": "end", "outcome": outcome})
        until = time.monotonic() + LINGER_S  # a connection closed on unread bytes would take the outcome back
        while self._others and (left := until - time.monotonic()) > 0:
            for pipe in select.select(list(self._others.values()), [], [], left)[0]:
                try:
                    pipe.read()
                except Closed:
                    self._others = {r: p for r, p in self._others.items() if p is not pipe}
                    pipe.close()

    def close(self) -> None:
        for pipe in self._others.values():
            pipe.close()
        self._others.clear()
        super().close()

    def _tell_all(self, command: dict[str, Any]) -> None:
        for pipe in self._others.values():
            self._tell(pipe, command)

    @staticmethod
    def _tell(pipe: Pipe, command: dict[str, Any]) -> None:
        with contextlib.suppress(Closed):  # the next poll tells of it
            pipe.send(command)


class Where(msgspec.Struct, frozen=True):
    """What the store tells: rank 0's address, and the secrets by which the two sides know each other."""

    host: str
    port: int
    token: str
    answer: str


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first message of a follower."""

    token: str
    rank: int
    local_rank: int
    request: dict[str, str]


class Follower(TorchrunSession):
    """The process of another rank: between its zygote and rank 0."""

    def join(self, request: Mapping[str, str], deadline_s: float, insecure: bool) -> bool:
        self._check_network(insecure)
        until = time.monotonic() + deadline_s
        while True:
            try:
                self._leader = self._meet(request, until, deadline_s)
                return False
            except (OSError, Closed, CommError) as error:
                if time.monotonic() >= until:
                    raise DeadlineExceeded(
                        f"rank {self.place.rank} cannot reach rank 0 within {deadline_s:g} s ({error})", (0,)
                    ) from error
                time.sleep(0.1)

    def _meet(self, request: Mapping[str, str], until: float, deadline_s: float) -> Pipe:
        """One attempt. The address may be one that an earlier attempt left: then nobody gives the answer."""
        left = max(0.1, until - time.monotonic())
        ask = Call(self, lambda output: print(output.text, end="", file=sys.stderr))
        ended = ask(f"{__name__}:look_up", self.place.store(left))
        if ended.failed:
            raise _unreachable(ended, self.place)
        where = msgspec.json.decode(ask.reply["where"], type=Where)
        if _is_loopback(self.host) and not _is_loopback(where.host):
            raise Closed(f"the store names {where.host}, and this run stays on the loopback address")
        pipe = Pipe(_ready(socket.create_connection((where.host, where.port), timeout=HELLO_S), deadline_s))
        try:
            pipe.send(msgspec.to_builtins(Hello(where.token, self.place.rank, self.place.local_rank, dict(request))))
            if not pipe.ready(HELLO_S) or not (said := pipe.read()) or said[0] != {"answer": where.answer}:
                raise Closed("who listens there is not rank 0")
            self._early = said[1:]
            return pipe
        except BaseException:
            pipe.close()
            raise

    def follow(self, task: dict[str, Any], stop_asked: Callable[[], bool]) -> dict[str, Any]:
        told = False
        commands = self._early  # came with the answer
        while True:
            for command in commands:
                if command["do"] == "end":
                    return _outcome(command["outcome"])
                self._obey(command, task)
            ready = select.select([self._pipe, self._leader], [], [], WAKE_S)[0]
            try:
                if stop_asked() and not told:
                    told = True
                    self._leader.send({"event": "stop"})
                if self._pipe in ready:
                    for message in self._heard():
                        self._leader.send(message)
                commands = self._leader.read() if self._leader in ready else []
            except Closed as error:
                raise MemberFailed(
                    f"rank 0's process, which drives the run, is gone: rank {self.place.rank} ends", member=0
                ) from error

    def _heard(self) -> list[dict[str, Any]]:
        try:
            return self._pipe.read()
        except Closed:
            raise self._gone() from None

    def _obey(self, command: dict[str, Any], task: dict[str, Any]) -> None:
        """Start and signal; whatever differs from host to host is filled in here."""
        if command["do"] == "start":
            for link in command["links"]:
                link["host"] = self.host
            for member in command["members"]:
                member["payload"]["config"]["task"] = task
        else:
            assert command["do"] in ("signal", "ask"), command["do"]
        self._send(command)

    def close(self) -> None:
        if (leader := getattr(self, "_leader", None)) is not None:
            leader.close()
        super().close()


def _outcome(outcome: dict[str, Any]) -> dict[str, Any]:
    if "error" in outcome:
        error = from_wire(outcome["error"])
        error.told = True
        raise error
    result: dict[str, Any] = outcome["result"]
    return result


def _without_task(spec: MemberSpec) -> MemberSpec:
    """The file of a task may lie elsewhere on another host, and a pickled one must not travel: each process has its own."""
    config = {**spec.payload["config"], "task": None}
    return dataclasses.replace(spec, payload={**spec.payload, "config": config})


def _unreachable(ended: Exited, place: Place) -> CommError:
    cause = ended.error["message"] if ended.error else f"its process ended with {ended.signal or ended.code}"
    return DeadlineExceeded(f"torchrun's store at {place.master_addr}:{place.master_port} cannot be used: {cause}")


def _ready(sock: socket.socket, deadline_s: float) -> socket.socket:
    """No send or receive blocks for longer than the deadline; a host that is gone shows, though nothing is sent."""
    sock.settimeout(deadline_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 6)):
        if hasattr(socket, option):
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    return sock


def _is_loopback(host: str) -> bool:
    return host.startswith("127.") or host == "::1"


def _nccl_interface(host: str) -> dict[str, str]:
    """NCCL knows interfaces only by name."""
    if _is_loopback(host) or "NCCL_SOCKET_IFNAME" in os.environ:
        return {}
    names = [name for name, of in psutil.net_if_addrs().items() if any(a.address == host for a in of)]
    return {"NCCL_SOCKET_IFNAME": f"={names[0]}"} if names else {}


def differences(mine: Mapping[str, str], theirs: Mapping[int, Mapping[str, str]]) -> str:
    """In words, which ranks were asked for something else than rank 0, and in what; empty if all agree."""
    found: dict[str, list[int]] = {}
    for rank, request in sorted(theirs.items()):
        for name in sorted(mine.keys() | request.keys()):
            here, there = mine.get(name, "nothing"), request.get(name, "nothing")
            if here != there:
                found.setdefault(f"{name}: {there} (rank 0: {here})", []).append(rank)
    if not found:
        return ""
    said = "; ".join(f"rank {', '.join(map(str, ranks))} has {what}" for what, ranks in found.items())
    return f"the processes were not started alike: {said}. Start all with the same command and the same code."


class Torchrun(Cluster):
    """The processes that torchrun started, one member in each; by default wherever torchrun is the parent."""

    name = "torchrun"

    def __init__(self) -> None:
        self.place = Place.read(os.environ)
        self.restart = self.place.restart

    def world(self, workers: int | None) -> int:
        if workers not in (None, self.place.world):
            raise ConfigError(
                f"workers={workers} contradicts torchrun, which started {self.place.world} processes: leave --workers out, or "
                f"start {workers} (--nnodes times --nproc-per-node)."
            )
        return self.place.world

    def open(self, preload: Sequence[str]) -> TorchrunSession:
        return (Leader if self.place.rank == 0 else Follower)(self.place, preload)

    def check(self, carrier: str) -> None:
        if carrier == HIERARCHICAL and not self.place.on_one_host:
            return
        if carrier not in ("gloo", "nccl", "none"):
            raise Incompatible(
                f"link {carrier!r} joins processes of one launcher, and torchrun started these apart: use --link gloo, nccl on "
                "GPUs, hierarchical where there are several hosts, or leave it out."
            )

    def default_carrier(self, world: int, device: str) -> tuple[str, str]:
        if world == 1:
            return "none", "one worker has nobody to talk to"
        from weft.comm.shm import supported

        if device == "cuda":
            return "nccl", "gradients on GPUs"
        if 1 < self.place.local_world < world and supported() is None:
            return (
                HIERARCHICAL,
                "several hosts with several workers each: shared memory within a host, tcp between them",
            )
        return "gloo", "processes that torchrun started, found by its rendezvous"
