from __future__ import annotations

import math
import sysconfig
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from weft.errors import ConfigError, TaskError, UnknownName
from weft.tasks import codelm
from weft.tasks.codelm import SHAPES, ByteTransformer, CodeLM, is_held_out, read_corpus, read_packages

STDLIB = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(autouse=True)
def forget_the_corpus() -> Iterator[None]:
    yield
    read_corpus.cache_clear()


def write(root: Path, **texts: str) -> Path:
    """A library in which `package__module="text"` is package/module.py."""
    for name, text in texts.items():
        path = root.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


# -- data


def test_a_package_is_its_files_in_order_of_path(tmp_path: Path) -> None:
    write(tmp_path, json__init="1", json__a__b="2", json__c="3", ast="4", Zoo="5", json__a__a="6")
    (tmp_path / "json" / "notes.txt").write_text("no")
    assert read_packages(tmp_path) == {"Zoo": b"5", "ast": b"4", "json": b"6231"}


def test_leaves_out_tests_tables_the_builds_settings_and_what_is_no_package(tmp_path: Path) -> None:
    write(tmp_path, ast="4", json__tool="5", json__tests__a="no", idlelib__idle_test__a="no", encodings__cp1="no")
    write(tmp_path, pydoc_data__topics="no", test__support="no", _sysconfigdata_x="no")
    for folder in ("site-packages", "lib-dynload", "config-3.11-x86_64-linux-gnu", "__pycache__"):
        write(tmp_path / folder / "inner", a="no")
    assert read_packages(tmp_path) == {"ast": b"4", "json": b"5"}


def test_windows_share_one_byte_and_never_cross_packages(tmp_path: Path) -> None:
    root = write(tmp_path, ast="abcdefghij", json__a="klmnop", os="123", email="ABCDEFGHI", re="VWXYZ")
    train, test = read_corpus(root, 4)
    assert [bytes(w.tolist()) for w in train.windows] == [b"abcde", b"efghi", b"klmno"]
    assert train.owners == ["ast", "ast", "json"]  # `os` is shorter than a window
    assert [bytes(w.tolist()) for w in test.windows] == [b"ABCDE", b"EFGHI", b"VWXYZ"]
    assert test.owners == ["email", "email", "re"]
    assert test.counts.tolist() == [Counter(b"ABCDEFGHIVWXYZ")[byte] for byte in range(256)]


def test_the_split_goes_by_name_alone() -> None:
    """Pinned: another split makes all earlier results incomparable."""
    assert all(is_held_out(name) for name in ("email", "urllib", "re", "dataclasses", "socket", "pdb"))
    assert not any(is_held_out(name) for name in ("os", "ast", "json", "typing", "asyncio", "tkinter", "idlelib"))


def test_no_held_out_package_is_trained_on() -> None:
    train, test = read_corpus(STDLIB, 128)
    assert set(train.owners).isdisjoint(test.owners)
    assert len(set(train.owners)) > 100
    assert len(set(test.owners)) > 10
    assert 0.05 < test.counts.sum() / (train.counts.sum() + test.counts.sum()) < 0.2


def test_client_of_is_the_package_that_holds_the_bytes() -> None:
    task = CodeLM()
    windows = task.data()[0].tensors[0]
    texts = read_packages(STDLIB)
    for index in range(0, len(windows), len(windows) // 50):
        assert windows[index].numpy().tobytes() in texts[task.client_of(index)]


def test_the_held_out_windows_are_bounded_and_spread_over_the_text() -> None:
    everything = read_corpus(STDLIB, 128)[1]
    chosen = CodeLM(test_windows=100).data()[1].tensors[0]
    step = len(everything.windows) / 100
    assert torch.equal(chosen, everything.windows[[int(k * step) for k in range(100)]])
    assert len(CodeLM(test_windows=10**6).data()[1]) == len(everything.windows)


def test_the_note_is_the_entropy_of_the_held_out_text() -> None:
    count = Counter(b"".join(text for name, text in read_packages(STDLIB).items() if is_held_out(name)))
    entropy = -sum(n / count.total() * math.log(n / count.total()) for n in count.values())
    assert CodeLM().notes() == {"unigram entropy of the held-out text (nats/byte)": pytest.approx(entropy, rel=1e-12)}


# -- model


@pytest.mark.parametrize(
    ("size", "num_parameters"),
    [("tiny", 260_736), ("small", 3_257_856), ("medium", 25_416_704), ("large", 116_091_136), ("wire", 6_247_584)],
)
def test_number_of_parameters(size: str, num_parameters: int) -> None:
    with torch.device("meta"):
        model = ByteTransformer(*SHAPES[size])
    assert sum(p.numel() for p in model.parameters()) == num_parameters


def test_layers_and_positions_can_be_chosen() -> None:
    with torch.device("meta"):
        plain, deep, rotary = (
            CodeLM(size="tiny", **options).model() for options in ({}, {"layers": 5}, {"positions": "rotary"})
        )
    names = {n for n, _ in plain.named_parameters()}
    assert len(plain.blocks) == 2
    assert len(deep.blocks) == 5
    assert {n for n, _ in rotary.named_parameters()} == names - {"position.weight"}


def test_the_head_is_the_embedding_also_in_another_dtype() -> None:
    model = CodeLM(size="tiny").model().double()
    assert model.head.weight is model.embed.weight
    assert "head.weight" not in dict(model.named_parameters())


def tiny(seed: int = 0) -> tuple[CodeLM, nn.Module]:
    torch.manual_seed(seed)
    task = CodeLM(size="tiny", seq_len=16, test_windows=40)
    return task, task.model().double()


def test_a_byte_changes_no_earlier_logits() -> None:
    _, model = tiny()
    tokens = torch.randint(256, (2, 16))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :9], after[:, :9])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(2).gt(0).all()


