"""Nested states come back the same: by property, through the files, and as real optimizers and schedules have them."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.resilience.checkpoint.same import assert_same
from torch import nn
from torch.optim import lr_scheduler as lrs

from weft.errors import CheckpointError
from weft.resilience.checkpoint import load, save
from weft.resilience.checkpoint.state import NAME_OF, decode, encode


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """These nets are too small for two, and waiting for the second takes the longer the busier the machine is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- by property

shapes = st.lists(st.integers(0, 4), max_size=3)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(list(NAME_OF)))
    shape = draw(shapes)
    seed = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    nbytes = math.prod(shape) * dtype.itemsize
    high = 2 if dtype is torch.bool else 256  # any bits at all: NaN payloads, subnormals
    tensor = torch.randint(high, (nbytes,), dtype=torch.uint8, generator=seed).view(dtype).reshape(shape)
    match draw(st.sampled_from(["plain", "transposed", "strided", "expanded", "conjugate", "parameter"])):
        case "transposed" if tensor.dim() > 1:
            return tensor.transpose(0, -1)
        case "strided" if tensor.dim():
            return tensor[::2]
        case "expanded":
            return tensor.expand(3, *shape)
        case "conjugate" if dtype.is_complex:
            return tensor.conj()
        case "parameter" if dtype.is_floating_point and dtype.itemsize > 1:
            return nn.Parameter(tensor)
    return tensor


text = st.text(max_size=5) | st.sampled_from(["$tensor", "$tuple", "__metadata__", "a.b", "a", "b", "0"])
scalars = st.none() | st.booleans() | st.integers() | st.integers(-(2**70), 2**70) | st.floats() | text
keys = text | st.integers()
states = st.recursive(
    scalars | tensors(),
    lambda children: (
        st.lists(children, max_size=4)
        | st.lists(children, max_size=4).map(tuple)
        | st.dictionaries(keys, children, max_size=4)
        | st.dictionaries(keys, children, max_size=4).map(OrderedDict)
        | st.dictionaries(keys, st.integers(), max_size=4).map(Counter)
    ),
    max_leaves=12,
)


@given(states)
def test_any_state_comes_back_from_tree_and_tensors(state: Any) -> None:
    tree, tensors = encode("worker-0", state)
    assert_same(state, decode(msgspec.json.decode(msgspec.json.encode(tree)), tensors))


@settings(max_examples=40)
@given(st.dictionaries(st.sampled_from(["worker-0", "worker-1", "server.0"]), states), st.integers(0, 10**10))
def test_any_state_comes_back_from_disk(tmp_path_factory: pytest.TempPathFactory, parts: Any, step: int) -> None:
    root = tmp_path_factory.mktemp("root")
    meta = {"cursor": (step, 2), "seen": {3: "c"}, "best": math.inf}
    saved = save(root, parts, step=step, world=2, meta=meta)
    checkpoint = load(saved.path)
    assert (checkpoint.step, checkpoint.world) == (step, 2)
    assert_same(meta, checkpoint.meta)
    assert_same(parts, checkpoint.parts)
    assert saved.bytes == sum(file.stat().st_size for file in saved.path.iterdir())


@settings(max_examples=40)
@given(st.dictionaries(text, tensors(), min_size=1))
def test_the_safetensors_package_reads_the_same(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    saved = save(tmp_path_factory.mktemp("root"), {"worker-0": state}, step=1, world=1, meta={})
    theirs = safetensors.torch.load_file(saved.path / "worker-0.safetensors")
    ours = encode("worker-0", state)[1]
    assert theirs.keys() == ours.keys()
    for name in ours:
        assert_same(ours[name].detach(), theirs[name], name)


def roundtrip(root: Path, state: Any) -> Any:
    return load(save(root, {"worker-0": state}, step=1, world=1, meta={}).path).parts["worker-0"]


def test_tied_tensors_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    weight = torch.randn(100, 100)
    state = {"embed": weight, "head": weight.view(100, 100), "half": weight[:50], "t": weight.T, "t2": weight.T}
    tied = roundtrip(tmp_path, state)
    assert_same(state, tied)
    assert tied["embed"] is tied["head"]
    assert tied["t"] is tied["t2"]
    assert tied["half"].data_ptr() != tied["embed"].data_ptr()
    (part,) = tmp_path.glob("*/worker-0.safetensors")
    assert part.stat().st_size < 40_000 + 40_000 + 20_000 + 1_000


def test_the_same_memory_read_differently_is_not_the_same_tensor(tmp_path: Path) -> None:
    z = torch.tensor([1 + 2j])
    state = {"z": z, "conj": z.conj(), "neg": z.conj().imag, "imag": z.imag, "bits": z.view(torch.int64)}
    assert_same(state, roundtrip(tmp_path, state))


def test_names_that_collide(tmp_path: Path) -> None:
    state = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "__metadata__": torch.ones(2), 1: torch.zeros(2)}
    state["1"] = torch.ones(3)
    assert_same(state, roundtrip(tmp_path, state))


