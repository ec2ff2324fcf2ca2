"""Values in any container that a Python program uses: carried between stages, cut and differentiated, or refused."""

from __future__ import annotations

import collections
import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import Make, Take, sgd
from support.oracle import assert_same_weights

Tensor = torch.Tensor


@dataclasses.dataclass
class Data:
    h: Tensor
    note: str = "plain"
    rest: list[Any] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    h: Tensor


@dataclasses.dataclass
class Computed:
    """Its ``__init__`` takes no field."""

    h: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        raise AssertionError("a value that arrives is not made anew")


def computed(h: Tensor) -> Computed:
    made = Computed.__new__(Computed)
    made.h = h
    return made


class Named(NamedTuple):
    h: Tensor


class UserDict(collections.UserDict[str, Any]):
    """As transformers' BatchEncoding."""


class AttrDict(dict[str, Any]):
    def __init__(self, **items: Any) -> None:
        super().__init__(items)
        self.__dict__ = self


class Tagged(list[Tensor]):
    tag: Tensor


class Pair(tuple[Tensor, ...]):
    pass


class Ordered(collections.OrderedDict[str, Any]):
    pass


class Default(collections.defaultdict[str, Any]):
    pass


def tagged(h: Tensor) -> Tagged:
    made = Tagged([h])
    made.tag = h * 2
    return made


CONTAINERS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "SimpleNamespace": (lambda h: SimpleNamespace(h=h, n=3), lambda s: s.h),
    "dataclass": (lambda h: Data(h, rest=[h * 2, None]), lambda s: s.h + s.rest[0]),
    "frozen dataclass with slots": (Frozen, lambda s: s.h),
    "dataclass made by hand": (computed, lambda s: s.h),
    "namedtuple": (Named, lambda s: s.h),
    "UserDict": (lambda h: UserDict(h=h), lambda s: s["h"]),
    "UserList": (lambda h: collections.UserList([h]), lambda s: s[0]),
    "dict that is its __dict__": (lambda h: AttrDict(h=h), lambda s: s.h),
    "list with an attribute": (tagged, lambda s: s[0] + s.tag),
    "tuple": (lambda h: Pair((h, h * 3)), lambda s: s[0] + s[1]),
    "OrderedDict": (lambda h: Ordered(b=h, a=h * 2), lambda s: sum(v for v in s.values())),
    "defaultdict": (lambda h: Default(list, h=h), lambda s: s["h"] + len(s["none"])),
    "Counter": (lambda h: {"h": h, "n": collections.Counter(a=2)}, lambda s: s["h"] * s["n"]["a"]),
    "deque": (lambda h: collections.deque([h], maxlen=2), lambda s: s[0]),
    "nested": (lambda h: Data(h, rest=[SimpleNamespace(d=UserDict(h=h))]), lambda s: s.rest[0].d["h"] + s.h),
    "torch.return_types": (lambda h: h.max(1, keepdim=True), lambda s: s.values.expand(-1, 4)),
    "PackedSequence": (
        lambda h: pack_padded_sequence(h[:, :, None], torch.full((len(h),), 4), batch_first=True),
        lambda s: unpacked(s),
    ),
}


def unpacked(packed: PackedSequence) -> Tensor:
    assert isinstance(packed, PackedSequence)
    return nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)[0][:, :, 0]


