"""Facts as a preflight would bring them, of a model of equal blocks with numbers that are easy to follow."""

from __future__ import annotations

from typing import Any

from weft.patterns.base import Facts, ItemFact, ParamFact, PipelineFacts, TensorFacts

MB = 1 << 20
NUM_BLOCKS = 8


def facts_of(
    *,
    share_s: float = 1.6,
    tensor: int = 0,
    microbatches: int = 0,
    output_bytes: int = MB,
    activation_bytes: int = 160 * MB,
    per_host: int = 4,
    **changes: Any,
) -> Facts:
    """Eight blocks of a matrix of 10 MB each, AdamW. ``share_s``: forward and backward of a share by one worker; ``tensor``: over so many workers
    the matrices were cut; ``microbatches``: so many of a share;
    ``per_host``: of eight workers."""
    params = [
        ParamFact(f"blocks.{k}.weight", (1024, 2560), "float32", 10 * MB, trainable=True, sparse=False)
        for k in range(NUM_BLOCKS)
    ]
    pieces = max(1, microbatches) * NUM_BLOCKS
    items = [
        ItemFact(
            name=f"blocks.{k}",
            forward_s=share_s / pieces / 3,
            input_gradient_s=share_s / pieces / 3,
            weight_gradient_s=share_s / pieces / 3,
            output_bytes=output_bytes,
            activation_bytes=activation_bytes // pieces,
        )
        for k in range(NUM_BLOCKS)
    ]
    uses = {p.name: [k] for k, p in enumerate(params)}
    known = {
        "params": params,
        "buffers": [],
        "train_examples": 1000,
        "test_examples": 10,
        "optimizer_bytes": 2 * NUM_BLOCKS * 10 * MB,
        "activation_bytes": activation_bytes,
        "sums": {},
        "notes": {},
        "device": "cpu",
        "blocks": {f"blocks.{k}": 10 * MB for k in range(NUM_BLOCKS)},
        "cores": 8.0,
        "hosts": [list(range(k, k + per_host)) for k in range(0, 8, per_host)],
        "step_s": share_s + 0.1,
        "optimizer_s": 0.1,
    }
    if tensor:
        known["tensor"] = TensorFacts(
            styles={},
            parameters=[p.name for p in params],
            exchanged=8 * output_bytes,
            exchanges=2 * NUM_BLOCKS,
            degree=tensor,
            compute_s=share_s / tensor,
            activation_bytes=activation_bytes // tensor,
        )
    if microbatches:
        known["pipeline"] = PipelineFacts(
            items=items, uses=uses, made_of=[0] * NUM_BLOCKS, examples=1, microbatches=microbatches
        )
    return Facts(**known | changes)