def test_equals_torch_s_own_transformer() -> None:
    _, model = tiny()
    for p in model.parameters():  # biases and norms too, so that each place they are used is seen
        nn.init.normal_(p, std=0.2)
    width, _, heads, _ = SHAPES["tiny"]
    x = model.embed.weight[tokens := torch.randint(256, (3, 16))] + model.position.weight
    for block in model.blocks:
        layer = nn.TransformerEncoderLayer(
            width,
            heads,
            4 * width,
            dropout=0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
            dtype=torch.float64,
        )
        pairs = {
            layer.norm1: block.norm1,
            layer.norm2: block.norm2,
            layer.linear1: block.up,
            layer.linear2: block.down,
            layer.self_attn.out_proj: block.out,
        }
        for theirs, ours in pairs.items():
            theirs.load_state_dict(ours.state_dict())
        for kind in (
            "weight",
            "bias",
        ):  # torch has all queries, all keys, all values; we have a head's query, key and value together
            ours = getattr(block.qkv, kind).unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
            setattr(layer.self_attn, f"in_proj_{kind}", nn.Parameter(ours))
        x = layer(x, src_mask=nn.Transformer.generate_square_subsequent_mask(16, dtype=torch.float64), is_causal=True)
    truth = F.layer_norm(x, (width,), model.norm.weight, model.norm.bias) @ model.embed.weight.T
    torch.testing.assert_close(model(tokens), truth, rtol=1e-10, atol=1e-10)


def test_rotary_is_a_turn_in_the_complex_plane_by_position() -> None:
    """And so what a query and a key have in common depends on how far apart they stand alone."""
    x = torch.randn(2, 3, 10, 8, dtype=torch.float64)
    rates = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    turn = torch.polar(torch.ones(10, 4, dtype=torch.float64), torch.arange(10, dtype=torch.float64)[:, None] * rates)
    turned = torch.complex(x[..., :4], x[..., 4:]) * turn
    torch.testing.assert_close(codelm.rotated(x), torch.cat((turned.real, turned.imag), -1), rtol=0, atol=1e-14)
    same = codelm.rotated(x[:, :, :1].expand(-1, -1, 10, -1))
    scores = same @ same.mT
    for distance in range(10):
        diagonal = scores.diagonal(distance, dim1=-2, dim2=-1)
        torch.testing.assert_close(diagonal, diagonal[..., :1].expand_as(diagonal), rtol=0, atol=1e-12)
    assert (scores[..., 0, :] - scores[..., :1, 0]).abs().amax() > 0.1


def test_with_rotary_positions_order_matters_and_no_byte_sees_later_ones() -> None:
    torch.manual_seed(0)
    model = CodeLM(size="tiny", positions="rotary").model().double()
    tokens = torch.randint(256, (2, 200))  # longer than any window that it was made for
    swapped = tokens.clone()
    swapped[:, [3, 4]] = tokens[:, [4, 3]]
    before, after = model(tokens), model(swapped)
    assert torch.equal(before[:, :3], after[:, :3])
    assert (before[:, 9:] - after[:, 9:]).abs().amax(2).gt(0).all()