def mse(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(8, 4), torch.randn(8, 4)


def plain(layers: list[nn.Module], x: Any, y: Tensor, cut: Callable[[Any, int], Any] | None = None) -> nn.Sequential:
    """One step of the loop over two micro-batches."""
    model = nn.Sequential(*copy.deepcopy(layers))
    optimizer = sgd(list(model.parameters()))
    for part in range(2):
        xs = x.chunk(2)[part] if cut is None else cut(x, part)
        (mse(model(xs), y.chunk(2)[part]) * 0.5).backward()
    optimizer.step()
    return model


def pipe_of(layers: list[nn.Module], cluster: Any = None, **arguments: Any) -> rp.Pipeline:
    defaults: dict[str, Any] = {"loss": mse, "optimizer": sgd, "chunks": 2, "balance": [1] * len(layers)}
    return rp.Pipeline(layers, cluster or LocalCluster(len(layers)), **(defaults | arguments))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers_between_stages_train_as_in_one_process(kind: str, schedule: str) -> None:
    make, take = CONTAINERS[kind]
    layers: list[nn.Module] = [Make(make), Take(take)]
    x, y = data()
    for checkpoint in ("never", "always"):
        pipe = pipe_of(layers, schedule=schedule, checkpoint=checkpoint)
        pipe.train_step(x, y)
        assert_same_weights(pipe, plain(layers, x, y))


INPUTS: dict[str, Callable[[Tensor], Any]] = {
    name: make for name, (make, _) in CONTAINERS.items() if name not in ("torch.return_types", "PackedSequence")
}


@pytest.mark.parametrize("kind", INPUTS)
def test_containers_as_inputs_and_targets_are_cut(kind: str) -> None:
    make, take = CONTAINERS[kind]
    layers: list[nn.Module] = [Take(take), nn.Linear(4, 4)]
    x, y = data()
    pipe = pipe_of(layers, loss=lambda output, target: mse(output, take(target)))
    result = pipe.train_step(make(x), make(y))
    reference = plain(layers, x, take(make(y)), lambda x, part: make(x.chunk(2)[part]))
    assert_same_weights(pipe, reference)
    assert result.loss > 0


def test_containers_travel_through_rpc_and_come_out_of_predict(cluster: rp.Cluster) -> None:
    """All in one pipeline: the worker that receives a class sees it first in the message."""
    x, y = data()
    for kind in ("SimpleNamespace", "dataclass", "frozen dataclass with slots", "UserDict", "PackedSequence"):
        make, take = CONTAINERS[kind]
        layers: list[nn.Module] = [Make(make), Take(take)]
        pipe = pipe_of(layers, cluster)
        pipe.train_step(x, y)
        assert_same_weights(pipe, plain(layers, x, y))
        pipe.close()
    pipe = pipe_of([nn.Linear(4, 4), Make(lambda h: Data(h, rest=[h * 2]))], cluster)
    output = pipe(x)
    assert type(output) is Data
    assert output.h.shape == (8, 4)
    assert torch.equal(output.rest[0], output.h * 2)
    assert output.note == ["plain", "plain"]
    pipe.close()


class Holder:
    def __init__(self, h: Tensor) -> None:
        self.inner = [{"h": h}]


class Slotted:
    __slots__ = ("h",)

    def __init__(self, h: Tensor) -> None:
        self.h = h


def hold(h: Tensor) -> Callable[[], Tensor]:
    return lambda: h


OBJECTS: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "Holder": (Holder, lambda s: s.inner[0]["h"]),
    "Slotted": (Slotted, lambda s: s.h),
    "function": (hold, lambda s: s()),
    "set": (lambda h: {h}, lambda s: next(iter(s))),
    "Linear": (lambda h: _linear(h), lambda s: s.weight),
}


def _linear(h: Tensor) -> nn.Linear:
    made = nn.Linear(4, 4)
    made.weight = nn.Parameter(h)
    return made


@pytest.mark.parametrize("kind", OBJECTS)
def test_objects_that_hold_tensors_do_not_leave_a_stage(kind: str) -> None:
    make, take = OBJECTS[kind]
    layers: list[nn.Module] = [Make(make), Take(take)]
    x, y = data()
    pipe = pipe_of(layers)
    before = pipe.state_dict()
    with pytest.raises(rp.StageError, match=rf"the output of layer 0 holds tensors inside of a {kind}") as refused:
        pipe.train_step(x, y)
    assert isinstance(refused.value, rp.ModelError)
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    with pytest.raises(rp.ArgumentError, match=rf"the batch's inputs holds? tensors inside of a {kind}"):
        pipe.train_step({"x": x, "object": make(x)}, y)
    if kind != "Linear":  # whose copies for the oracle would be others
        whole = pipe_of(layers, balance=[2])
        whole.train_step(x, y)
        assert_same_weights(whole, plain(layers, x, y))


def test_what_a_named_value_holds_is_refused_by_its_name() -> None:
    first = rp.Wired(Make(lambda h: (h, Holder(h))), gives="held")
    pipe = pipe_of([first, rp.Wired(Take2(), takes="held")])  # type: ignore[list-item]
    with pytest.raises(rp.ModelError, match="the value 'held' holds tensors inside of a Holder"):
        pipe.train_step(*data())


class Take2(nn.Module):
    def forward(self, x: Tensor, held: Any) -> Tensor:
        return x


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_only_pairs_are_batches(schedule: str) -> None:
    x, y = data()
    pipe = pipe_of([nn.Linear(4, 4), nn.Linear(4, 4)], schedule=schedule)
    for batch in ({"inputs": x, "targets": y}, x, (x, y, y), UserDict(a=x, b=y), torch.stack([x, y])):
        for call, name in ((pipe.train, "train"), (pipe.evaluate, "evaluate")):
            with pytest.raises(rp.ArgumentError, match=rf"pipe.{name} takes pairs \(inputs, targets\), and got a"):
                list(call([batch]))  # type: ignore[arg-type, list-item, operator]
    assert len(list(pipe.train([(x, y), [x, y]]))) == 2  # type: ignore[list-item]
