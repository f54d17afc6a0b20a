"""Codecs against plain versions of themselves, and the laws that all of them keep."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.codecs.exchanged import exchange_all
from torch import Tensor

from weft.codecs.base import Codec, Keys
from weft.codecs.build import build, build_codec
from weft.codecs.feedback import ErrorFeedback, Momentum, MomentumCorrection, RunningMomentum
from weft.codecs.lowrank import PowerSgd, orthonormalise_
from weft.codecs.quantize import Int8, Qsgd, Sign
from weft.codecs.sparsify import RandomBlocks, RandomK, TopK, largest, where_true
from weft.codecs.spec import CODECS, parse
from weft.errors import ConfigError, UnknownName

KEYS = Keys(12345, 67, 8)
SPECS = [
    "bf16", "fp16", "int8", "qsgd", "qsgd:7", "qsgd:1", "sign", "topk:0.01", "topk:1", "randomk:0.1", "blocks:0.2", "powersgd:2",
]  # fmt: skip
SIZES = [0, 1, 7, 1023, 1024, 1025, 4096, 65_535, 65_537, 300_007]


def segments_of(numel: int) -> list[tuple[str, torch.Size]]:
    """A matrix, where there is room for one, and a vector."""
    side = min(math.isqrt(numel), 40)
    rest = numel - side * side
    return [("w", torch.Size((side, side))), ("b", torch.Size((rest,)))]


def make(spec: str, numel: int) -> Codec:
    return build_codec(parse(spec), segments_of(numel))


def given_tensor(numel: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of very different scale from place to place, with zeros, as gradients are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(numel, generator=generator, dtype=dtype)
    x *= torch.logspace(-3, 1, numel, dtype=dtype) if numel > 1 else 1.0
    x[torch.rand(numel, generator=generator) < 0.1] = 0.0
    return x


def decoded(codec: Codec, x: Tensor) -> Tensor:
    payload = codec.encode(x, KEYS).clone()
    assert payload.nbytes == codec.nbytes(len(x), x.element_size())
    out = torch.full_like(x, 7.0)
    codec.decode(payload, out, KEYS)
    added = torch.ones_like(x)
    codec.add_to(added, payload, KEYS, alpha=-2.0)
    assert torch.allclose(added, 1.0 - 2.0 * out, rtol=1e-5, atol=1e-6)
    return out


# -- what each one does


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("spec", SPECS)
def test_bytes_are_as_told_and_encoding_leaves_its_input_alone(spec: str, numel: int, dtype: torch.dtype) -> None:
    x = given_tensor(numel, dtype=dtype)
    before = x.clone()
    got = decoded(make(spec, numel), x)
    assert torch.equal(x, before)
    assert bool(got.isfinite().all())


@pytest.mark.parametrize("numel", SIZES)
def test_int8_is_off_by_half_a_step_of_its_block_at_most(numel: int) -> None:
    x = given_tensor(numel)
    error = (decoded(Int8(), x) - x).abs()
    for block, wrong in zip(x.split(1024), error.split(1024), strict=True):
        if len(block):
            assert wrong.max() <= block.abs().max() / 127 * 0.5001


@pytest.mark.parametrize("levels", [1, 3, 7, 8, 127])
def test_qsgd_rounds_to_levels_and_is_right_on_average(levels: int) -> None:
    x = given_tensor(3000)
    codec = Qsgd(levels)
    total = torch.zeros(3000, dtype=torch.float64)
    trials = 400
    for k in range(trials):
        out = torch.zeros(3000)
        codec.add_to(out, codec.encode(x, Keys(0, k, 5)), Keys(0, k, 0))
        total += out
        if k == 0:
            for block, got in zip(x.split(1024), out.split(1024), strict=True):
                step = torch.linalg.vector_norm(block) / levels
                assert torch.allclose((got / step).round() * step, got, atol=1e-5 * float(step))
                assert bool(((got - block).abs() <= step * 1.0001).all())
    spread = torch.cat([torch.linalg.vector_norm(b).expand(len(b)) / levels for b in x.split(1024)])
    assert bool(((total / trials - x).abs() <= 5 * spread / 2 / math.sqrt(trials) + 1e-6).all())


BFLOAT16 = 2.0**-8


def best_rank_one(m: Tensor) -> Tensor:
    """Rows' sums times columns' sums of |m|, scaled by least squares over the flat values."""
    size = m.abs().double()
    a = torch.outer(size.sum(1), size.sum(0))
    return a * torch.linalg.lstsq(a.reshape(-1, 1), size.reshape(-1, 1)).solution


@pytest.mark.parametrize("shape", [(40, 50), (5000, 130), (33, 4, 9), (32, 32)])
def test_sign_is_the_sign_times_what_row_and_column_say(shape: tuple[int, ...]) -> None:
    x = given_tensor(math.prod(shape))
    m = x.view(shape[0], -1)
    got = decoded(Sign([("w", torch.Size(shape))]), x).view_as(m)
    assert torch.allclose(got.abs().double(), best_rank_one(m), rtol=3 * BFLOAT16)
    assert torch.equal(torch.signbit(got), torch.signbit(m))


@pytest.mark.parametrize(
    ("shape", "means", "factors"),
    [((31, 40), 1, 31), ((40, 31), 0, 32), ((3, 31), None, 1), ((1000,), None, 1)],
    ids=["few rows", "few columns", "few of both", "a vector"],
)
def test_a_factor_of_sign_covers_32_values_or_is_none(shape: tuple[int, ...], means: int | None, factors: int) -> None:
    x = given_tensor(math.prod(shape))
    m = x.view(shape)
    codec = Sign([("w", torch.Size(shape))])
    want = m.abs().mean() if means is None else m.abs().mean(means, keepdim=True)
    assert torch.allclose(decoded(codec, x).view(shape).abs(), want.expand(shape), rtol=2 * BFLOAT16)
    assert codec.nbytes(len(x)) == 2 * factors + -(-len(x) // 8)


def test_what_sign_leaves_out_is_never_more_than_there_was() -> None:
    """Else error feedback would not converge. Rank one alone would be off by more: by a cross, whose loud row and column meet in 0."""
    cross = torch.zeros(100, 100)
    cross[0, 1:] = cross[1:, 0] = 1.0
    for m in (cross, torch.eye(100), given_tensor(10_000).view(100, 100)):
        x = m.reshape(-1)
        left = torch.linalg.vector_norm(decoded(Sign([("w", m.shape)]), x) - x)
        assert left < torch.linalg.vector_norm(x)
    size = torch.outer(cross.sum(1), cross.sum(0)) / cross.sum()
    assert torch.linalg.vector_norm(size - cross) > 2 * torch.linalg.vector_norm(cross)


@given(
    st.integers(1, 3000),
    st.floats(0.0005, 1.0),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["normal", "zeros", "ties", "spikes"]),
)
def test_topk_takes_the_largest_and_exactly_as_many(numel: int, ratio: float, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    x = {
        "normal": lambda: rng.standard_normal(numel),
        "zeros": lambda: rng.standard_normal(numel) * (rng.random(numel) < 0.01),
        "ties": lambda: rng.integers(-2, 3, numel).astype(float),
        "spikes": lambda: np.where(np.arange(numel) == numel // 2, 1e6, 1e-6 * rng.standard_normal(numel)),
    }[kind]().astype(np.float32)
    k = math.ceil(ratio * numel)
    chosen, values = largest(x.copy(), min(k, numel))
    assert np.array_equal(values, x[chosen])
    assert len(chosen) == len(set(chosen.tolist())) == min(k, numel)
    assert bool((np.diff(chosen) > 0).all())
    left = np.delete(np.abs(x), chosen)
    assert len(left) == 0 or np.abs(x[chosen]).min() >= left.max()


def test_topk_of_many_values_is_exact_too() -> None:
    x = given_tensor(2_000_003).numpy()
    k = 20_001
    assert set(largest(x, k)[0].tolist()) == set(np.argsort(-np.abs(x), kind="stable")[:k].tolist())


def test_topk_sends_half_precision_and_the_rounding_stays() -> None:
    x = given_tensor(100_000)
    codec = TopK(0.05)
    feedback = ErrorFeedback(codec, [("x", torch.Size((100_000,)))], x)
    joined = x.clone()
    exchange_all([feedback.exchange(joined, KEYS, 1)])
    sent = joined != 0
    assert int(sent.sum()) <= 5000
    assert torch.equal(joined[sent], x[sent].half().float())
    assert torch.equal(joined + feedback.residual, x)


@pytest.mark.parametrize("size", [1e-28, 1e-6, 1.0, 3e7, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_topk_sends_values_of_any_size(size: float, dtype: torch.dtype) -> None:
    """fp16 alone ends at 65504 and begins at 6e-8. Eight decades below the largest there are still eleven bits."""
    x = torch.logspace(0, -8, 1000, dtype=dtype) * size
    feedback = ErrorFeedback(TopK(1.0), [("x", torch.Size((1000,)))], x)
    joined = x.clone()
    exchange_all([feedback.exchange(joined, KEYS, 1)])
    assert torch.allclose(joined, x, rtol=2.0**-11, atol=0.0)
    assert torch.equal(joined + feedback.residual, x)


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-300, 1e300])
def test_what_no_scale_fits_is_not_lost_in_silence(size: float) -> None:
    x = torch.linspace(-1, 1, 1000, dtype=torch.float64) * size
    feedback = ErrorFeedback(TopK(0.1), [("x", torch.Size((1000,)))], x)
    joined = x.clone()
    exchange_all([feedback.exchange(joined, KEYS, 1)])
    assert torch.equal(joined + feedback.residual, x) or not bool(joined.isfinite().all())
    assert bool(joined.isfinite().all()) == (size < 1)


@pytest.mark.parametrize("strange", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_arrives_so(strange: float) -> None:
    x = given_tensor(10_000)
    x[1234] = strange
    codec, out = TopK(0.001), torch.zeros_like(x)
    codec.decode(codec.encode(x, KEYS), out, KEYS)
    assert not bool(out[1234].isfinite())


def test_what_is_not_a_number_is_sent_first() -> None:
    x = given_tensor(10_000)
    x[1234] = math.nan
    out = torch.zeros_like(x)
    codec = TopK(0.001)
    codec.decode(codec.encode(x, KEYS), out, KEYS)
    assert bool(out[1234].isnan())
    for spec in SPECS:
        if spec not in ("topk:0.01", "randomk:0.1", "blocks:0.2"):
            codec = make(spec, 10_000)
            codec.decode(codec.encode(x, KEYS), out, KEYS)
            assert not bool(out.isfinite().all()), f"{spec} hides a NaN"


@pytest.mark.parametrize("make_codec", [lambda: RandomK(0.01), lambda: RandomBlocks(0.05)])
def test_random_choices_reach_everything_evenly(make_codec: Any) -> None:
    numel, rounds = 20_480, 600
    codec, seen = make_codec(), torch.zeros(20_480)
    for k in range(rounds):
        codec.add_to(seen, codec.encode(torch.ones(numel), Keys(5, k, 0)), Keys(5, k, 0))
    share = codec.nbytes(numel) / 4 / numel
    assert seen.sum() == pytest.approx(rounds * share * numel)
    assert seen.min() > 0 if share > 0.02 else seen.mean() == pytest.approx(rounds * share)
    assert seen.max() <= rounds * share + 6 * math.sqrt(rounds * share)


@pytest.mark.parametrize("payload", [b"", b"\0" * 8, b"\xff" * 40])
def test_topk_does_not_trust_what_it_is_given(payload: bytes) -> None:
    data = torch.frombuffer(bytearray(payload), dtype=torch.uint8) if payload else torch.empty(0, dtype=torch.uint8)
    out = torch.zeros(1000)
    with pytest.raises(ValueError, match="topk"):
        TopK(0.01).add_to(out, data, KEYS)
    good = TopK(0.01).encode(given_tensor(1000), KEYS).clone()
    for mutated in (good.clone(), good.clone()):
        mutated[20] += 1  # a count
        with pytest.raises(ValueError, match="topk"):
            TopK(0.01).add_to(out, mutated, KEYS)
        mutated[20] -= 1
        mutated[-2:] = 255  # an offset beyond the end
        with pytest.raises(ValueError, match="topk: an entry at"):
            TopK(0.01).add_to(out, mutated, KEYS)


# -- laws


@pytest.mark.parametrize("spec", ["topk:1", "randomk:1", "blocks:1"])
@pytest.mark.parametrize("numel", SIZES)
def test_sparsifiers_at_full_rate_are_the_identity(spec: str, numel: int) -> None:
    x = given_tensor(numel, dtype=torch.float64)
    codec = TopK(1.0, full=True) if spec == "topk:1" else make(spec, numel)
    assert torch.equal(decoded(codec, x), x)


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("spec", [s for s in SPECS if make(s, 4).linear and not s.startswith("powersgd")])
def test_linear_codecs_commute_with_the_sum(spec: str, numel: int) -> None:
    codec = make(spec, numel)
    xs = [given_tensor(numel, seed) for seed in range(3)]
    summed = sum(codec.encode(x, KEYS).clone().double() for x in xs)
    of_sum = codec.encode(sum(xs), KEYS).double()
    rounding = {"bf16": 2.0**-7, "fp16": 2.0**-10}.get(spec, 2.0**-22)
    size = codec.encode(sum(x.abs() for x in xs), KEYS).double()
    assert bool(((summed - of_sum).abs() <= rounding * size + 1e-7).all())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("numel", [1, 1025, 70_001])
@pytest.mark.parametrize("spec", [s for s in SPECS if make(s, 4).biased])
def test_what_is_sent_and_what_is_left_is_what_was_given(spec: str, numel: int, world: int) -> None:
    """Over 20 exchanges: sum of all that came + sum of what still waits = sum of all that was given, to rounding."""
    segments = segments_of(numel)
    ranks = [ErrorFeedback(make(spec, numel), segments, torch.zeros(numel, dtype=torch.float64)) for _ in range(world)]
    given_in_all, came = torch.zeros(numel, dtype=torch.float64), torch.zeros(numel, dtype=torch.float64)
    for k in range(20):
        xs = [given_tensor(numel, 100 * k + r, torch.float64) for r in range(world)]
        given_in_all += sum(xs)
        exchange_all([f.exchange(x, Keys(5, k, r), world) for r, (f, x) in enumerate(zip(ranks, xs, strict=True))])
        assert all(torch.equal(x, xs[0]) for x in xs), "the same bits on every rank"
        came += xs[0]
    waits = sum(f.residual for f in ranks)
    scale = float(given_in_all.abs().max())
    assert torch.allclose(came + waits, given_in_all, rtol=0, atol=1e-11 * scale)
    if make(spec, numel).nbytes(numel, 8) < 4 * numel:
        assert float(torch.linalg.vector_norm(came - given_in_all)) > 1e-9, "it left nothing out: no test"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("spec", ["int8", "sign", "qsgd", "qsgd:3", "topk:0.01", "topk:0.3", "bf16"])
def test_what_is_done_in_pieces_is_what_the_plain_way_does(spec: str, numel: int, dtype: torch.dtype) -> None:
    codec = make(spec, numel)
    x, waits = given_tensor(numel, 1, dtype), given_tensor(numel, 2, dtype)
    plain, before = waits.clone(), x.clone()
    want = Codec.encode_with_feedback(codec, x, plain, KEYS).clone()
    got = codec.encode_with_feedback(x, waits, KEYS).clone()
    assert torch.equal(got, want)
    assert torch.equal(waits, plain)
    assert torch.equal(x, before)
    payloads = [got, codec.encode(x, KEYS).clone(), got]
    joined, wanted = torch.full_like(x, 7.0), torch.full_like(x, 7.0)
    Codec.decode_sum(codec, payloads, wanted, KEYS)
    codec.decode_sum(payloads, joined, KEYS)
    assert torch.equal(joined, wanted)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.0115, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("numel", [0, 1, 8, 64, 1000, 4099, 131_072])
def test_where_a_mask_is_true(numel: int, share: float) -> None:
    mask = np.random.default_rng(numel).random(numel) < share
    assert np.array_equal(where_true(mask), np.flatnonzero(mask))


@pytest.mark.parametrize("spec", [s for s in SPECS if make(s, 4).biased])
@pytest.mark.parametrize("momentum", [None, Momentum(0.9), Momentum(0.8, is_mean=True)])
def test_a_state_that_is_saved_and_loaded_goes_on_bit_for_bit(spec: str, momentum: Momentum | None) -> None:
    numel, segments = 3000, segments_of(3000)

    def fresh() -> ErrorFeedback | MomentumCorrection:
        return build(parse(spec), segments, torch.zeros(numel), seed=3, momentum=momentum, warmup=7)  # type: ignore[return-value]

    def step(feedbacks: list[Any], k: int) -> Tensor:
        xs = [given_tensor(numel, 10 * k + r) for r in range(2)]
        exchange_all([f.exchange(x, Keys(5, k, r), 2) for r, (f, x) in enumerate(zip(feedbacks, xs, strict=True))])
        return xs[0]

    ranks = [fresh(), fresh()]
    for k in range(5):
        step(ranks, k)
    shared = {name: _cloned(v) for name, v in ranks[0].state_dict().items()}
    owns = [{name: _cloned(v) for name, v in f.own_state_dict().items()} for f in ranks]
    loaded = [fresh(), fresh()]
    for f, own in zip(loaded, owns, strict=True):
        f.load_state_dict(shared, own)
    for k in range(5, 10):
        assert torch.equal(step(ranks, k), step(loaded, k))
    forgot = [fresh(), fresh()]
    for f in forgot:
        f.load_state_dict(shared, {})
    assert any(not torch.equal(step(ranks, k), step(forgot, k)) for k in range(10, 15)), "the state matters"
    with pytest.raises(ValueError, match="checkpoint holds"):
        fresh().load_state_dict({"codec": {"w2": torch.zeros(2, 40)}}, {"residual": {"x": 1}, "velocity": {"x": 1}})


def _cloned(value: Any) -> Any:
    return (
        {n: _cloned(v) for n, v in value.items()}
        if isinstance(value, dict)
        else value.clone()
        if isinstance(value, Tensor)
        else value
    )


# -- PowerSGD


def test_powersgd_is_the_papers_algorithm() -> None:
    """Algorithm 1 with QR in place of Gram-Schmidt, on the mean of the ranks' matrices, warm-started."""
    n, m, r, world = 30, 50, 3, 3
    segments = [("w", torch.Size((n, m))), ("b", torch.Size((7,)))]
    codecs = [PowerSgd(r, segments, seed=1) for _ in range(world)]
    ranks = [ErrorFeedback(c, segments, torch.zeros(n * m + 7, dtype=torch.float64)) for c in codecs]
    q: Tensor | None = None
    errors = [torch.zeros(n, m, dtype=torch.float64) for _ in range(world)]
    for k in range(6):
        xs = [given_tensor(n * m + 7, 7 * k + rank, torch.float64) for rank in range(world)]
        matrices = [x[: n * m].view(n, m) + e for x, e in zip(xs, errors, strict=True)]
        vectors = sum(x[n * m :] for x in xs)
        mean = sum(matrices) / world
        exchange_all([f.exchange(x, Keys(5, k, 0), world) for f, x in zip(ranks, xs, strict=True)])
        if q is None:  # drawn inside: read from the result's row space is not possible, so take it from a fresh codec
            q = PowerSgd(r, segments, seed=1)._first_q(xs[0]).view(r, m).T
        p, _ = torch.linalg.qr(mean @ q)
        q = mean.T @ p
        approximation = p @ q.T
        for x in xs:
            assert torch.allclose(x[: n * m].view(n, m), world * approximation, rtol=1e-9, atol=1e-9)
            assert torch.allclose(x[n * m :], vectors)
        errors = [matrix - approximation for matrix in matrices]
        q = world * q  # the sum over ranks; its scale does not matter


