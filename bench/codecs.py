"""Speed of the codecs: encode and decode of 25 million float32 on one thread, each against the plain way to write it in torch.

    python bench/codecs.py [--quick] [--save]

The plain ways are what a first implementation does: whole tensors, one operation after the other, new memory for each; for top-k
torch.topk. Both sides encode the same numbers in turns.

Last line: one JSON object. *_GBps: bytes of float32 encoded a second; *_decode_GBps; *_vs_plain: plain time / ours, encoding.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
from harness import Sample, machine, ratio, save
from torch import Tensor

from weft.codecs.base import Keys
from weft.codecs.build import build_codec
from weft.codecs.spec import parse

SIDE = 5000
NUMEL = SIDE * SIDE
WANTED = {"topk:0.01": 5, "int8": 9, "sign": 20, "bf16": 25, "powersgd:4": 1.5, "blocks:0.01": 100}
SPECS = [*WANTED, "fp16", "qsgd", "randomk:0.01"]


def plain_int8(x: Tensor) -> Sequence[Tensor]:
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 1024)).view(-1, 1024)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    return (blocks / scale).round().to(torch.int8), scale


def plain_sign(x: Tensor) -> Sequence[Tensor]:
    bits = (x < 0).view(-1, 8).to(torch.uint8)
    weights = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8)
    return (bits * weights).sum(1, dtype=torch.uint8), x.abs().mean()


def plain_topk(x: Tensor) -> Sequence[Tensor]:
    chosen = torch.topk(x.abs(), math.ceil(0.01 * len(x)), sorted=False).indices
    return x[chosen], chosen


def plain_powersgd(x: Tensor) -> Sequence[Tensor]:
    """As torch's hook does it for one matrix: P = M Q, QR, Q = M' P."""
    m = x.view(SIDE, SIDE)
    p, _ = torch.linalg.qr(m @ PLAIN_Q)
    return p, m.T @ p


def plain_qsgd(x: Tensor) -> Sequence[Tensor]:
    blocks = torch.nn.functional.pad(x, (0, -len(x) % 1024)).view(-1, 1024)
    norm = blocks.norm(dim=1, keepdim=True)
    level = blocks.abs() / norm * 127
    return (level + torch.rand_like(level)).floor() * blocks.sign(), norm


PLAIN_Q = torch.randn(SIDE, 4, generator=torch.Generator().manual_seed(0))
PLAIN: dict[str, Callable[[Tensor], object]] = {
    "topk:0.01": plain_topk,
    "int8": plain_int8,
    "sign": plain_sign,
    "bf16": lambda x: x.to(torch.bfloat16),
    "fp16": lambda x: x.to(torch.float16),
    "powersgd:4": plain_powersgd,
    "blocks:0.01": lambda x: x.view(-1, 1000)[torch.randperm(NUMEL // 1000)[: NUMEL // 100_000]].clone(),
    "randomk:0.01": lambda x: x[torch.randperm(len(x))[: len(x) // 100]],
    "qsgd": plain_qsgd,
}


def seconds(fn: Callable[[], object]) -> float:
    begin = time.perf_counter()
    fn()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three repeats, under a minute")
    parser.add_argument("--save", action="store_true", help="write bench/results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    where = machine()
    lines: list[str] = []
    figures: dict[str, float] = {}

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)

    say(
        f"{where['cpu']}, torch {where['torch']}, one thread, {NUMEL:,} float32; GB/s of float32; median [least..greatest]"
    )
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(NUMEL, generator=generator) * torch.rand(NUMEL, generator=generator) ** 3
    out = torch.zeros(NUMEL)
    for text in SPECS:
        codec = build_codec(parse(text), [("w", torch.Size((SIDE, SIDE)))])
        keys = Keys(1, 2, 0)
        payload = codec.encode(x, keys).clone()
        PLAIN[text](x)
        ours, plain, decode = [], [], []
        for _ in range(3 if args.quick else 9):
            ours.append(seconds(lambda codec=codec, keys=keys: codec.encode(x, keys)))
            plain.append(seconds(lambda text=text: PLAIN[text](x)))
            decode.append(seconds(lambda codec=codec, keys=keys, payload=payload: codec.add_to(out, payload, keys)))
        speed, back = (Sample([4 * NUMEL / s / 1e9 for s in times]) for times in (ours, decode))
        gain = ratio(Sample(plain), Sample(ours))
        wanted = f" (wanted {WANTED[text]})" if text in WANTED else ""
        share = codec.nbytes(NUMEL) / (4 * NUMEL)
        say(
            f"{text:12} encode {speed.text()}{wanted}, decode and add {back.text()}, plain / ours {gain.text()}; {share:.2%} of the bytes"
        )
        name = text.partition(":")[0]
        figures |= {
            f"{name}_GBps": round(speed.median, 2),
            f"{name}_decode_GBps": round(back.median, 2),
            f"{name}_vs_plain": round(gain.median, 2),
        }
    if args.save:
        for path in save("codecs", where, lines, {"ratios": figures}, " ".join(["python", *sys.argv])):
            print(f"wrote {path}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
