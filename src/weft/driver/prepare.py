"""Before the members start: learn the facts of the task, choose what is `auto`, make the plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from weft import compat, cost, errors
from weft.clusters import pick_carrier
from weft.clusters.base import LinkSpec, Session, bytes_by, hosts_of
from weft.comm.link import WORLD
from weft.config import Config, RunFolder
from weft.driver import equivalence
from weft.driver.calls import call
from weft.driver.probe import resolve
from weft.driver.trial import decide, pays
from weft.events import Event
from weft.patterns import registry
from weft.patterns.base import Facts, Pattern, left_behind, numbered
from weft.plan import MemberPlan, Plan
from weft.report.human import format_bytes
from weft.report.observers import Observer, Observers

HEAP_SLACK = 1 << 20
BALANCE_AUTO = "equal shares at first, then by each worker's measured speed; who takes more examples needs more memory for activations"
MIN_SAVE_EVERY = 25


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every member of an attempt is told."""

    config: Config
    run_dir: str
    facts: Facts | None = None
    total_steps: int = 0
    save_every: int = 0  # 0: only at the end
    per_host: int = 1  # workers on the host that has the most
    resume_from: str = ""


@dataclass(frozen=True)
class Prepared:
    config: Config
    pattern: Pattern
    facts: Facts
    plan: Plan
    links: list[LinkSpec]  # the first joins all workers
    total_steps: int
    save_every: int
    news: dict[str, Any] | None = None  # what was measured before
    equal: equivalence.Equivalence | None = None  # to one process, where that was asked for


