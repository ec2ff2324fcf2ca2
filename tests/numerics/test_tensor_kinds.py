"""Tensors that are not dense rows of numbers: carried with one process's bits, or refused by the layer's name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import Make, Take, sgd
from support.oracle import assert_same_weights

Tensor = torch.Tensor


class Sub(torch.Tensor):
    pass


def mse(output: Tensor, target: Tensor) -> Tensor:
    return nn.functional.mse_loss(output, target)


def summed(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return nn.functional.mse_loss(output, target, reduction="sum"), torch.tensor(float(target.numel()))


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(8, 4), torch.randn(8, 4)


def plain_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, x: Any, y: Tensor, *, chunks: int = 2, share: float = 1.0
) -> None:
    """Backward of the loop over micro-batches."""
    for a, b in zip(x.chunk(chunks), y.chunk(chunks), strict=True):
        (mse(model(a), b) * (len(a) / len(x) * share)).backward()


def pipe_of(layers: Any, cluster: Any = None, **arguments: Any) -> rp.Pipeline:
    defaults: dict[str, Any] = {"loss": mse, "optimizer": sgd, "chunks": 2, "balance": [1] * len(layers)}
    options = defaults | arguments
    workers = len(options["balance"]) * options.get("replicas", 1)
    return rp.Pipeline(layers, cluster or LocalCluster(workers), **options)


CARRIED: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]]] = {
    "conjugated view": (lambda h: torch.complex(h, h * 2).conj(), lambda t: t.imag),
    "negated view": (lambda h: torch.complex(h, h * 2).conj().imag, lambda t: t * 1),
    "no element": (lambda h: (h, h.new_empty(len(h), 0)), lambda t: t[0] + t[1].sum()),
    "no element, differentiable": (lambda h: (h, h[:, :0]), lambda t: t[0] + t[1].sum()),
    "a chunk without elements": (lambda h: (h, torch.empty(8, 0).chunk(2)[1]), lambda t: t[0] + t[1].sum()),
    "a chunk without elements in a list": (lambda h: [h, *torch.empty(9, 0).chunk(3)], lambda t: t[0] + t[3].sum()),
    "subclass": (lambda h: h.as_subclass(Sub), lambda t: t.as_subclass(Tensor)),
    "constant sparse": (lambda h: (h, torch.eye(4).to_sparse()), lambda t: torch.sparse.mm(t[1], t[0].T).T),
    "expanded": (lambda h: h.sum(1, keepdim=True).expand(-1, 4), lambda t: t * 2),
    "transposed": (lambda h: (h.T, h), lambda t: t[0].T + t[1]),
    "bool and integers": (lambda h: (h, h > 0, h.argmax(1)), lambda t: t[0] * t[1] + t[2][:, None]),
}  # fmt: skip

REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "sparse": (lambda h: h.to_sparse(), "a sparse tensor that requires a gradient"),
    "mkldnn": (lambda h: h.to_mkldnn(), "a tensor in the layout of mkldnn"),
    "meta": (lambda h: (h, h.detach().to("meta")), "a tensor on the meta device"),
    "nested": (lambda h: torch.nested.as_nested_tensor(list(h), layout=torch.jagged), "Nested"),
    "nested, strided": (lambda h: torch.nested.nested_tensor(list(h.detach())), "a nested tensor"),
}


@pytest.mark.parametrize("kind", CARRIED)
def test_kinds_of_tensors_arrive_as_they_were(kind: str) -> None:
    make, take = CARRIED[kind]
    layers = [Make(make), Take(take)]
    x, y = data()
    model = nn.Sequential(*copy.deepcopy(layers))
    optimizer = sgd(list(model.parameters()))
    plain_step(model, optimizer, x, y)
    optimizer.step()
    for schedule in ("1f1b", "zb-h1"):
        pipe = pipe_of(layers, schedule=schedule)
        pipe.train_step(x, y)
        assert_same_weights(pipe, model)


@pytest.mark.parametrize("kind", REFUSED)
def test_kinds_that_cannot_be_sent_are_refused_by_the_layer(kind: str) -> None:
    make, words = REFUSED[kind]
    pipe = pipe_of([Make(make), Take(lambda t: t)])
    x, y = data()
    before = pipe.state_dict()
    # Without a gradient sparse tensors are carried.
    for call in (lambda: pipe.train_step(x, y), lambda: pipe(x))[: 1 if kind == "sparse" else 2]:
        with pytest.raises(rp.ModelError, match=f"the output of layer 0 has .*{words}"):
            call()
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    if kind == "sparse":
        return
    alone = pipe_of([nn.Linear(4, 4), Make(lambda h: (h, make(h)))], loss=lambda out, y: mse(out[0], y))
    alone.train_step(x, y)
    with pytest.raises(rp.ModelError, match=f"the output of layer 1 has .*{words}"):
        alone(x)


def test_all_kinds_pass_through_rpc_and_no_worker_dies(cluster: rp.Cluster) -> None:
    x, y = data()
    for kind, (make, take) in CARRIED.items():
        layers = [Make(make), Take(take)]
        pipe = pipe_of(layers, cluster)
        model = nn.Sequential(*copy.deepcopy(layers))
        optimizer = sgd(list(model.parameters()))
        plain_step(model, optimizer, x, y)
        optimizer.step()
        pipe.train_step(x, y)
        assert_same_weights(pipe, model)
        if kind in ("a chunk without elements", "conjugated view"):
            first = pipe_of([Make(make), nn.Identity()], cluster, loss=lambda out, y: mse(out[0], y))
            assert torch.equal(torch.as_tensor(len(first(x))), torch.as_tensor(len(make(x))))
            first.close()
        pipe.close()
    for make, _ in REFUSED.values():
        pipe = pipe_of([Make(make), Take(lambda t: t)], cluster)
        with pytest.raises(rp.ModelError, match="the output of layer 0 has"):
            pipe.train_step(x, y)
        pipe.close()


def test_inputs_without_elements_and_by_hand(cluster: rp.Cluster) -> None:
    x, y = data()
    pipe = pipe_of([Take(lambda d: d["x"]), nn.Linear(4, 4)], cluster)
    pipe.train_step({"x": x, "e": torch.empty(8, 0)}, y)
    pipe.close()
    pipe = pipe_of([nn.Identity(), Make(lambda h: h)], cluster)
    assert pipe.stages[0].forward(torch.empty(8, 0).chunk(2)[1]).to_here().shape == (4, 0)
    pipe.close()


BATCHES: dict[str, tuple[Callable[[Tensor], Any], str | None]] = {
    "meta": (lambda x: x.to("meta"), "a tensor on the meta device"),
    "nested": (lambda x: {"x": x, "n": rp.Replicated(torch.nested.nested_tensor(list(x)))}, "a nested tensor"),
    "mkldnn": (lambda x: {"x": x, "n": rp.Replicated(x.to_mkldnn())}, "the layout of mkldnn"),
    "numpy": (lambda x: x.numpy(), r"a numpy ndarray.*torch.as_tensor"),
    "numpy beside tensors": (lambda x: {"x": x, "n": x.numpy()}, r"a numpy ndarray.*torch.as_tensor"),
    "no tensor": (lambda x: 3.0, "inputs must be made of tensors"),
    "not contiguous": (lambda x: x.T.contiguous().T, None),
    "expanded": (lambda x: x[:1].expand(8, -1), None),
    "strided": (lambda x: torch.cat([x, x]).view(8, 2, 4)[:, 0], None),
    "subclass": (lambda x: x.as_subclass(Sub), None),
    "parameter": (lambda x: nn.Parameter(x), None),
    "a scalar and a number": (lambda x: {"x": x, "s": torch.tensor(2.0), "n": 3}, None),
    "numpy for all": (lambda x: {"x": x, "n": rp.Replicated(x.numpy()[:3])}, None),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_of_any_kind_train_as_the_plain_loop_or_are_refused(kind: str) -> None:
    make, words = BATCHES[kind]
    x, y = data()
    layers = [Take(lambda d: d["x"] if isinstance(d, dict) else d.as_subclass(Tensor)), nn.Linear(4, 4)]
    pipe = pipe_of(layers)
    batch = make(x.clone())
    if words is not None:
        for call in (lambda: pipe.train_step(batch, y), lambda: pipe(batch), lambda: pipe.evaluate([(batch, y)])):
            with pytest.raises(rp.ArgumentError, match=words):
                call()
        return
    model = nn.Sequential(*copy.deepcopy(layers))
    optimizer = sgd(list(model.parameters()))
    plain_step(model, optimizer, batch["x"] if isinstance(batch, dict) else batch, y)
    optimizer.step()
    pipe.train_step(batch, y)
    assert_same_weights(pipe, model)


# --- sparse gradients and buffers ---


def sparse_layers() -> list[nn.Module]:
    torch.manual_seed(5)
    return [nn.Embedding(50, 4, sparse=True), nn.Linear(4, 4)]


def ids() -> Tensor:
    return torch.randint(0, 50, (8,), generator=torch.Generator().manual_seed(1))


ADAGRAD = lambda parameters: torch.optim.Adagrad(parameters, lr=0.1)  # noqa: E731
SPARSE: dict[str, dict[str, Any]] = {
    "1f1b": {},
    "split backward": {"schedule": "zb-h1"},
    "recomputed": {"checkpoint": "always"},
    "adagrad": {"optimizer": ADAGRAD},
    "replicas": {"balance": [2], "replicas": 2, "chunks": 1},
    "sharded": {"balance": [2], "replicas": 2, "chunks": 1, "shard_optimizer": True},
    "stream": {"schedule": "pipedream", "chunks": 1},
    "stop": {"nonfinite": "stop"},
}


@pytest.mark.parametrize("kind", SPARSE)
def test_sparse_gradients_train_as_in_one_process(kind: str) -> None:
    options = SPARSE[kind]
    layers, (_, y) = sparse_layers(), data()
    pipe = pipe_of(layers, **options)
    model = nn.Sequential(*copy.deepcopy(layers))
    optimizer = options.get("optimizer", sgd)(list(model.parameters()))
    for _ in range(2):
        optimizer.zero_grad()
        plain_step(model, optimizer, ids(), y, chunks=1 if kind == "stream" else 2)
        dense = [p.grad.to_dense() for p in model.parameters() if p.grad is not None]
        optimizer.step()
        result = pipe.train_step(ids(), y)
        assert result.grad_norm == pytest.approx(float(nn.utils.get_total_norm(dense)), rel=1e-6)
    assert_same_weights(pipe, model)


def test_sparse_gradients_are_accumulated_clipped_and_normalised_as_dense_ones() -> None:
    _, y = data()
    for options in ({"clip_grad_norm": 0.05}, {"accumulate": 2}, {"loss": summed, "clip_grad_norm": 0.05}):
        found = []
        for sparse in (True, False):
            layers = sparse_layers()
            layers[0].sparse = sparse  # type: ignore[assignment]
            pipe = pipe_of(layers, **options)
            for _ in range(4):
                pipe.train_step(ids(), y)
            found.append(pipe.state_dict())
        for name, value in found[0].items():
            torch.testing.assert_close(value, found[1][name])


class Head(nn.Module):
    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_a_tied_weight_sums_sparse_and_dense_gradients() -> None:
    embedding = nn.Embedding(50, 4, sparse=True)
    layers = [embedding, nn.Linear(4, 4), Head(embedding.weight)]
    targets = torch.randint(0, 50, (8,))
    entropy = nn.functional.cross_entropy
    model = copy.deepcopy(nn.Sequential(*layers))
    optimizer = sgd(list(model.parameters()))
    for a, b in zip(ids().chunk(2), targets.chunk(2), strict=True):
        (entropy(model(a), b) * 0.5).backward()
    optimizer.step()
    pipe = pipe_of(layers, loss=entropy, balance=[2, 1])
    pipe.train_step(ids(), targets)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(pipe.state_dict()[name], value)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("adjacency", torch.eye(4).to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.adjacency, self.linear(x).T).T


def test_sparse_buffers_train_and_are_part_of_the_state(cluster: rp.Cluster, tmp_path: Any) -> None:
    layers, (x, y) = [Graph(), nn.Linear(4, 4)], data()
    model = nn.Sequential(*copy.deepcopy(layers))
    optimizer = sgd(list(model.parameters()))
    plain_step(model, optimizer, x, y)
    optimizer.step()
    pipe = pipe_of(layers, cluster)
    pipe.train_step(x, y)
    state = pipe.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(state[name].to_dense(), value.to_dense())
    pipe.load_state_dict(state)
    with pytest.raises(rp.CheckpointError, match=r"0\.adjacency is sparse"):
        pipe.save(tmp_path)
    pipe.close()


# --- memory that is used again ---


class Reuses(nn.Module):
    """Returns its own memory, written anew by every call."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where, self.factor = where, nn.Parameter(torch.ones(1))
        if where == "buffer":
            self.register_buffer("memory", torch.zeros(2, 4))
        elif where == "attribute":
            self.memory = torch.zeros(2, 4)
        elif where == "list":
            self.kept = [torch.zeros(2, 4)]

    def forward(self, x: Tensor) -> Tensor:
        memory = self.kept[0] if self.where == "list" else HIDDEN if self.where == "global" else self.memory
        with torch.no_grad():
            memory.copy_(x * self.factor)
        return memory.view(2, 4)


