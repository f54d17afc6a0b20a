"""Speed of the codecs on one thread, 25 million float32: encode, decode, and a rank's whole exchange with error feedback.

    python bench/codecs.py [--quick] [--save]

Peers, on the same numbers in turns: the plain way to write it in torch (whole tensors, one operation after the other, new memory
for each; for top-k torch.topk), against encode; and torch's own DDP hooks, against the whole exchange. The hooks run unchanged,
in a process group of one, which moves nothing; the quantization hook does not run on Gloo, so its arithmetic is called instead.

The machine's limits are the best of what was measured between the codecs. A codec that reads all of x encodes at the read limit
at most (PowerSGD, which reads it twice, at half of it; chosen blocks are 1 % of it): *_of_limit is its share of that, the writing
of its payload not counted.

Last line: one JSON object. *_GBps: bytes of float32 encoded a second; *_decode_GBps: decoded and added; *_exchange_GBps: all that
one of two ranks computes in an exchange; *_feedback_GBps: the same where error feedback belongs to it; *_vs_plain: plain time /
ours, encoding; *_vs_torch_hook: the hook's time / our exchange; *_of_limit.
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

from weft.codecs.base import Gather, Keys
from weft.codecs.build import build, build_codec
from weft.codecs.feedback import Plain
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


class Bucket:
    """What DDP hands to a hook: one matrix."""

    def __init__(self, x: Tensor) -> None:
        self.flat = x

    def buffer(self) -> Tensor:
        return self.flat

    def gradients(self) -> list[Tensor]:
        return [self.flat.view(SIDE, SIDE)]

    def index(self) -> int:
        return 0

    def is_last(self) -> bool:
        return True


def torch_hooks() -> dict[str, Callable[[Tensor], object]]:
    """By our name of the codec."""
    import torch.distributed as dist
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook, quantization_hooks

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    state = powerSGD_hook.PowerSGDState(None, matrix_approximation_rank=4, start_powerSGD_iter=2)
    state.iter = 2

    def quantized(x: Tensor) -> Tensor:
        observer = torch.ao.quantization.MinMaxObserver()
        observer(x)
        scale, zero = observer.calculate_qparams()
        codes = quantization_hooks._quantize_per_tensor_backend(x, scale, zero)
        total = torch.zeros_like(codes, dtype=torch.float32)
        for _ in range(2):  # ranks
            total += quantization_hooks._dequantize_per_tensor_backend(codes, scale, zero)
        return total / 2

    return {
        "bf16": lambda x: default_hooks.bf16_compress_hook(None, Bucket(x)).wait(),  # type: ignore[arg-type]
        "fp16": lambda x: default_hooks.fp16_compress_hook(None, Bucket(x)).wait(),  # type: ignore[arg-type]
        "powersgd:4": lambda x: powerSGD_hook.powerSGD_hook(state, Bucket(x)).wait(),  # type: ignore[arg-type]
        "int8": quantized,
    }


def exchange(feedback: Plain, x: Tensor, keys: Keys) -> None:
    """As one of two ranks, whose link takes no time; the other sends the same."""
    exchanging = feedback.exchange(x, keys, 2)
    try:
        asked = next(exchanging)
        while True:
            asked = exchanging.send([asked.payload] * 2 if isinstance(asked, Gather) else None)
    except StopIteration:
        pass


def limits(x: Tensor, out: Tensor) -> list[float]:
    """GB/s of reading, writing and copying 100 MB."""
    return [x.nbytes / seconds(fn) / 1e9 for fn in (x.sum, out.zero_, lambda: out.copy_(x))]


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
    out, given = torch.zeros(NUMEL), torch.zeros(NUMEL)
    repeats = 3 if args.quick else 9
    machines, shown = [limits(x, out) for _ in range(3)], []
    hooks = torch_hooks()
    segments = [("w", torch.Size((SIDE, SIDE)))]
    for text in SPECS:
        codec, feedback = build_codec(parse(text), segments), build(parse(text), segments, x)
        payload = codec.encode(x, Keys(1, 0, 0)).clone()
        times: dict[str, list[float]] = {"encode": [], "plain": [], "decode": [], "exchange": [], "hook": []}
        for number in range(-1, repeats):  # the first is to warm up
            keys = Keys(1, 1 + number, 0)
            now = {
                "encode": seconds(lambda codec=codec, keys=keys: codec.encode(x, keys)),
                "plain": seconds(lambda text=text: PLAIN[text](x)),
                "decode": seconds(lambda codec=codec, payload=payload, keys=keys: codec.add_to(out, payload, keys)),
            }
            given.copy_(x)
            now["exchange"] = seconds(lambda feedback=feedback, keys=keys: exchange(feedback, given, keys))
            given.copy_(x)
            if text in hooks:
                now["hook"] = seconds(lambda text=text: hooks[text](given))
            if number >= 0:
                for what, took in now.items():
                    times[what].append(took)
        speed, back, whole = (Sample([4 * NUMEL / s / 1e9 for s in times[w]]) for w in ("encode", "decode", "exchange"))
        gain = ratio(Sample(times["plain"]), Sample(times["encode"]))
        share = codec.nbytes(NUMEL) / (4 * NUMEL)
        name = text.partition(":")[0]
        with_feedback = " with feedback" if codec.biased else ""
        figures |= {
            f"{name}_GBps": round(speed.median, 2),
            f"{name}_decode_GBps": round(back.median, 2),
            f"{name}_{'feedback' if codec.biased else 'exchange'}_GBps": round(whole.median, 2),
            f"{name}_vs_{'torch_topk' if name == 'topk' else 'plain'}": round(gain.median, 2),
        }
        wanted = f" (wanted {WANTED[text]})" if text in WANTED else ""
        line = (
            f"{text:12} encode {speed.text()}{wanted}, decode and add {back.text()}, "
            f"exchange{with_feedback} {whole.text()}, plain / ours {gain.text()}"
        )
        if times["hook"]:
            over = ratio(Sample(times["hook"]), Sample(times["exchange"]))
            figures[f"{name}_vs_torch_hook"] = round(over.median, 2)
            line += f", torch's hook / our exchange {over.text()}"
        say(f"{line}; {share:.2%} of the bytes")
        shown.append((name, speed.median, {"powersgd": 2.0, "blocks": 0.01, "randomk": 0.01}.get(name, 1.0)))
        machines += [limits(x, out) for _ in range(3)]
    read, write, copy = (max(kind) for kind in zip(*machines, strict=True))
    figures |= {"read_GBps": round(read, 2), "write_GBps": round(write, 2), "copy_GBps": round(copy, 2)}
    figures |= {f"{name}_of_limit": round(speed * passes / read, 2) for name, speed, passes in shown}
    shares = ", ".join(f"{name} {speed * passes / read:.0%}" for name, speed, passes in shown)
    say(
        f"limits of this machine: read {read:.1f}, write {write:.1f}, copy {copy:.1f} GB/s; of the read limit: {shares}"
    )
    if args.save:
        for path in save("codecs", where, lines, {"ratios": figures}, " ".join(["python", *sys.argv])):
            print(f"wrote {path}")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