def test_initial_weights_are_those_of_gpt2() -> None:
    torch.manual_seed(0)
    model = ByteTransformer(128, 8, 4, 64)
    for name, p in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            assert torch.equal(p, torch.full_like(p, float("norm" in name and name.endswith("weight")))), name
        else:
            into_stream = ".out." in name or ".down." in name
            assert float(p.detach().std()) == pytest.approx(0.02 / math.sqrt(16) if into_stream else 0.02, rel=0.05), (
                name
            )


# -- training


def test_shards_weighted_by_their_examples_give_the_joined_gradient() -> None:
    task, model = tiny()
    windows = task.data()[0].tensors[0][:7]

    def gradient(part: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(task.loss(model, [part]), list(model.parameters()))])

    joined = sum(gradient(part) * len(part) / 7 for part in windows.split([1, 2, 4]))
    truth = gradient(windows)
    assert torch.linalg.vector_norm(joined - truth) <= 1e-12 * torch.linalg.vector_norm(truth)


def test_evaluation_is_per_byte_and_adds_up_over_shards() -> None:
    task, model = tiny()
    windows = task.data()[1].tensors[0]
    with torch.no_grad():
        parts = [task.evaluate(model, [part]) for part in windows.split([1, 7, 32])]
        log_p = model(windows[:, :-1].long()).log_softmax(-1)
    nats, right = 0.0, 0
    for n, window in enumerate(windows.tolist()):
        for t in range(16):
            nats -= float(log_p[n, t, window[t + 1]])
            right += int(log_p[n, t].argmax()) == window[t + 1]
    for name, truth in {"loss": nats, "accuracy": right}.items():
        total, count = (sum(float(part[name][k]) for part in parts) for k in (0, 1))
        assert (total, count) == (pytest.approx(truth, rel=1e-9), 40 * 16)


def test_the_rate_rises_for_a_twentieth_and_falls_on_a_cosine_to_zero() -> None:
    task, model = tiny()
    optimizer = task.optimizer(model.parameters())
    schedule = task.schedule(optimizer, 100)
    rates = []
    for _ in range(101):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2e-3, 0.4e-3, 0.6e-3, 0.8e-3, 1e-3])
    assert rates[5:] == pytest.approx([0.5e-3 * (1 + math.cos(math.pi * k / 95)) for k in range(96)])


@pytest.mark.parametrize("total_steps", [1, 2, 5])
def test_the_rate_of_a_very_short_run_is_never_zero_before_its_end(total_steps: int) -> None:
    task, model = tiny()
    optimizer = task.optimizer(model.parameters())
    schedule = task.schedule(optimizer, total_steps)
    for _ in range(total_steps):
        assert 0 < optimizer.param_groups[0]["lr"] <= task.lr
        optimizer.step()
        schedule.step()


@pytest.mark.usefixtures("one_thread")
def test_learns_more_than_how_often_each_byte_occurs() -> None:
    """From ln 256 = 5.5 nats to below the unigram entropy of 3.1, on packages it has not seen, in a few seconds."""
    torch.manual_seed(0)
    task = CodeLM(size="tiny", seq_len=64, lr=5e-3, test_windows=64)
    train, test = task.data()
    model = task.model()
    optimizer = task.optimizer(model.parameters())
    schedule = task.schedule(optimizer, 80)
    with torch.no_grad():
        assert float(task.loss(model, test.tensors)) == pytest.approx(math.log(256), rel=0.05)
    for index in torch.randperm(len(train))[: 80 * 8].split(8):
        optimizer.zero_grad()
        task.loss(model, [train.tensors[0][index]]).backward()
        optimizer.step()
        schedule.step()
    (entropy,) = task.notes().values()
    with torch.no_grad():
        assert float(task.loss(model, test.tensors)) < entropy - 0.1


# -- what is refused


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UnknownName, match=r"'smal'.*Did you mean 'small'"):
        CodeLM(size="smal")  # type: ignore[arg-type]
    with pytest.raises(UnknownName, match=r"'rotory'.*Did you mean 'rotary'"):
        CodeLM(positions="rotory")  # type: ignore[arg-type]
    for options in ({"seq_len": -1}, {"layers": -1}, {"lr": 0}, {"test_windows": 0}):
        with pytest.raises(ConfigError, match="give a positive number"):
            CodeLM(**options)


def test_a_window_longer_than_every_package_is_refused() -> None:
    with pytest.raises(TaskError, match=r"seq_len=100000000.*smaller seq_len"):
        CodeLM(size="tiny", seq_len=10**8).data()


def test_a_python_without_its_source_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codelm.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(TaskError, match=r"standard library is there as \.py files"):
        CodeLM().data()
