"""Any optimizer of torch's shape: the plain loop's bits, or a refusal before anything trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp
from support.oracle import Natural, assert_same_run, assert_same_weights


class Averaging(torch.optim.Optimizer):
    """Counts in its groups, as schedule-free optimizers do; ``fails_at``: raises after that many updates."""

    def __init__(self, params: Any, lr: float = 0.1, fails_at: int = -1, where: str = "") -> None:
        super().__init__(params, {"lr": lr, "k": 0, "weight_sum": torch.zeros(()), "betas": (0.9, 0.99)})
        self.fails_at, self.where = {fails_at}, where

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"] * group["k"]
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.sub_(parameter.grad * (group["lr"] * group["k"] / float(group["weight_sum"])))
            if group["k"] in self.fails_at:
                self.fails_at.clear()  # a set: plain attributes are rolled back
                raise RuntimeError("the update fails once")


class Prodigal(torch.optim.Optimizer):
    """Estimates one distance from all of its parameters, as Prodigy does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0, "d": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            group["d"] *= 1 + float(sum(g.abs().sum() for g in grads))
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.sub_(parameter.grad * group["d"])


class Counting(torch.optim.Optimizer):
    """Counts in an attribute, made in the first update, and under a string key of its state."""

    def __init__(self, params: Any, fails_at: int = -1) -> None:
        params = list(params)
        super().__init__(params, {"lr": 0.1})
        self.fails_at, self.count = {fails_at}, len(params)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.t = getattr(self, "t", 0) + 1
        entry = self.state["all"]  # type: ignore[index]
        entry["rate"] = entry.get("rate", torch.ones(())) * 0.5
        for group in self.param_groups:
            assert self.count >= len(group["params"])
            for parameter in (p for p in group["params"] if p.grad is not None):
                parameter.sub_(parameter.grad * (group["lr"] / self.t * entry["rate"]))
        if self.t in self.fails_at:
            self.fails_at.clear()
            raise RuntimeError("the update fails once")


class Listing(torch.optim.SGD):
    """Keeps momenta in a list of its own."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        self.momenta = [
            m * 0.9 + p.grad for m, p in zip(getattr(self, "momenta", [0.0] * 99), parameters, strict=False)
        ]
        super().step()


class Noisy(torch.optim.SGD):
    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(torch.randn_like(parameter) * 0.01)


class Clipping(torch.optim.SGD):
    """Clips by the norm of all gradients, as LAMB does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.max_norm = 0.05

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        nn.utils.clip_grad_norm_(self.param_groups[0]["params"], self.max_norm)
        super().step()


class Around(torch.optim.SGD):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.inner = torch.optim.Adam(self.param_groups)


