"""Gradients summed and weights spread between members, without any transport."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from rpcpipe.driver import program
from rpcpipe.worker.gradient_exchange import GradientExchange, Push, assign
from rpcpipe.worker.messages import Port
from rpcpipe.worker.operations import GatherSums, GatherWeights, Reduce, ReduceScatter, Task

SHAPES = [(3, 4), (4,), (7, 2), (1,), (5,), (6, 6)]


def members(count: int, *, limit: int = 64) -> list[GradientExchange]:
    """Each with parameters of its own, and gradients drawn for it alone; the last parameter has none anywhere."""
    torch.manual_seed(count)
    workers = [f"w{index}" for index in range(count)]
    owners = assign([torch.Size(shape).numel() * 4 for shape in SHAPES], count)
    found = []
    for index in range(count):
        parameters = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        for parameter in parameters[:-1]:
            parameter.grad = torch.randn_like(parameter)
        found.append(GradientExchange("g", workers, index, parameters, owners, limit=limit))
    return found


def parameters_of(member: GradientExchange) -> list[nn.Parameter]:
    return [parameter for part in member.parts for parameter in part.parameters]


class Wire:
    """Pushes that have not been taken yet, by worker and port; the order of tasks is random within what is ready."""

    def __init__(self, group: list[GradientExchange], seed: int) -> None:
        self.values: dict[tuple[str, Port], list[torch.Tensor | None]] = {}
        self.members = {member.workers[member.index]: member for member in group}
        self.random = random.Random(seed)

    def push(self, pushes: list[Push]) -> None:
        for worker, port, value in pushes:
            assert (worker, port) not in self.values
            self.values[worker, port] = [None if tensor is None else tensor.clone() for tensor in value]

    def run(self, todo: dict[str, list[Task]]) -> None:
        todo = {worker: list(tasks) for worker, tasks in todo.items() if tasks}
        while todo:
            ready = [w for w, tasks in todo.items() if all((w, port) in self.values for port in tasks[0].awaits)]
            worker = self.random.choice(ready)  # raises where all wait for each other
            task, member = todo[worker].pop(0), self.members[worker]
            given = {port.slot: self.values.pop((worker, port)) for port in task.awaits}
            if isinstance(task.operation, ReduceScatter):
                self.push(member.scatter())
            elif isinstance(task.operation, Reduce):
                member.reduce(task.operation.bucket, given)
                self.push(member.sums(task.operation.bucket) if task.operation.spread else [])
            elif isinstance(task.operation, GatherSums):
                member.take_sums(task.operation.bucket, given["sums"])
            else:
                assert isinstance(task.operation, GatherWeights)
                member.take_weights(task.operation.bucket, given["weights"])
            todo = {worker: tasks for worker, tasks in todo.items() if tasks}


def step_tasks(member: GradientExchange, *, spread: bool) -> list[Task]:
    owners = member.owners
    tasks = [
        program.reduce_scatter("g"),
        *program.reduces("g", member.workers, owners, member.index, spread=spread),
    ]
    return tasks + (program.gather_sums("g", owners, member.index) if spread else [])


@pytest.mark.parametrize("limit", [1, 64, 1 << 20])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_all_members_get_the_sums_in_the_members_order(count: int, limit: int) -> None:
    group = members(count, limit=limit)
    wanted = []
    for at in range(len(SHAPES)):
        grads = [parameters_of(member)[at].grad for member in group]
        total = grads[0]
        for grad in grads[1:]:
            total = None if total is None or grad is None else total + grad
        wanted.append(total)
    wire = Wire(group, limit)
    wire.run({member.workers[member.index]: step_tasks(member, spread=True) for member in group})
    assert not wire.values
    for member in group:
        for parameter, want in zip(parameters_of(member), wanted, strict=True):
            assert (parameter.grad is None) == (want is None)
            assert want is None or torch.equal(parameter.grad, want)  # type: ignore[arg-type]


def test_a_gradient_that_only_some_members_have_is_summed_over_those() -> None:
    group = members(3)
    for member in group[::2]:
        parameters_of(member)[1].grad = None
    want = parameters_of(group[1])[1].grad
    assert want is not None
    want = want.clone()
    wire = Wire(group, 0)
    wire.run({member.workers[member.index]: step_tasks(member, spread=True) for member in group})
    assert all(torch.equal(parameters_of(member)[1].grad, want) for member in group)  # type: ignore[arg-type]


def test_sharded_sums_stay_with_their_owners_and_weights_are_spread() -> None:
    group = members(3)
    wire = Wire(group, 1)
    wire.run({member.workers[member.index]: step_tasks(member, spread=False) for member in group})
    for member in group:
        elsewhere = set(member.owned_elsewhere)
        assert all(parameter.grad is None for parameter in elsewhere)
    for member in group:
        wire.push(member.weights())
    wire.run({m.workers[m.index]: program.gather_weights("g", m.owners, m.index) for m in group})
    for at in range(len(SHAPES)):
        copies = [parameters_of(member)[at] for member in group]
        assert all(torch.equal(copies[0], copy) for copy in copies)


@given(st.lists(st.integers(0, 50), max_size=12), st.integers(1, 5))
def test_ownership_is_balanced(sizes: list[int], count: int) -> None:
    owners = assign(sizes, count)
    load = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == member) for member in range(count)]
    assert max(load) <= sum(sizes) / count + max(sizes, default=0) * (1 - 1 / count)
    assert owners == assign(sizes, count)


def test_buckets_hold_at_most_the_limit_unless_one_parameter_is_larger() -> None:
    parameters = [nn.Parameter(torch.empty(size)) for size in (4, 4, 20, 3, 9)]
    parts = GradientExchange("g", ["a", "b"], 0, parameters, [0, 0, 0, 1, 0], limit=40).parts
    assert [(part.owner, [p.numel() for p in part.parameters]) for part in parts] == [
        (0, [4, 4]), (0, [20]), (0, [9]), (1, [3]),
    ]  # fmt: skip
