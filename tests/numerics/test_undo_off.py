"""Without a copy to take an update back from: the same bits, and what fails in an update is said."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rpcpipe as rp
from numerics.test_mortal_workers import SYNCHRONOUS, train, train_alive
from numerics.test_steps_ahead import OPTIONS, model, pipeline, same
from rpcpipe import schedules
from support.local_cluster import LocalCluster
from support.models import adamw, batches
from support.mortal_cluster import MortalCluster
from support.mortal_hosts import MortalHosts

OFF = {"undo": "off"}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_bits_are_those_with_a_copy(name: str) -> None:
    workers = 2 * OPTIONS[name].get("replicas", 1)
    expected, after, _ = train_alive(name)
    figures, state = train(LocalCluster(workers, 2), OPTIONS[name] | OFF, list(OPTIONS).index(name) % 2)
    assert repr(figures) == repr(expected)
    assert same(state, after)


@pytest.mark.parametrize("schedule", SYNCHRONOUS)
def test_the_bits_of_every_schedule_are_those_with_a_copy(schedule: str) -> None:
    virtual = schedules.suited_virtual_stages(schedule, 1)
    options = {"schedule": schedule, "virtual_stages": virtual, "optimizer": adamw}
    expected, after = train(LocalCluster(2, 1), options, 0)
    figures, state = train(LocalCluster(2, 2), options | OFF, 0)
    assert repr(figures) == repr(expected)
    assert same(state, after)


def test_an_asynchronous_schedule_is_refused() -> None:
    with pytest.raises(rp.ScheduleError, match="undo='off' does not fit an asynchronous schedule"):
        pipeline(LocalCluster(2), schedule="pipedream", undo="off")
    pipe = pipeline(LocalCluster(2), undo="off")
    with pytest.raises(rp.ScheduleError, match="undo='off'"):
        pipe.schedule = "pipedream"  # type: ignore[assignment]
    assert pipe.train_step(*next(batches(1))).applied


class Hooked(torch.optim.AdamW):
    """Calls ``inside(its first parameter's name)`` in the middle of an update: one parameter has changed."""

    def __init__(self, params: Any, inside: Callable[[str], None]) -> None:
        self.first, self.inside = params.named()[0][0], inside
        super().__init__(params, lr=1e-2)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.param_groups[0]["params"][0].add_(0.0625)
        self.inside(self.first)
        super().step()


class Fault:
    """Calls ``act`` in the next update of the last stage, once it is armed."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.armed, self.act = False, act

    def __reduce__(self) -> tuple[Any, ...]:
        return known, (id(self),)

    def __call__(self, name: str) -> None:
        if self.armed and not name.startswith("0."):
            self.armed = False
            self.act()


KNOWN: dict[int, Fault] = {}


def known(number: int) -> Fault:
    return KNOWN[number]


def fault(act: Callable[[], None]) -> Fault:
    made = Fault(act)
    KNOWN[id(made)] = made  # workers are in this process, and the factory travels pickled
    return made


def trained(steps: int) -> rp.Pipeline:
    """A pipeline that has trained as the others here, without a fault."""
    made = fault(lambda: None)
    pipe = pipeline(LocalCluster(2), model=model(), optimizer=lambda ps: Hooked(ps, made))
    for batch in batches(steps, 24):
        pipe.train_step(*batch)
    return pipe


def fail() -> None:
    raise RuntimeError("the update fails")


def step_by_hand(pipe: rp.Pipeline, batch: Any, error: Exception | None = None) -> None:
    with pipe.step() as step:
        step.forward_backward(*batch)
        step.optimize()
        if error is not None:
            raise error


@pytest.mark.parametrize("by_hand", [False, True])
def test_an_optimizer_that_raises_leaves_stages_apart_until_a_checkpoint_is_loaded(
    by_hand: bool, tmp_path: Path
) -> None:
    made = fault(fail)
    pipe = pipeline(LocalCluster(2), model=model(), optimizer=lambda ps: Hooked(ps, made), undo="off")
    first, second, third, fourth = batches(4, 24)
    pipe.train_step(*first)
    pipe.train_step(*second)
    pipe.save(tmp_path)
    made.armed = True
    with pytest.raises(RuntimeError, match="the update fails") as caught:
        step_by_hand(pipe, third) if by_hand else pipe.train_step(*third)
    assert isinstance(caught.value, rp.StageError)
    assert "update of step 2 failed half way" in str(caught.value)
    assert "applied on stage 0 (worker0); begun and not ended on stage 1 (worker1)." in str(caught.value)
    assert "load a checkpoint (pipe.load)" in str(caught.value)
    assert "no weight has changed" not in str(caught.value)
    for call in (
        lambda: pipe.train_step(*third), lambda: pipe.evaluate([third]), lambda: pipe.save(tmp_path), pipe.state_dict,
        lambda: next(pipe.train([third])), pipe.optimizer.state_dict, lambda: pipe.step(), lambda: pipe.resize(1),
    ):  # fmt: skip
        with pytest.raises(rp.errors.StateError, match="applied on stage 0"):
            call()  # type: ignore[no-untyped-call]
    pipe.load(tmp_path)
    for batch in (third, fourth):
        pipe.train_step(*batch)
    assert same(pipe.state_dict(), trained(4).state_dict())


def test_weights_alone_do_not_mend_what_the_optimizer_has_torn() -> None:
    made = fault(fail)
    pipe = pipeline(LocalCluster(2), model=model(), optimizer=lambda ps: Hooked(ps, made), undo="off")
    first, second = batches(2, 24)
    pipe.train_step(*first)
    weights, state = pipe.state_dict(), pipe.optimizer.state_dict()
    made.armed = True
    with pytest.raises(RuntimeError, match="the update fails"):
        pipe.train_step(*second)
    pipe.load_state_dict(weights)
    with pytest.raises(rp.errors.StateError, match="applied on"):
        pipe.train_step(*second)
    pipe.optimizer.load_state_dict(state)
    pipe.train_step(*second)
    assert same(pipe.state_dict(), trained(2).state_dict())


def test_optimizers_that_part_say_that_nothing_was_rolled_back() -> None:
    def factory(params: Any) -> torch.optim.Optimizer:
        made = adamw(params)
        names = [name for name, _ in params.named()]

        def part(*_: Any) -> None:
            made.param_groups[0]["weight_decay"] = len(names)  # other stages have as many, but for the last one

        made.register_step_post_hook(part)
        return made

    pipe = pipeline(LocalCluster(2), model=model(), optimizer=factory, undo="off", balance=[1, 3])
    with pytest.raises(rp.ModelError, match=r"(?s)from all its parameters together.*applied on stages 0, 1") as e:
        pipe.train_step(*next(batches(1, 24)))
    assert "rolled back" not in str(e.value)


def test_a_ctrl_c_in_an_update_comes_once_the_step_is_done() -> None:
    made = fault(lambda: signal.raise_signal(signal.SIGINT))
    pipe = pipeline(LocalCluster(2), model=model(), optimizer=lambda ps: Hooked(ps, made), undo="off")
    first, second, third = batches(3, 24)
    pipe.train_step(*first)
    made.armed = True
    with pytest.raises(KeyboardInterrupt):
        pipe.train_step(*second)
    assert pipe.trained == 2
    pipe.train_step(*third)
    assert same(pipe.state_dict(), trained(3).state_dict())


def test_a_step_by_hand_that_is_given_up_after_its_update_is_done() -> None:
    pipe, alone = pipeline(LocalCluster(2), model=model(), undo="off"), pipeline(LocalCluster(2), model=model())
    first, second = batches(2, 24)
    with pytest.raises(ZeroDivisionError):
        step_by_hand(pipe, first, ZeroDivisionError())
    assert pipe.trained == 1
    for batch in (first, second):
        alone.train_step(*batch)
    pipe.train_step(*second)
    assert same(pipe.state_dict(), alone.state_dict())


def test_a_worker_that_dies_in_an_update_is_replaced_and_the_pipeline_says_what_is_apart(tmp_path: Path) -> None:
    cluster = MortalCluster(2, 0)

    def die() -> None:
        cluster.kill("worker1")
        raise RuntimeError("nobody hears this")

    made = fault(die)
    pipe = pipeline(cluster, model=model(), optimizer=lambda ps: Hooked(ps, made), undo="off")
    first, second, third, fourth = batches(4, 24)
    pipe.train_step(*first)
    pipe.train_step(*second)
    pipe.save(tmp_path)
    made.armed = True
    with pytest.raises(rp.WorkerLost, match=r"(?s)worker1 has died.*applied on stage 0 \(worker0\); begun"):
        pipe.train_step(*third)
    with pytest.raises(rp.errors.StateError, match="begun and not ended on stage 1"):
        pipe.train_step(*third)
    pipe.load(tmp_path)
    for batch in (third, fourth):
        pipe.train_step(*batch)
    assert cluster.deaths == 1
    assert same(pipe.state_dict(), trained(4).state_dict())


@pytest.mark.parametrize("dies", [True, False])
def test_a_torn_update_goes_back_to_the_newest_snapshot(dies: bool) -> None:
    cluster = MortalHosts(2, 0)

    def act() -> None:
        if dies:
            cluster.lose_host("worker1")
        fail()

    made = fault(act)
    pipe = pipeline(cluster, model=model(), optimizer=lambda ps: Hooked(ps, made), undo="off")
    fed = list(batches(8, 24))
    for number, batch in enumerate(fed):
        made.armed = number == 5
        if number == 5 and not dies:
            with pytest.raises(RuntimeError, match=r"(?s)went back to the newest snapshot: no weight has changed"):
                pipe.train_step(*batch)
        pipe.train_step(*batch)
    assert pipe.runtime.history.restored == 1
    assert same(pipe.state_dict(), trained(8).state_dict())


@pytest.mark.parametrize("name", ["adamw", "accumulate", "sharded", "batchnorm", "float16"])
@pytest.mark.timeout(120)
def test_deaths_heal_and_where_one_tears_an_update_the_checkpoint_before_goes_on(name: str, tmp_path: Path) -> None:
    workers = 2 * OPTIONS[name].get("replicas", 1)
    expected, after, turns = train_alive(name)
    cluster = MortalCluster(workers, list(OPTIONS).index(name), rarity=turns)
    pipe = pipeline(cluster, **OPTIONS[name], **OFF, model=model())
    scheduler = torch.optim.lr_scheduler.StepLR(pipe.optimizer, 2, 0.5)
    fed, losses, saved, torn = list(batches(8, 24)), list[float](), 0, 0
    while len(losses) < len(fed):
        if pipe.runtime.progress.done == 0:
            saved = len(losses)
            pipe.save(tmp_path, stateful={"scheduler": scheduler})
        cluster.deadly = True
        try:
            losses.append(pipe.train_step(*fed[len(losses)]).loss)
            scheduler.step()
        except rp.WorkerLost:
            cluster.deadly, torn = False, torn + 1
            pipe.load(tmp_path, stateful={"scheduler": scheduler})
            pipe.optimizer.zero_grad()
            del losses[saved:]
        cluster.deadly = False
    assert losses == [loss for _, loss, *_ in expected]
    assert same(pipe.state_dict(), after)
    assert cluster.deaths > torn


def test_a_worker_that_dies_in_a_call_may_have_changed_anything(tmp_path: Path) -> None:
    cluster = MortalCluster(2, 0)
    pipe = pipeline(cluster, model=model(), undo="off")
    first, second = batches(2, 24)
    pipe.train_step(*first)
    pipe.save(tmp_path)
    cluster.kill("worker1")
    with pytest.raises(rp.WorkerLost, match="died in a call that may have changed its stages"):
        pipe.stages[1].call(lambda module: None)
    with pytest.raises(rp.errors.StateError, match=r"pipe\.load"):
        pipe.train_step(*second)
    pipe.load(tmp_path)
    alone = pipeline(LocalCluster(2), model=model())
    for batch in (first, second):
        alone.train_step(*batch)
    pipe.train_step(*second)
    assert same(pipe.state_dict(), alone.state_dict())