class Relative(torch.optim.SGD):
    """Finds its rate by itself, as Adafactor does."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05)
        self.param_groups[0]["lr"] = None

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["lr"] = 0.05
        super().step()
        self.param_groups[0]["lr"] = None


OPTIMIZERS: dict[str, Any] = {
    "tensor rate": lambda ps: torch.optim.SGD(ps, lr=torch.tensor(0.1)),
    "tensor rate, Adam": lambda ps: torch.optim.Adam(ps, lr=torch.tensor(0.01), foreach=False),
    "no rate": Relative,
    "foreach": lambda ps: torch.optim.AdamW(ps, lr=0.01, foreach=True),
    "fused": lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True),
    "fused sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, fused=True),
    "maximize": lambda ps: torch.optim.SGD(ps, lr=0.01, maximize=True),
    "amsgrad": lambda ps: torch.optim.Adam(ps, lr=0.01, amsgrad=True),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.01),
    "nadam": lambda ps: torch.optim.NAdam(ps, lr=0.01, decoupled_weight_decay=True),
    "averaging": Averaging,
    "counting": Counting,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_same_bits_through_schedulers_saves_moves_and_loads(name: str, tmp_path: Path) -> None:
    make = OPTIMIZERS[name]

    def fresh() -> rp.Pipeline:
        return rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=make, chunks=2, balance=[3, 5])  # type: ignore[arg-type]

    pipe, loop = fresh(), Natural(mlp(), make, cross_entropy, 2)
    paced = name != "no rate"
    schedulers = [lr_scheduler.StepLR(o, 1, gamma=0.5) for o in (pipe.optimizer, loop.optimizer) if paced]
    for _ in range(2):
        [result] = assert_same_run(pipe, loop, batches(1))
        assert result.lr == tuple(float(group["lr"] or 0.0) for group in loop.optimizer.param_groups)
        for scheduler in schedulers:
            scheduler.step()
    pipe.schedule = "interleaved"  # type: ignore[assignment]
    assert_same_run(pipe, loop, batches(2))
    pipe.save(tmp_path)
    again = fresh()
    again.load(tmp_path)
    again.schedule = "interleaved"  # type: ignore[assignment]
    assert_same_run(again, loop, batches(2))


@pytest.mark.parametrize("shard", [False, True])
def test_what_was_loaded_goes_along_with_moves(shard: bool, tmp_path: Path) -> None:
    """Also to workers that had no parameter before, and to parameters that another replica had."""

    def fresh() -> rp.Pipeline:
        model = mlp()
        model[:6].requires_grad_(False)
        return rp.Pipeline(
            model, LocalCluster(4), loss=cross_entropy, optimizer=Averaging, chunks=2, balance=[4, 4], replicas=2,
            shard_optimizer=shard,
        )  # type: ignore[arg-type]  # fmt: skip

    first = fresh()
    first.optimizer.param_groups[0]["lr"] = 0.01
    for batch in batches(3):
        first.train_step(*batch)
    first.save(tmp_path)
    moved, still = fresh(), fresh()
    for pipe in (moved, still):
        pipe.load(tmp_path)
    moved.schedule = "interleaved"  # type: ignore[assignment]
    for batch in batches(2):
        assert moved.train_step(*batch).lr == still.train_step(*batch).lr == (0.01,)
    state = still.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in moved.state_dict().items())


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("kind", [Averaging, Counting])
def test_what_an_optimizer_counts_is_rolled_back_with_a_failed_update(kind: Any, stage: int) -> None:
    def make(params: Any) -> torch.optim.Optimizer:
        here = any(name.startswith("0.") for name, _ in params.named()) == (stage == 0)
        return kind(params, fails_at=2 if here else -1)  # type: ignore[no-any-return]

    pipe = rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=make, chunks=2, balance=[3, 5])  # type: ignore[arg-type]
    loop = Natural(mlp(), lambda ps: kind(ps), cross_entropy, 2)
    assert_same_run(pipe, loop, batches(1))
    with pytest.raises(RuntimeError, match="the update fails once"):
        pipe.train_step(*next(batches(1)))
    assert_same_run(pipe, loop, batches(3))


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "pipedream", "pipedream-2bw"])
def test_an_optimizer_that_looks_at_all_its_parameters_together_is_refused(schedule: str) -> None:
    pipe = rp.Pipeline(
        mlp(), LocalCluster(2), loss=cross_entropy, optimizer=Prodigal, chunks=2, balance=[3, 5], schedule=schedule
    )  # type: ignore[arg-type]
    before = pipe.state_dict()
    for _ in range(2):
        with pytest.raises(rp.ModelError, match=r"computes 'd' of group 0 from all its parameters together.*rolled"):
            list(pipe.train(batches(4)))
        assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())


@pytest.mark.parametrize(
    ("kind", "message"),
    [(Listing, r"(?s)keeps optimizer\.momenta.*rolled back; keep what"), (Noisy, "Noisy.step draws")],
)
@pytest.mark.parametrize("schedule", ["1f1b", "pipedream"])
def test_momenta_in_a_list_and_noise_of_the_default_generator_are_refused(
    kind: Any, message: str, schedule: str
) -> None:
    pipe = rp.Pipeline(
        mlp(), LocalCluster(2), loss=cross_entropy, optimizer=lambda ps: kind(ps, lr=0.1), chunks=2, balance=[3, 5],
        schedule=schedule,
    )  # type: ignore[arg-type]  # fmt: skip
    before = pipe.state_dict()
    with pytest.raises(rp.ModelError, match=message):
        list(pipe.train(batches(2)))
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())


class Late(Averaging):
    """Looks at all of its parameters together from its third update on."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        for group in self.param_groups:
            group["d"] = sum(p.numel() for p in group["params"]) if group["k"] > 2 else 0


def test_a_stream_goes_back_to_where_it_began_and_not_before_the_step_before() -> None:
    pipe = rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=Late, chunks=2, balance=[3, 5])  # type: ignore[arg-type]
    loop = Natural(mlp(), Averaging, cross_entropy, 2)
    assert_same_run(pipe, loop, batches(1))
    pipe.schedule = "pipedream"  # type: ignore[assignment]
    with pytest.raises(rp.ModelError, match="computes 'd'"):
        list(pipe.train(batches(3)))
    assert_same_weights(pipe, loop.model)
    assert pipe.trained == 1
    pipe.schedule = "1f1b"  # type: ignore[assignment]
    assert_same_run(pipe, loop, batches(1))


@pytest.mark.parametrize("kind", [Prodigal, Clipping])
@pytest.mark.parametrize("replicas", [1, 2])
def test_and_trains_on_one_stage(replicas: int, kind: Any) -> None:
    pipe = rp.Pipeline(
        mlp(dropout=0.0), LocalCluster(replicas), loss=cross_entropy, optimizer=kind, chunks=2, balance=[8],
        replicas=replicas,
    )  # type: ignore[arg-type]  # fmt: skip
    loop = Natural(mlp(dropout=0.0), kind, cross_entropy, 2 * replicas)
    for batch in batches(3, 8):
        assert pipe.train_step(*batch).loss == pytest.approx(loop.train_step(*batch), rel=1e-5)
    if replicas == 1:
        assert_same_weights(pipe, loop.model)


# --- refused ---

FOREIGN = nn.Linear(3, 5)


class NeedsLoss(torch.optim.SGD):
    def step(self, loss: Any) -> None:  # type: ignore[override]
        super().step()