def test_powersgd_is_exact_on_matrices_of_its_rank() -> None:
    n, m, r = 40, 60, 4
    generator = torch.Generator().manual_seed(0)
    low = torch.randn(n, r, generator=generator, dtype=torch.float64) @ torch.randn(
        r, m, generator=generator, dtype=torch.float64
    )
    for matrix in (low, torch.zeros(n, m, dtype=torch.float64), low[:, :1] @ low[:1, :]):
        x = matrix.reshape(-1).clone()
        exchange_all([PowerSgd(r, [("w", torch.Size((n, m)))]).exchange(x, KEYS, 1)])
        assert torch.allclose(x.view(n, m), matrix, atol=1e-9)


@pytest.mark.parametrize("dependence", [0.0, 1e-7, 1e-4])
def test_orthonormal_rows(dependence: float) -> None:
    """Also where they nearly or fully depend on each other, as those of a gradient of low rank do."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(32, 5, generator=generator) @ torch.randn(5, 256, generator=generator)
    rows += dependence * torch.randn(32, 256, generator=generator)
    rows[7] = 0.0
    orthonormalise_(rows)
    assert torch.allclose(rows @ rows.T, torch.eye(32), atol=1e-5)


def test_a_rank_that_was_not_needed_for_a_while_comes_back() -> None:
    n, m, r = 40, 60, 4
    codec = PowerSgd(r, [("w", torch.Size((n, m)))])
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(n, r, generator=generator) @ torch.randn(r, m, generator=generator)
    for matrix in [torch.zeros(n, m), full[:, :1] @ full[:1], torch.zeros(n, m), full, full]:
        x = matrix.reshape(-1).clone()
        exchange_all([codec.exchange(x, KEYS, 1)])
    assert torch.allclose(x.view(n, m), full, atol=1e-4)


# -- momentum before the codec

SGD, ADAM = Momentum(0.9), Momentum(0.9, is_mean=True)


def test_adams_first_moment_is_its_own() -> None:
    p = torch.zeros(50, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([p], lr=0.1, betas=(0.9, 0.99))
    moment = RunningMomentum(ADAM, p.detach())
    for k in range(1, 6):
        x = given_tensor(50, k, torch.float64)
        p.grad = x.clone()
        optimizer.step()
        moment(x)
        assert torch.allclose(x, optimizer.state[p]["exp_avg"] / (1 - 0.9**k))


@pytest.mark.parametrize("make_codec", [lambda: TopK(1.0, full=True), lambda: RandomK(1.0), lambda: RandomBlocks(1.0)])
def test_at_full_rate_it_is_the_optimizers_own_momentum(make_codec: Any) -> None:
    """SGD without momentum after it does what torch's does with momentum after the plain sum."""
    numel, world = 500, 3
    segments = [("x", torch.Size((numel,)))]
    mine, torchs = (torch.zeros(numel, dtype=torch.float64, requires_grad=True) for _ in range(2))
    optimizers = [torch.optim.SGD([p], lr=0.1, momentum=m) for p, m in ((mine, 0.0), (torchs, 0.9))]
    ranks = [MomentumCorrection(make_codec(), SGD, 0, segments, mine.detach()) for _ in range(world)]
    for k in range(10):
        xs = [given_tensor(numel, 10 * k + r, torch.float64) for r in range(world)]
        torchs.grad = sum(xs)
        exchange_all([f.exchange(x, Keys(5, k, r), world) for r, (f, x) in enumerate(zip(ranks, xs, strict=True))])
        mine.grad = xs[0]
        for optimizer in optimizers:
            optimizer.step()
        assert torch.allclose(mine, torchs, rtol=1e-12, atol=1e-12)


