"""What no number of workers shortens: a recurrent model's time chunk waits for the one before, a layer's for the layer before."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from weft.pipelines.costs import Cost


def sequential_s(costs: Sequence[Sequence[Cost]], microbatches: int) -> float:
    """Seconds that a step takes at least, were every block on a worker of its own and all links free. ``costs``: by time chunk, by block, of
    one microbatch.

    The longer of: one microbatch's way through the grid of chunks and blocks, forward and back (alike blocks and chunks: chunks + blocks - 1 of
    them); and all that one block has to compute, from when the first chunk reaches it until the gradient has gone the same way back.
    """
    last = costs[-1]

    def backward_s(cost: Cost) -> float:
        return cost.input_gradient_s + cost.weight_gradient_s

    one = _through(costs, lambda cost: cost.forward_s) + _through(costs, backward_s)
    ways = [0.0]
    for k in range(len(last)):
        ends = sum(cost.seconds for cost in costs[0][:k])
        ways.append(ends + microbatches * sum(chunk[k].seconds for chunk in costs))
    return max(one, *ways)


def _through(costs: Sequence[Sequence[Cost]], seconds: Callable[[Cost], float]) -> float:
    """The longest way from the first block's first chunk to the last block's last one."""
    ends = [0.0] * len(costs[0])
    for chunk in costs:
        before = 0.0
        for k, cost in enumerate(chunk):
            before = ends[k] = max(ends[k], before) + seconds(cost)
    return ends[-1]