def test_loaded_tensors_do_not_share_memory_with_the_saved_or_each_other(tmp_path: Path) -> None:
    state = {"a": torch.zeros(4), "b": torch.zeros(4), "c": torch.empty(0), "d": torch.empty(0)}
    back = roundtrip(tmp_path, state)
    back["a"].fill_(1)
    back["c"].resize_(3)
    assert state["a"].sum() == back["b"].sum() == 0
    assert back["d"].numel() == 0


def test_saving_leaves_the_tensors_resizable(tmp_path: Path) -> None:
    """Tensor.numpy() does not, and whoever frees a parameter's storage (as FSDP does) fails long after."""
    weight = nn.Parameter(torch.randn(4))
    back = roundtrip(tmp_path, {"weight": weight})
    for tensor in (weight, back["weight"]):
        tensor.untyped_storage().resize_(0)


def test_a_lone_element_of_a_strided_tensor(tmp_path: Path) -> None:
    lone = torch.arange(2.0)[::2]
    assert lone.stride() == (2,)
    assert_same(lone, roundtrip(tmp_path, lone))


def test_dense_strides_are_kept(tmp_path: Path) -> None:
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    state = {"images": images, "transposed": torch.randn(3, 4).T, "row": torch.zeros(1, 3).expand(4, 3)}
    back = roundtrip(tmp_path, state)
    assert back["images"].stride() == images.stride()
    assert back["transposed"].stride() == (1, 4)
    assert back["row"].stride() == (3, 1), "a row seen four times becomes four rows"
    assert_same(state, back)


@pytest.mark.parametrize("coalesced", [True, False])
def test_sparse_tensors(tmp_path: Path, coalesced: bool) -> None:
    rows = torch.sparse_coo_tensor([[3, 1, 3]], torch.randn(3, 2), (5, 2), check_invariants=True)
    rows = rows.coalesce() if coalesced else rows
    assert_same(rows, roundtrip(tmp_path, rows))


# ---- what is refused


class Hook:
    pass


def test_a_value_that_cannot_be_saved_is_named_with_its_path_and_nothing_is_written(tmp_path: Path) -> None:
    state = {"optimizer": {"state": {3: {"hook": Hook()}}}}
    with pytest.raises(CheckpointError, match=r"cannot save worker-1: optimizer\.state\.3\.hook is a Hook"):
        save(tmp_path / "root", {"worker-0": {}, "worker-1": state}, step=1, world=2, meta={})
    assert not (tmp_path / "root").exists()


itself: list[Any] = []
itself.append(itself)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (print, "a builtin_function_or_method"),
        (lambda: 0, "a function"),
        ({1, 2}, "a set"),
        (np.zeros(3), "a ndarray"),
        (np.float32(1), "a float32"),
        (torch.Size([1]), "a Size"),
        (torch.float32, "a dtype"),
        ({(1, 2): 3}, "a key of type tuple"),
        ({True: 3}, "a key of type bool"),
        ({None: 3}, "a key of type NoneType"),
        (torch.zeros(2, dtype=torch.complex128), "torch.complex128"),
        (torch.zeros(2, device="meta"), "meta"),
        (nn.parameter.UninitializedParameter(), "UninitializedParameter"),
        ("\ud800", "not Unicode"),
        ({"\ud800": 1}, "not Unicode"),
        (itself, "contains itself"),
    ],
)
def test_other_kinds_are_refused(value: Any, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        encode("worker-0", {"x": [value]})


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_compressed_sparse_tensors_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"x is a torch\.float32 tensor \(torch\.sparse_csr, device cpu\)"):
        encode("worker-0", {"x": torch.eye(2).to_sparse_csr()})


