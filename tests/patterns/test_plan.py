"""What a plan says of a pattern is true of whatever was picked for it."""

from __future__ import annotations

import pytest
from tests.laws.reference import Regression

from weft import AllReduce, LocalSGD
from weft.config import Config, TaskRef
from weft.cost import COLLECTIVES
from weft.patterns.base import Pattern
from weft.patterns.preflight import preflight


@pytest.mark.parametrize(
    "pattern", [AllReduce(), AllReduce(shared_step="off"), LocalSGD(), LocalSGD(island=2), LocalSGD(start=3)], ids=repr
)
def test_no_collective_is_named_before_one_is_picked(pattern: Pattern) -> None:
    config = Config(task=TaskRef("none"), pattern=pattern.name, workers=4, batch=24, steps=20)
    facts = preflight(Regression(), pattern, config)
    links = [link for carrier in ("shm", "tcp") for link in pattern.links(facts, config, lambda n, w: n, carrier)]
    words = " ".join([*pattern.answers.values(), *(link.members for link in links)]).split()
    assert links
    assert not set(words) & set(COLLECTIVES)