def test_deep_gradient_compression_is_its_equations() -> None:
    """Lin et al., eq. 4 and 5 with factor masking, but that what was sent without having waited keeps its momentum."""
    numel, k, m = 400, 20, 0.9
    dgc = MomentumCorrection(
        TopK(k / numel, full=True), Momentum(m), 0, [("x", torch.Size((numel,)))], torch.zeros(numel)
    )
    u, v = torch.zeros(numel), torch.zeros(numel)
    kept = 0
    for step in range(30):
        x = given_tensor(numel, step)
        u = m * u + x
        waited = v != 0
        v = v + u
        mask = torch.zeros(numel, dtype=torch.bool)
        mask[v.abs().topk(k).indices] = True
        kept += int((mask & ~waited).sum())
        want = torch.where(mask, v, 0.0)
        u, v = torch.where(mask & waited, 0.0, u), torch.where(mask, 0.0, v)
        got = x.clone()
        exchange_all([dgc.exchange(got, Keys(5, step, 0), 1)])
        assert torch.allclose(got, want, atol=1e-6)
    assert kept > k, "else masking all would have passed, too"


def test_the_ratio_falls_over_the_warm_up() -> None:
    dgc = MomentumCorrection(TopK(0.01), SGD, 10, [("x", torch.Size((1000,)))], torch.zeros(1000))
    sizes = [exchange_all([dgc.exchange(given_tensor(1000, k), Keys(5, k, 0), 1)]) for k in range(12)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[:3] == [4 * kept + 4 + 4 for kept in (1000, 100, 50)], "values with offsets, a count, a scale"
    assert sizes[10] == sizes[11] == 4 * 10 + 4 + 4


def test_the_rank_falls_over_the_warm_up_and_nothing_is_lost() -> None:
    """From all; a matrix is compressed when that becomes less."""
    segments = [("w", torch.Size((60, 40))), ("narrow", torch.Size((40, 3))), ("b", torch.Size((7,)))]
    numel = 60 * 40 + 40 * 3 + 7
    feedback = build(parse("powersgd:2"), segments, torch.zeros(numel, dtype=torch.float64), warmup=10)
    assert isinstance(feedback, ErrorFeedback)
    sizes, waits = [], []
    for k in range(12):
        given = given_tensor(numel, k, torch.float64)
        before, joined = feedback.residual + given, given.clone()
        sizes.append(exchange_all([feedback.exchange(joined, Keys(5, k, 0), 1)]) // 8)
        assert sizes[-1] == feedback.codec.nbytes(numel) // 4
        assert torch.allclose(joined + feedback.residual, before, rtol=0, atol=1e-12 * float(before.abs().max()))
        left = torch.linalg.matrix_norm((before - joined)[:2400].view(60, 40))
        waits.append(float(left / torch.linalg.matrix_norm(before[:2400].view(60, 40))))
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[:2] == [60 * 40 + 40 * 3 + 7, 20 * (60 + 40) + 40 * 3 + 7]
    assert sizes[10] == sizes[11] == 2 * (60 + 40) + 2 * (40 + 3) + 7
    assert waits[0] < waits[-1]


# -- what users write


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_told_without_torch_is_so(spec: str) -> None:
    assert CODECS[parse(spec).name].biased == make(spec, 4).biased


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("topk", "needs its ratio: write topk:RATIO"),
        ("topk:2", "ratio '2' is not possible, give more than 0 and at most 1"),
        ("topk:x", "ratio 'x' is not possible"),
        ("topk:0.1:3", "values '3' is not possible, give fp16 or full"),
        ("topk:0.1:full:3", "too many arguments"),
        ("powersgd:0", "rank '0' is not possible"),
        ("powersgd:1.5", "rank '1.5' is not possible"),
        ("powersgd:4:2", "warmup '2' is not possible, give 0 to 1"),
        ("powersgd:1e9", "rank '1e9' is not possible, give a whole number of 1 or more."),
        ("qsgd:200", "levels '200' is not possible, give a whole number from 1 to 127."),
        ("qsgd:7.0", "levels '7.0' is not possible"),
        ("qsgd:1_0", "levels '1_0' is not possible"),
        ("qsgd:\u0667", "levels '\u0667' is not possible"),
        ("topk: 0.01", "ratio ' 0.01' is not possible"),
        ("topk:0.01 ", "ratio '0.01 ' is not possible"),
        ("topk:0.01\n", "is not possible"),
        ("topk:0.0_1", "ratio '0.0_1' is not possible"),
        (" topk:0.01", "unknown codec ' topk'"),
        ("TOPK:0.01", "unknown codec 'TOPK'. Did you mean 'topk'?"),
        ("none:1", "compress='none:1' has too many arguments: write none."),
        ("auto:1", "compress='auto:1' has too many arguments: write auto."),
        ("NONE", "unknown codec 'NONE'. Did you mean 'none'? Possible: none, auto, bf16"),
        ("", "topk:RATIO[:VALUES]"),
        ("int8:5", "too many arguments: write int8."),
        ("topk:nan", "ratio 'nan' is not possible"),
    ],
)
def test_wrong_arguments_are_refused(text: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    assert says in str(caught.value)


def test_an_unknown_codec_names_the_nearest() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'topk'"):
        parse("topkk:0.1")


def test_the_warm_up_can_be_set() -> None:
    assert [parse(text).warmup(300) for text in ("powersgd:4", "powersgd:4:0", "powersgd:4:0.1")] == [240, 0, 30]


def test_all_are_written_as_they_are_read() -> None:
    assert parse("topk:1e-2") == parse("topk:.01") == parse("topk:0.01")
    for text in (*SPECS, "dgc:0.01"):
        assert str(parse(text)) in (text, f"{text}:127", f"{text}:fp16", f"{text}:0.8")
    assert set(CODECS) == {parse(t).name for t in (*SPECS, "dgc:0.01")}