HIDDEN = torch.zeros(2, 4)


@pytest.mark.parametrize("where", ["buffer", "attribute", "list", "global"])
@pytest.mark.parametrize("last", [False, True])
def test_memory_that_a_layer_uses_again_is_copied_or_refused(where: str, last: bool) -> None:
    layers = [nn.Identity(), Reuses(where)] if last else [Reuses(where), nn.Linear(4, 4)]
    pipe = pipe_of(layers, chunks=4)
    x = torch.arange(32.0).view(8, 4)
    if where == "global":
        with pytest.raises(rp.ModelError, match=rf"the output of layer {int(last)} is in memory that also held"):
            pipe(x)
        return
    # Whole batches have other bits on some processors.
    expected = torch.cat([copy.deepcopy(layers[-1])(part) for part in x.chunk(4)]) if not last else x
    assert torch.equal(pipe(x), expected)
    if not last:
        pipe.train_step(x, x)


def test_a_constant_that_a_layer_returns_again_is_no_fault() -> None:
    pipe = pipe_of([nn.Linear(4, 4), Take(lambda t: t)], chunks=4)
    table = torch.randn(2, 4)
    pipe = pipe_of([Make(lambda h: (h, table)), Take(lambda t: t[0] + t[1])], chunks=4)
    x, y = data()
    for _ in range(3):
        pipe.train_step(x, y)
        pipe(x)


@pytest.mark.parametrize("schedule", ["1f1b", "pipedream", "pipedream-2bw"])
def test_a_loader_may_fill_the_same_buffer_again(schedule: str) -> None:
    """The in-process transport reads what is sent as late as it can."""
    layers, count = [nn.Linear(4, 4), nn.Linear(4, 4)], 6

    def loader(*, fresh: bool, targets: bool) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(0)
        memory = torch.empty(2, 8, 4)
        for _ in range(count):
            memory = torch.empty(2, 8, 4) if fresh else memory
            memory.normal_(generator=generator)
            yield (memory[0], memory[1]) if targets else memory[0]

    results = []
    for fresh in (True, False):
        pipe = pipe_of(copy.deepcopy(layers), schedule=schedule)
        trained = [result.loss for result in pipe.train(loader(fresh=fresh, targets=True))]
        evaluated = pipe.evaluate(loader(fresh=fresh, targets=True))
        predicted = torch.stack(list(pipe.predict(loader(fresh=fresh, targets=False))))
        results.append((trained, evaluated, predicted))
    assert results[0][:2] == results[1][:2]
    assert torch.equal(results[0][2], results[1][2])
