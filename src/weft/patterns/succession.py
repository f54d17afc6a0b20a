"""Who leads next: what a replicated server does when another is gone, and when one that was gone is back.

One that misses the lead, or the lead, if it misses another, proposes the next epoch to all members. With the promises of a majority, and what the servers
among them have, it forms a view (servers/views.py) and installs it on these: each takes its copies to the same version, and gives its shards to who
shall have a copy. When all are ready the workers are told, and do anew what they were at. A proposer that is lost meanwhile is missed by the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from weft.errors import PeerLost
from weft.servers import messages as m
from weft.servers.views import Told, View, decide, majority

if TYPE_CHECKING:
    from weft.patterns.leading import Replicated

STAGGER_S = 0.15  # between those that may propose: the first one should be enough
AGAIN_S = 0.1  # after which one that denied is asked again: it may have learned meanwhile what the others know
ALL_S = 0.25  # how long a majority waits for the rest of the servers


@dataclass
class Election:
    """``epoch``, as it was proposed."""

    epoch: int
    begun: float
    asked: float
    grants: dict[int, tuple[View, Told | None]] = field(default_factory=dict)
    denied: set[int] = field(default_factory=set)
    is_split: bool = False  # somebody has promised it, or a later one, to another


class Succession:
    def __init__(self, server: Replicated, members: int) -> None:
        self.server, self.endpoint, self.voter = server, server.endpoint, server.voter
        self.members, self.needed = members, majority(members)
        self.election: Election | None = None
        self.awaited: set[int] = set()  # servers that are not ready for the view that we have formed
        self.took_part: set[int] = set(server.servers)  # in the newest view, if only without a shard
        self.missed: set[int] = set()  # by others, who told us
        self.gone_since: dict[int, float] = {}
        self.not_before = self.not_back_before = 0.0  # we propose nothing
        self.not_told_before = 0.0  # the lead that we miss somebody
        self.unsettled_since = time.monotonic()
        self.newest = 0  # epoch that we have heard of
        self.reasons: dict[int, str] = {}

    # -- who is there

    def is_there(self, member: int) -> bool:
        return member == self.server.rank or (member in self.endpoint.peers and member not in self.endpoint.silent)

    @property
    def is_behind(self) -> bool:
        """Others have a view that we are not in."""
        return self.newest > self.voter.view.epoch

    @property
    def is_settled(self) -> bool:
        """Nobody is missed, and nothing is under way."""
        return self.election is None and not (self.gone_since.keys() & self.voter.view.servers) and self.voter.is_free

    def on_busy(self, peer: int, busy: m.Busy, _: Any = None) -> None:
        if peer == self.voter.view.lead:
            self.endpoint.patience[peer] = self.endpoint.deadline_s if busy.busy else self.server.pattern.detect_s

    def tend(self) -> None:
        """Now and then, and after whatever came."""
        now = time.monotonic()
        for server in self.server.servers:
            if self.is_there(server):
                self.gone_since.pop(server, None)
            else:
                self.gone_since.setdefault(server, now)
        self.give_up_in_time(now)
        if self.election is not None:
            self.go_on(self.election, now)
        elif now >= self.not_before and self.must_propose(now):
            self.propose(now)
        elif now >= self.not_told_before:
            self.tell_lead(now)

    def give_up_in_time(self, now: float) -> None:
        """Nobody waits longer than the deadline for a view that he is in."""
        if self.is_settled and not self.is_behind and not self.awaited:
            self.unsettled_since = now
        elif now - self.unsettled_since > self.endpoint.deadline_s:
            gone = tuple(sorted(self.gone_since)) or (self.voter.view.lead,)
            names = ", ".join(map(str, gone))
            agree = (
                f"; of {self.members} members {len(self.election.grants)} agree who follows, {self.needed} must"
                if self.election
                else ""
            )
            raise PeerLost(f"server {names} is gone ({self.reasons.get(gone[0], 'no sign of life')}){agree}", gone)

    def must_propose(self, now: float) -> bool:
        view, rank = self.voter.view, self.server.rank
        if view.lead == rank and not self.is_behind:
            back = [s for s in self.server.servers if s not in self.took_part and self.is_there(s)]
            gone = (self.gone_since.keys() | self.missed) & (view.servers | self.awaited)
            return bool(gone) or not self.voter.is_free or bool(back and now >= self.not_back_before)
        if view.lead not in self.gone_since:
            return False
        servers = list(self.server.servers)
        first = servers.index(view.lead)
        order = [s for s in servers[first + 1 :] + servers[:first] if self.is_there(s)]
        return now - self.gone_since[view.lead] >= order.index(rank) * STAGGER_S

    @property
    def missed_by_us(self) -> set[int]:
        """Of those with whom we hold a shard."""
        view = self.voter.view
        near = {member for chain in view.chains if self.server.rank in chain for member in chain}
        return (near & self.gone_since.keys()) - {view.lead} if view.lead != self.server.rank else set()

    def tell_lead(self, now: float) -> None:
        self.not_told_before = now + AGAIN_S
        for member in self.missed_by_us:
            self.server.send(self.voter.view.lead, m.Misses(self.voter.view.epoch, member))

    def on_misses(self, peer: int, misses: m.Misses, _: Any = None) -> None:
        self.missed.add(misses.member)

    # -- an election

    def propose(self, now: float) -> None:
        epoch = max(self.voter.promised, self.newest) + 1
        self.voter.promised = epoch
        self.awaited.clear()
        self.election = Election(epoch, now, now)
        self.election.grants[self.server.rank] = (self.voter.view, self.server.told())
        self.ask(range(self.members))

    def ask(self, members: Iterable[int]) -> None:
        assert self.election is not None
        for member in members:
            if member not in self.election.grants:
                self.server.send(member, m.Propose(self.election.epoch, self.voter.view))

    def go_on(self, election: Election, now: float) -> None:
        rest = {s for s in self.server.servers if self.is_there(s)} - election.grants.keys() - election.denied
        if len(election.grants) >= self.needed and (not rest - self.missed or now - election.begun > ALL_S):
            self.conclude(election, now)
        elif self.is_behind or election.is_split:  # others propose, too: the first of us goes on
            self.election = None
            self.not_before = now + STAGGER_S * (1 + self.server.servers.index(self.server.rank))
        elif now - election.asked > AGAIN_S:
            election.asked = now
            self.ask(set(election.denied))

    def on_propose(self, peer: int, propose: m.Propose, _: Any = None) -> None:
        if self.voter.grants(propose.epoch, peer, propose.view, self.is_there):
            self.server.send(peer, m.Grant(propose.epoch, self.voter.view, self.server.told()))
        else:
            self.server.send(peer, m.Deny(self.voter.promised, self.voter.view.epoch))
            if self.voter.view.lead == self.server.rank:  # others may have granted it: we propose a later one
                self.voter.promised = max(self.voter.promised, propose.epoch)

    def on_grant(self, peer: int, grant: m.Grant, _: Any = None) -> None:
        if self.election is not None and grant.epoch == self.election.epoch:
            self.election.grants[peer] = (grant.view, grant.told)
            self.election.denied.discard(peer)

    def on_deny(self, peer: int, deny: m.Deny, _: Any = None) -> None:
        self.newest = max(self.newest, deny.of)
        if self.election is not None:
            self.election.denied.add(peer)
            self.election.is_split |= deny.promised >= self.election.epoch
        if deny.promised > self.voter.promised:
            if self.election is None and self.voter.view.lead == self.server.rank and not self.is_behind:
                self.missed.add(peer)  # it waits for a view that its proposer has not formed: it gets one
            self.voter.promised = deny.promised

    def conclude(self, election: Election, now: float) -> None:
        told = {member: told for member, (_, told) in election.grants.items() if told is not None}
        base = max((election.grants[member][0] for member in told), key=lambda view: view.epoch)
        try:
            made = decide(election.epoch, self.server.rank, base, told, self.server.pattern.replicas)
        except PeerLost as error:  # of those who hold the missing one somebody may answer yet
            if not set(error.ranks) & set(self.endpoint.peers):
                raise
            if now - election.asked > AGAIN_S:
                election.asked = now
                self.ask(set(error.ranks))
            return
        self.election = None
        install = m.Install(made.view, made.version, made.norm, made.fresh, made.lowest, made.closed)
        self.awaited = set(told)
        self.took_part = set(told)
        self.missed.clear()
        self.not_back_before = (
            time.monotonic() + self.server.pattern.detect_s
        )  # one that does not answer is not asked all the time
        lost = sorted(base.servers - told.keys())
        chains = [list(chain) for chain in made.view.chains]
        self.server.ctx.tell("view", epoch=election.epoch, lead=self.server.rank, chains=chains, gone=lost)
        for server in told:
            self.server.send(server, install)

    # -- a view

    def on_install(self, peer: int, install: m.Install, _: Any = None) -> None:
        if self.voter.adopts(install.view):
            self.election, self.newest = None, max(self.newest, install.view.epoch)
            self.server.install(install)
        else:
            self.server.send(peer, m.Deny(self.voter.promised, self.voter.view.epoch))

    def on_ready(self, peer: int, ready: m.Ready, _: Any = None) -> None:
        if ready.epoch == self.voter.view.epoch and peer in self.awaited:
            self.awaited.discard(peer)
            if not self.awaited:
                self.server.activate()