def prepare(
    config: Config,
    session: Session,
    observer: Observer,
    folder: RunFolder | None,
    found: Mapping[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> Prepared:
    """Learn the facts in a throw-away member, choose what is `auto`, make the plan. ``found``: the checkpoint to go on from, if
    any; ``notes``: what else to say in the plan."""
    per_host = max(map(len, session.hosts), default=config.workers)
    job = Job(config=config, run_dir=str(folder.path) if folder else "", per_host=per_host)
    reply = call(session, observer, "weft.member:learn_facts", msgspec.to_builtins(job))
    config = msgspec.convert(reply["config"], Config, strict=False)
    facts = msgspec.convert(reply["facts"], Facts, strict=False)
    hosts = [list(members) for members in session.hosts] or [list(range(config.workers))]
    facts = msgspec.structs.replace(facts, between_hosts=len(hosts) > 1, hosts=hosts)
    compat.check(config)
    pattern = registry.build(config.pattern, config.pattern_options)
    comes_and_goes = any(group.frames for group in pattern.groups(facts, config.workers))
    num_members = len(numbered(pattern.roles(config.workers)))
    chosen, why = pick_carrier(config.cluster, config.link, num_members, facts.device)
    if comes_and_goes and config.link == cost.AUTO:
        chosen = cost.carrier_of_frames(chosen)
        why = "members may go while others stay" + "; all on one host: large payloads are read where they lie" * (
            chosen == "shm"
        )
    compat.check_collective(config.collective, chosen)

    def links_of(pattern: Pattern, facts: Facts, speed: cost.LinkSpeed | None = None) -> list[LinkSpec]:
        """``speed``: of the link of all workers, where it was measured."""
        return [
            LinkSpec(
                cost.carrier_aside(chosen, config.link) if group.aside else chosen,
                len(group.members),
                config.deadline_s,
                nbytes=group.nbytes + HEAP_SLACK,
                aside=group.aside,
                frames=group.frames,
                port=config.port if group.name == WORLD else 0,
                device=facts.device,
                group=group.name,
                members=group.members,
                collective=config.collective,
                hosts=hosts_of(group.members, session.hosts) if chosen == cost.HIERARCHICAL else (),
                speed=speed if k == 0 else None,
            )
            for k, group in enumerate(pattern.groups(facts, config.workers))
        ]

    resolved = resolve(config, facts, pattern, links_of(pattern, facts)[0], session, observer)
    config, facts, pattern = resolved.config, resolved.facts, resolved.pattern
    pattern.check(facts, config)
    total = config.total_steps(facts.train_examples)
    compared = equivalence.announce(config, facts, pattern, total)
    here = -(-config.workers // max(1, len(session.hosts)))

    def shortage() -> Shortage | None:
        if facts.device != "cpu":
            return None
        return memory_shortage(memory_of(pattern, facts, config, chosen), here, facts.memory_left, pattern.splits)

    if (short := shortage()) and short.certain and folder is not None:
        raise errors.ConfigError(short.text)
    left = total - (found["step"] if found else 0)
    if resolved.is_new and not short and pays(resolved, links_of, left):
        if folder is not None or pattern.tries == "always":
            resolved = decide(resolved, links_of, total, left, session, observer)
            config, facts = resolved.config, resolved.facts
            short = shortage()
        else:
            notes = [
                *notes,
                "before the run, steps of what may be quickest are tried: to try them here, too, -o trial=always",
            ]
    links = links_of(pattern, facts, resolved.speed)
    if found:
        notes = [*about_handover(found, config), *notes]
    save_every = save_interval(config, total, pattern.period(facts, config))
    plan = make_plan(config, facts, pattern, links, total, save_every, why, [*notes, *session.notes], resolved.tried_s)
    if short:
        plan.notes.insert(0, short.text)
    if resolved.choice:
        plan.choices["compress"] = resolved.choice
    plan.choices.update(compared)
    if isinstance(observer, Observers):
        plan.choices.update(observer.choices)
    observer.on_plan(plan)
    return Prepared(config, pattern, facts, plan, links, total, save_every, resolved.news)


def find_checkpoint(session: Session, folder: RunFolder, observer: Observer) -> dict[str, Any]:
    """{"path", "step", "world", "pattern", "pattern_options"} of the newest good one; empty if none was ever saved. Damaged ones are told and skipped."""
    reply = call(session, observer, "weft.member:find_checkpoint", {"run_dir": str(folder.path)})
    for reason in reply["skipped"]:
        observer.on_event(
            Event(kind="warning", role="driver", values={"text": f"skipped a damaged checkpoint: {reason}"})
        )
    if "path" not in reply and reply["skipped"]:
        raise errors.CheckpointError(f"no checkpoint of {str(folder.path)!r} is good: {'; '.join(reply['skipped'])}")
    return {name: value for name, value in reply.items() if name != "skipped"}


def about_handover(found: Mapping[str, Any], config: Config) -> list[str]:
    """What a run of another pattern or another number of workers goes on with, and what not, for the plan."""
    saved = registry.build(found["pattern"], found["pattern_options"])
    now = registry.build(config.pattern, config.pattern_options)
    lost = [kept.otherwise for kept in left_behind(saved, found["world"], now, config.workers) if kept.otherwise]
    if not lost and (saved.name, found["world"]) == (now.name, config.workers):
        return []
    of = f"step {found['step']} of {saved.name} with {found['world']} worker{'s' * (found['world'] != 1)}"
    return ["; ".join([f"goes on from {of}", *lost])]


def memory_of(pattern: Pattern, facts: Facts, config: Config, carrier: str) -> dict[str, int]:
    """Of a worker, by purpose."""
    memory = pattern.memory(facts, config.workers, carrier)
    if training := facts.indexes.get("training"):
        memory = memory | {"data": min(training.buffer_bytes, sum(file.size for file in training.files))}
    return memory


def make_plan(
    config: Config,
    facts: Facts,
    pattern: Pattern,
    specs: Sequence[LinkSpec],
    total_steps: int,
    save_every: int,
    why: str,
    more_notes: Sequence[str] = (),
    tried_s: float = 0.0,
) -> Plan:
    carrier = specs[0].carrier
    num = pattern.shares(config.workers)
    shares = [
        config.batch * (share + 1) // num - config.batch * share // num
        for share in (pattern.share_of(rank, config.workers) for rank in range(config.workers))
    ]
    if facts.owned:
        shares = [round(config.batch * owned / sum(facts.owned)) for owned in facts.owned]
    memory = memory_of(pattern, facts, config, carrier)
    step = pattern.predict(facts, config, bytes_by(specs), carrier, tried_s)
    return Plan(
        task=config.task.name,
        pattern=config.pattern,
        tier=pattern.tier,
        answers=pattern.answers,
        cluster=config.cluster,
        steps=total_steps,
        epochs=total_steps / config.steps_per_epoch(facts.train_examples) if facts.train_examples else None,
        batch=config.batch,
        num_parameters=sum(math.prod(p.shape) for p in facts.params),
        num_trainable=sum(math.prod(p.shape) for p in facts.params if p.trainable),
        train_examples=facts.train_examples,
        test_examples=facts.test_examples,
        dtype=config.dtype,
        members=[
            MemberPlan(
                role=role.name,
                member=m,
                device=facts.device,
                does=role.does,
                examples_per_step=shares[m] if m < len(shares) else 0,
                memory=memory
                if role.name == "worker"
                else pattern.memory_of(role.name, facts, config.workers, carrier),
            )
            for m, role in numbered(pattern.roles(config.workers))
        ],
        links=pattern.links(facts, config, bytes_by(specs), carrier),
        step=step,
        checkpoints=checkpoint_policy(config, save_every, total_steps),
        choices={
            "link": f"{carrier} ({why})",
            "device": f"{facts.device} ({'asked for' if config.device != 'auto' else 'auto'})",
        }
        | how_messages_travel(specs)
        | ({"balance": BALANCE_AUTO} if config.balance == "auto" else {})
        | pattern.choices(facts, config, carrier),
        notes=[
            *([step.advice] if step and step.advice else []),
            *pattern.notes(facts, config),
            *facts.about_data,
            *([f"data: partition {config.partition}"] if config.partition != "shuffle" else []),
            *more_notes,
        ],
        config={k: v for k, v in msgspec.to_builtins(config).items() if k != "task"},
    )


@dataclass(frozen=True)
class Shortage:
    text: str
    certain: bool  # what stays for the whole run is too much, whatever the activations are


def memory_shortage(each: Mapping[str, int], workers: int, left: int, split: bool) -> Shortage | None:
    """Of ``workers`` on one machine, each of which is predicted to take ``each`` by purpose, where ``left`` bytes are left. ``split``:
    each holds but a part of the model already."""
    state = workers * sum(each.get(purpose, 0) for purpose in ("parameters", "gradients", "optimizer"))
    whole = workers * sum(each.values())
    if not left or whole <= left:
        return None
    who = f"{workers} workers on this machine" if workers > 1 else "the worker"
    has = f"{format_bytes(left)} of memory are left"
    sharded = "" if split else "--pattern sharded (each worker holds a part), "
    if state > left:
        return Shortage(
            f"parameters, gradients and optimizer of {who} take {format_bytes(state)}, and {has}: use {sharded}more machines, or a "
            "smaller model.",
            True,
        )
    return Shortage(
        f"memory is short: {who} may take {format_bytes(whole)} at the peak of a step, and {has}: use a smaller --batch, -o accumulate=, "
        f"{sharded}or more machines",
        False,
    )


def how_messages_travel(specs: Sequence[LinkSpec]) -> dict[str, str]:
    """For the plan: by which algorithm each group all-reduces, by size; nothing where the carrier has its own way."""
    said: dict[str, str] = {}
    for spec in specs:
        if spec.aside or spec.frames:  # nothing is reduced there
            continue
        between = len(spec.hosts) if spec.carrier == cost.HIERARCHICAL else spec.world
        if spec.carrier in (cost.HIERARCHICAL, *cost.MESSAGE_CARRIERS) and between > 1:
            name = "collective" if spec.group == WORLD else f"collective of {spec.group}"
            said.setdefault(name, cost.picks_in_words(between, spec.collective, spec.speed))
    return said


def save_interval(config: Config, total_steps: int, period: int) -> int:
    """Steps between checkpoints; 0: only at the end. By default whole periods of the pattern: they cost no exchange."""
    if config.save_every is not None:
        return config.save_every
    every = max(MIN_SAVE_EVERY, total_steps // 10)
    return math.ceil(every / period) * period


def checkpoint_policy(config: Config, every: int, total_steps: int) -> str:
    when = f"every {every} steps and at the end" if 0 < every < total_steps else "at the end"
    return f"{when}, the last {config.keep} are kept"
