"""May these go together? If not, one sentence why and the nearest that works. Pure: called before any worker starts."""

from __future__ import annotations

import math
from collections.abc import Mapping

from weft.config import Config
from weft.cost import AUTO, COLLECTIVES, HIERARCHICAL, MESSAGE_CARRIERS
from weft.data.partition import parse as parse_partitioner
from weft.errors import ConfigError, Incompatible, UnknownName
from weft.patterns import registry

DTYPES = ("float32", "float64")
DEVICES = ("auto", "cpu", "cuda")
LINKS = ("auto", "shm", "tcp", "gloo", "nccl", "inproc", "hierarchical")
BALANCES = ("none", "auto")
MAX_WORKERS = 4096
MIN_DEADLINE_S = 0.01  # below it a worker that computes at all is late
#: Pattern -> (its option that is a pattern, what may stand there, why nothing else).
NESTS: dict[str, tuple[str, tuple[str, ...], str]] = {
    "localsgd": ("within", ("allreduce",), "the workers of an island must hold equal replicas after each step"),
}


def check(config: Config) -> None:
    """Every field that can be judged without looking at the task."""
    for what, value, choices in (
        ("dtype", config.dtype, DTYPES),
        ("device", config.device, DEVICES),
        ("link", config.link, LINKS),
        ("balance", config.balance, BALANCES),
        ("collective", config.collective, (AUTO, *COLLECTIVES)),
    ):
        if value not in choices:
            raise UnknownName.of(what, str(value), choices)
    _check_nesting(config)
    _at_least("workers", config.workers, 1)
    _at_least("batch", config.batch, 0)
    _at_least("threads", config.threads, 1)
    _at_least("keep", config.keep, 1)
    _at_least("restarts", config.restarts, 0)
    _at_least("eval-every", config.eval_every, 0)
    _at_least("check-equivalence", config.check_equivalence, 0)
    if config.tolerance is not None:
        _check_tolerance(config.tolerance, config.check_equivalence)
    if config.save_every is not None:
        _at_least("save-every", config.save_every, 0)
    if config.workers > MAX_WORKERS:
        raise ConfigError(
            f"workers={config.workers} is more than {MAX_WORKERS}, the most that one launcher supervises."
        )
    if config.steps is not None and config.epochs is not None:
        raise ConfigError(
            f"steps={config.steps} and epochs={config.epochs} both say how long to train: give one of them."
        )
    if config.steps is not None:
        _at_least("steps", config.steps, 1)
    if config.epochs is not None and not (config.epochs > 0 and math.isfinite(config.epochs)):
        raise ConfigError(f"epochs={config.epochs} is not possible: give a positive number.")
    if not (config.deadline_s >= MIN_DEADLINE_S and math.isfinite(config.deadline_s)):
        raise ConfigError(
            f"deadline={config.deadline_s} is not possible: give seconds, {MIN_DEADLINE_S:g} or more (--deadline)."
        )
    pattern = registry.build(config.pattern, config.pattern_options)
    shares = pattern.shares(config.workers)
    if 0 < config.batch < shares:
        raise ConfigError(
            f"batch {config.batch} is smaller than the world of {shares}: the joined batch is shared by all workers, "
            f"so give --batch {shares} or more, or fewer workers."
            if shares == config.workers
            else f"batch {config.batch} is smaller than the {shares} shares into which {config.pattern} cuts it: give --batch {shares} or more."
        )
    if config.port:
        if not 1 <= config.port <= 65536 - config.workers:
            raise ConfigError(
                f"port={config.port} is not possible: worker r listens on port + r, within 1 to 65535; 0 takes free ports."
            )
        if config.link != "tcp":
            raise Incompatible(
                f"port={config.port} says where workers listen, and link {config.link!r} has no ports: add --link tcp."
            )
    check_collective(config.collective, config.link)
    if not -1 <= config.metrics_port <= 65535:
        raise ConfigError(
            f"metrics_port={config.metrics_port} is not possible: give 1 to 65535, 0 for any free port, -1 for none."
        )
    if config.link == "nccl" and config.device == "cpu":
        raise Incompatible(
            "link 'nccl' moves data between GPUs, and the device is cpu: use --device cuda, or --link gloo or shm."
        )
    if config.device == "cuda" and config.link in ("shm", "tcp", "inproc", HIERARCHICAL):
        raise Incompatible(f"link {config.link!r} moves data in main memory, and the device is cuda: use --link nccl.")
    if config.cluster == "torchrun" and config.restarts:
        raise Incompatible(
            f"restarts={config.restarts}: under torchrun it is torchrun that restarts: give it --max-restarts {config.restarts} "
            "instead, and the run goes on from its newest checkpoint."
        )
    if config.insecure and config.cluster != "torchrun":
        raise Incompatible(
            f"--insecure lets several hosts talk in the clear, and the cluster {config.cluster!r} stays on this one: leave it out."
        )
    if config.workers == 1 and config.link != "auto" and sum(role.count for role in pattern.roles(1)) == 1:
        raise Incompatible(
            f"link {config.link!r} joins workers, and there is only one: leave --link out, or use more workers."
        )
    if config.balance == "auto":
        _check_balance(config)


def check_collective(collective: str, carrier: str) -> None:
    """``carrier``: the one asked for, or chosen; ``auto`` is judged again when it has become one."""
    if collective == AUTO or carrier in (AUTO, HIERARCHICAL, *MESSAGE_CARRIERS):
        return
    if carrier == "none":
        raise Incompatible(
            f"collective {collective!r} joins workers, and there is only one: leave --collective out, or use more workers."
        )
    raise Incompatible(
        f"collective {collective!r} says how messages travel, and link {carrier!r} has a way of its own: add --link tcp, or leave "
        "--collective out."
    )


def _check_balance(config: Config) -> None:
    if config.workers == 1:
        raise Incompatible("balance 'auto' shares a batch between workers, and there is only one: leave --balance out.")
    if parse_partitioner(config.partition).fixed:
        raise Incompatible(
            f"balance 'auto' gives quick workers more of each batch, and partition {config.partition!r} lets a worker draw from "
            "its own shard only: use --partition shuffle."
        )
    if not registry.PATTERNS[config.pattern].balances:
        can = ", ".join(name for name, pattern in registry.PATTERNS.items() if pattern.balances)
        raise Incompatible(
            f"balance 'auto' needs every worker's time at each step, which pattern {config.pattern!r} does not "
            f"go by: use --pattern {can}, or leave --balance out."
        )


def _check_tolerance(tolerance: float, steps: int) -> None:
    if not 0 <= tolerance < 1:
        raise ConfigError(
            f"tolerance={tolerance} is not possible: give the largest difference of gradients, relative to their norm, from 0 to below 1."
        )
    if not steps:
        raise Incompatible(
            f"tolerance={tolerance} is that of a comparison which was not asked for: add --check-equivalence."
        )


def _check_nesting(config: Config) -> None:
    option, allowed, reason = NESTS.get(config.pattern, ("", (), ""))
    given = config.pattern_options.get(option)
    kind = given.get("kind") if isinstance(given, Mapping) else given
    if kind is not None and kind not in allowed:
        raise Incompatible(
            f"{option}={kind} cannot stand in pattern {config.pattern!r}: {reason}. Possible: {', '.join(allowed)}."
        )


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value} is not possible: give a whole number of {least} or more.")