def test_numpy_float64_is_a_float() -> None:
    """A schedule written with np.cos leaves them in the state."""
    assert type(decode(encode("worker-0", np.float64(0.1))[0], {})) is float


def test_meta_holds_no_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot save meta: a\.0 is a tensor"):
        save(tmp_path / "root", {}, step=1, world=1, meta={"a": [torch.zeros(1)]})
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b"])
def test_part_names_are_file_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match="cannot name a part"):
        save(tmp_path, {name: {}}, step=1, world=1, meta={})


# ---- training goes on bit for bit


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6, sparse=False)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.mid = nn.utils.spectral_norm(nn.Linear(4, 6))  # the state_dict's _metadata tells how to read it
        self.head = nn.Linear(6, 7)
        self.head.weight = self.embed.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mid(self.norm(self.conv(x)).relu().mean((2, 3))) + self.embed.weight[0])


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adam, tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.01), foreach=False),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, lr_decay=0.1),
}
SCHEDULES = {
    "none": lambda o: None,
    "multistep": lambda o: lrs.MultiStepLR(o, [2, 4, 5]),
    "onecycle": lambda o: lrs.OneCycleLR(o, 0.1, 20),
    "restarts": lambda o: lrs.CosineAnnealingWarmRestarts(o, 3),
    "plateau": lambda o: lrs.ReduceLROnPlateau(o, patience=1),
    "sequence": lambda o: lrs.SequentialLR(o, [lrs.LinearLR(o), lrs.ExponentialLR(o, 0.9)], [4]),
    "lambda": lambda o: lrs.LambdaLR(o, lambda step: float(np.cos(step / 10))),
    "numpy": lambda o: lrs.LambdaLR(o, lambda step: np.cos(step / 10)),
}
PAIRS = [(name, "sequence") for name in OPTIMIZERS] + [("sgd", name) for name in SCHEDULES]


class Training:
    def __init__(self, optimizer: str, schedule: str, seed: int) -> None:
        torch.manual_seed(seed)
        self.model = Net()
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.schedule = SCHEDULES[schedule](self.optimizer)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            rng = torch.Generator().manual_seed(step)
            x, y = torch.randn(8, 1, 6, 6, generator=rng), torch.randint(7, (8,), generator=rng)

            def closure(x: torch.Tensor = x, y: torch.Tensor = y) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = nn.functional.cross_entropy(self.model(x), y)
                loss.backward()
                return loss

            loss = self.optimizer.step(closure)
            if isinstance(self.schedule, lrs.ReduceLROnPlateau):
                self.schedule.step(loss)
            elif self.schedule:
                self.schedule.step()

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict() if self.schedule else None,
            "rng": torch.get_rng_state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.schedule:
            self.schedule.load_state_dict(state["schedule"])


@pytest.mark.parametrize(("optimizer", "schedule"), PAIRS)
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_training_equals_an_undisturbed_one_bit_for_bit(
    tmp_path: Path, optimizer: str, schedule: str
) -> None:
    undisturbed = Training(optimizer, schedule, seed=1)
    undisturbed.steps(0, 4)
    before = undisturbed.state()
    loaded = roundtrip(tmp_path, before)
    if schedule != "numpy":  # np.float64 comes back as float
        assert_same(before, loaded)
    resumed = Training(optimizer, schedule, seed=2)
    resumed.load(loaded)
    undisturbed.steps(4, 9)
    resumed.steps(4, 9)
    assert_same(dict(undisturbed.model.state_dict()), dict(resumed.model.state_dict()))
    assert [g["lr"] for g in undisturbed.optimizer.param_groups] == [g["lr"] for g in resumed.optimizer.param_groups]


def test_the_module_versions_survive(tmp_path: Path) -> None:
    state = Net().state_dict()
    back = roundtrip(tmp_path, state)
    assert_same(state._metadata, back._metadata)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_a_gpu_come_back_on_the_cpu(tmp_path: Path) -> None:
    weight = torch.randn(5, 3, device="cuda").T
    assert_same(weight.cpu(), roundtrip(tmp_path, weight))