def scheduled(params: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.SGD(params, lr=0.1)
    lr_scheduler.ExponentialLR(optimizer, 0.5)
    return optimizer


REFUSED: dict[str, tuple[Any, str]] = {
    "a scheduler in the factory": (scheduled, "SGD has a step of its own, .* make the scheduler of pipe.optimizer"),
    "another model's": (lambda ps: torch.optim.SGD(FOREIGN.parameters(), lr=0.1), r"2 parameters.*\(5, 3\)"),
    "and another model's": (lambda ps: torch.optim.SGD([*ps, *FOREIGN.parameters()], lr=0.1), "2 parameters"),
    "lbfgs": (torch.optim.LBFGS, "LBFGS.step needs 'closure'"),
    "nothing chosen": (
        lambda ps: torch.optim.SGD([p for n, p in ps.named() if n.startswith("0.")], lr=0.1),
        "chose none of this worker's",
    ),
    "a loss": (lambda ps: NeedsLoss(ps, lr=0.1), "NeedsLoss.step needs 'loss'"),
    "differentiable": (lambda ps: torch.optim.SGD(ps, lr=0.1, differentiable=True), "differentiable=True"),
    "another one inside": (Around, "Around holds another optimizer, inner"),
    "clipping": (Clipping, "Clipping updates a parameter by other parameters' gradients"),
    "capturable": (lambda ps: torch.optim.Adam(ps, capturable=True), "capturable=True"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_at_construction(name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(rp.ModelError, match=message):
        rp.Pipeline(mlp(), LocalCluster(2), loss=cross_entropy, optimizer=make, chunks=2, balance=[3, 5])  # type: ignore[arg-type]


# --- tied weights in groups ---


def tied() -> list[Any]:
    return [
        rp.LayerSpec(nn.Embedding, 20, 8, tied="t"), rp.LayerSpec(nn.Linear, 8, 8),
        rp.LayerSpec(nn.Linear, 8, 20, bias=False, tied="t"),
    ]  # fmt: skip


def by_first_name(params: Any) -> torch.optim.Optimizer:
    slow = [p for name, p in params.named() if name.startswith("0.")]
    rest = [p for name, p in params.named() if not name.startswith("0.")]
    return torch.optim.SGD([{"params": slow, "lr": 0.01}, {"params": rest, "lr": 0.5}], momentum=0.9)


def by_place(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([{"params": params[:1], "lr": 0.01}, {"params": params[1:], "lr": 0.5}])


def by_company(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1 * len(params))


def ids(count: int) -> Any:
    for seed in range(count):
        found = torch.randint(0, 20, (8,), generator=torch.Generator().manual_seed(seed))
        yield found, found.flip(0)


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("balance", [[1, 2], [1, 1, 1]])
def test_a_tied_weight_is_in_its_first_names_group(balance: list[int], replicas: int, shard: bool) -> None:
    pipe = rp.Pipeline(
        tied(), LocalCluster(len(balance) * replicas), loss=cross_entropy, optimizer=by_first_name, chunks=2,
        balance=balance, replicas=replicas, shard_optimizer=shard and replicas > 1,
    )  # type: ignore[arg-type]  # fmt: skip
    model = rp.layers.Sequential(tied())

    class Named(list[Any]):
        def named(self) -> Any:
            return list(model.named_parameters())

    loop = Natural(model, lambda ps: by_first_name(Named(ps)), cross_entropy, 2 * replicas)
    for batch in ids(3):
        assert pipe.train_step(*batch).loss == pytest.approx(loop.train_step(*batch), rel=1e-6)
    state = pipe.state_dict()
    assert torch.equal(state["0.weight"], state["2.weight"])
    torch.testing.assert_close(dict(state), dict(model.state_dict()), rtol=1e-5, atol=1e-7)
    pipe.load_state_dict(state)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (by_place, "the weight 0.weight into group 0 on worker0 and into group 1 on worker1, with another lr"),
        (by_company, "the weight 0.weight into group 0 on worker0 and into group 0 on worker1, with another lr"),
    ],
)
def test_copies_that_would_part_are_refused(factory: Any, message: str) -> None:
    with pytest.raises(rp.ModelError, match=message):
        rp.Pipeline(tied(), LocalCluster(2), loss=cross_entropy, optimizer=factory, chunks=2, balance=[1, 2])  # type: ignore[arg-type]


def test_copies_that_a_move_would_part_are_refused_and_the_pipeline_is_closed() -> None:
    layers = [*tied()[:2], rp.LayerSpec(nn.Linear, 8, 8), tied()[2]]
    pipe = rp.Pipeline(layers, LocalCluster(2), loss=cross_entropy, optimizer=by_place, chunks=2, balance=[3, 1])  # type: ignore[arg-type]
    pipe.train_step(*next(ids(1)))
    with pytest.raises(rp.ModelError, match=r"the weight 0\.weight into group 0 on worker0 and into group 1"):
        pipe.schedule = "interleaved"  # type: ignore[assignment]
    with pytest.raises(rp.StateError, match="the pipeline is closed"):
        pipe.train_step(*next(ids(1)))
