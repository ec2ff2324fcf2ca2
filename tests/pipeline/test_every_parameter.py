"""Every public parameter with values of every kind: taken as documented, or refused with the parameter's name."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config

import rpcpipe as rp
from rpcpipe.cluster.cluster import Cluster
from support.local_cluster import LocalCluster
from support.models import batches, cross_entropy, mlp, sgd
from support.wrong_values import Call

launching = importlib.import_module("rpcpipe.cluster.launch")
connecting = importlib.import_module("rpcpipe.cluster.connect")
[BATCH] = batches(1)


def pipeline(**arguments: Any) -> rp.Pipeline:
    given = {"model": mlp(4, dropout=0.0), "cluster": LocalCluster(2), "loss": cross_entropy, "optimizer": sgd}
    given |= {"chunks": 2} | arguments
    return rp.Pipeline(given.pop("model"), given.pop("cluster"), **given)


@functools.cache
def pipe() -> rp.Pipeline:
    return pipeline()


def of_pipe(method: str) -> Callable[..., Any]:
    """Return a function that calls ``method`` of a pipeline, and runs what it returns to its end."""

    def run(**arguments: Any) -> Any:
        found = getattr(pipe(), method)(**arguments)
        return list(found) if method in ("train", "predict") else found

    return run


def launch(**arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launching, "_start", lambda *given: SimpleNamespace(workers=[], spares=[]))
        patch.setattr(launching.templates, "prepare", lambda environment: None)
        patch.setattr(launching, "live", launching.LiveCluster())
        return rp.launch(**arguments)


def connect(**arguments: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(connecting, "_listen_interface", lambda *given: SimpleNamespace(name="lo", address="127.0.0.1"))
        patch.setattr(connecting, "_gather", lambda *given: SimpleNamespace(workers=[], spares=[]))
        patch.setattr(connecting, "live", launching.LiveCluster())
        for name, value in {"RANK": 0, "WORLD_SIZE": 3, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}.items():
            patch.setenv(name, str(value))
        return rp.connect(**arguments)


def of_cluster(method: str) -> Callable[..., Any]:
    """Return a function that calls ``method`` of a cluster of two workers, of which it gets as far as its checks."""

    def run(**arguments: Any) -> Any:
        class Stub(Cluster):
            workers = spares = ()  # type: ignore[assignment]
            _supervisor: Any = SimpleNamespace(add=lambda count: (), remove=lambda names: None, replace=lambda: ())
            _inherited = _closed = False  # type: ignore[assignment]
            check = _check_open = lambda self: None  # type: ignore[assignment]

        cluster = Stub.__new__(Stub)
        cluster.workers, cluster.spares = tuple(LocalCluster(2).workers), ()  # type: ignore[misc]
        return getattr(cluster, method)(*arguments.values())

    return run


def save(**arguments: Any) -> Path:
    return pipe().save(**{"directory": os.environ["SAVED"], **arguments})


def load(**arguments: Any) -> Any:
    return pipe().load(**{"directory": os.environ["SAVED"], **arguments})


def resize(**arguments: Any) -> None:
    pipeline(loss=None, optimizer=None).resize(**arguments)


def plan(**arguments: Any) -> Any:
    given = {"model": mlp(2), "sample": BATCH[0], "workers": 2, "flops": 1e9, "chunks": [2]}
    return rp.plan(**{**given, "schedules": ["1f1b"], "checkpoints": ["never"], **arguments})


def simulate(**costs: Any) -> Any:
    return rp.schedules.get("1f1b", 2, 2).simulate(rp.schedules.Costs(**costs))


def timeline() -> Any:
    return rp.schedules.get("1f1b", 2, 2).simulate()


INPUTS, TARGETS = BATCH
GPT2 = GPT2Config(vocab_size=8, n_embd=4, n_layer=1, n_head=1, n_positions=8)
IDS = torch.zeros(1, 2, dtype=torch.long)
NUMBER, NONNEGATIVE = "1.5 inf", "0 1.5"
COSTS = dict.fromkeys(
    ("forward", "input_gradient", "weight_gradient", "output_bytes", "recompute_seconds", "send_overhead", "optimizer",
     "action_overhead", "receive_overhead", "latency"), NONNEGATIVE,
)  # fmt: skip
CALLS: dict[str, Call] = {
    "launch": Call(launch, {"workers": 2}, {
        "workers": "", "device": "", "threads": "None", "timeout": "1.5", "log_dir": "None 'x'", "spares": "0",
        "heal": "0 True",
    }),
    "connect": Call(connect, {}, {"timeout": "1.5", "bind": "None 'x'", "log_dir": "None 'x'", "heal": "0 True"}),
    "Pipeline": Call(pipeline, {}, {
        "model": "", "cluster": "", "loss": "", "optimizer": "None", "schedule": "", "chunks": "", "balance": "",
        "checkpoint": "0", "virtual_stages": "", "replicas": "", "shard_optimizer": "True", "weights": "None",
        "flush_every": "None", "clip_grad_norm": "None 1.5 inf", "nonfinite": "", "seed": "-1 0", "dispatch": "",
        "autocast": "None", "accumulate": "", "batch_norm": "", "undo": "", "plan": "None",
    }, {"model": "model|layer 0"}),
    "train_step": Call(of_pipe("train_step"), {"inputs": INPUTS, "targets": TARGETS}, {
        "inputs": "", "targets": "", "metrics": "None", "outputs": "True",
    }),
    "train": Call(of_pipe("train"), {"batches": []}, {"batches": "[]", "progress": "True", "ahead": "0"}),
    "evaluate": Call(of_pipe("evaluate"), {"batches": [BATCH]}, {"batches": "", "metrics": "None"}),
    "predict": Call(of_pipe("predict"), {}, {"batches": "[]"}),
    "pipe(…)": Call(of_pipe("__call__"), {}, {"inputs": ""}),
    "state_dict": Call(of_pipe("state_dict"), {}, {"trainable": "True"}),
    "load_state_dict": Call(of_pipe("load_state_dict"), {}, {"state_dict": ""}),
    "on_step": Call(of_pipe("on_step"), {}, {"callback": "'x'"}),
    "save": Call(save, {}, {"directory": "'x'", "stateful": "None", "keep": "None"}),
    "load": Call(load, {}, {"directory": "", "stateful": "None", "missing_ok": "True"},
                 {"directory": "directory|no checkpoint in"}),
    "resize": Call(resize, {}, {"workers": "None", "balance": "", "replicas": "None", "plan": "None"}),
    "verify": Call(
        lambda **given: rp.verify(**{"pipe": pipe(), "inputs": INPUTS, "targets": TARGETS, "steps": 1} | given), {},
        {"pipe": "", "inputs": "", "targets": "", "steps": ""},
    ),
    "generate": Call(
        lambda **given: rp.generate(**{"pipe": pipe(), "prompts": IDS, "new_tokens": 0} | given), {},
        {"pipe": "", "prompts": "[]", "new_tokens": "0", "temperature": NONNEGATIVE, "top_k": "None",
         "seed": "-1 0", "context": "None", "stop": "None -1 0", "inputs": "None", "logits": "None", "cache": "None"},
        {"prompts": "prompt"},
    ),
    "plan": Call(plan, {}, {
        "model": "", "sample": "", "workers": "", "memory": "None inf", "loss": "None", "targets": "None",
        "optimizer": "None", "moments": "0", "chunks": "None", "schedules": "", "checkpoints": "", "replicas": "None",
        "flops": "None 1.5", "latency": "None 0 1.5", "bandwidth": "None 1.5 inf", "seed": "-1 0",
        "undo": "None",
    }, {"model": "model|layer 0", "memory": "memory|no schedule"}),
    "plan by measuring": Call(plan, {"flops": None}, {
        "loss": "None", "optimizer": "None", "device": "", "autocast": "None",
    }),
    "from_transformers": Call(
        lambda **given: rp.from_transformers(**{"config_or_model": GPT2, "cluster": LocalCluster(2)} | given), {},
        {"config_or_model": "", "cluster": "", "stages": "None", "config": "None"},
        {"config_or_model": "from_transformers takes|from_transformers downloads"},
    ),
    "schedules.get": Call(rp.schedules.get, {"name": "1f1b", "workers": 2, "chunks": 2}, {
        "name": "", "workers": "", "chunks": "", "virtual_stages": "",
    }, {"name": "schedule"}),
    "schedules.describe": Call(rp.schedules.describe, {}, {"name": ""}, {"name": "schedule"}),
    "bubble_fraction": Call(rp.bubble_fraction, {"stages": 2, "chunks": 2}, {"stages": "", "chunks": ""}),
    "optimal_microbatches": Call(rp.optimal_microbatches, {"num_stages": 2}, {
        "num_stages": "", "target_bubble_rate": "",
    }),
    "Costs": Call(simulate, {}, {**COSTS, "bandwidth": NUMBER, "cores": "None 1.5 inf", "backward": "None 0 1.5"}),
    "simulate": Call(rp.schedules.get("1f1b", 2, 2).simulate, {}, {"costs": "None"}),
    "from_csv": Call(rp.Schedule.from_csv, {}, {"text": ""}, {"text": "text|'x'|actions"}),
    "to_text": Call(timeline().to_text, {}, {"width": ""}),
    "Timeline.save": Call(timeline().save, {}, {"path": ""}, {"path": "path|x"}),
    "balance_by_parameters": Call(rp.balance_by_parameters, {"model": mlp(4), "stages": 2}, {"model": "", "stages": ""},
                                  {"model": "model|layer 0"}),
    "balance_by_time": Call(rp.balance_by_time, {"model": mlp(4), "stages": 2, "sample": INPUTS},
                            {"stages": "", "sample": ""}),
    "split": Call(rp.split, {"model": nn.Linear(12, 4), "sample": INPUTS}, {"model": "", "sample": ""}),
    "Cluster.call": Call(of_cluster("call"), {"worker": "worker0", "function": os.getpid}, {
        "worker": "", "function": "",
    }),
    "Cluster.call_all": Call(of_cluster("call_all"), {"function": os.getpid}, {"function": ""}),
    "Cluster.add_workers": Call(of_cluster("add_workers"), {}, {"count": ""}),
    "Cluster.remove_workers": Call(of_cluster("remove_workers"), {}, {"workers": ""}, {"workers": "worker"}),
    "LayerSpec": Call(rp.LayerSpec, {"cls": nn.Linear}, {"cls": "", "tied": "None 'x'"}),
    "Wired": Call(rp.Wired, {"layer": nn.Linear(1, 1)}, {"layer": "", "takes": "'x' []", "gives": "'x' []"},
                  {"layer": "Wired takes"}),
    "Batched": Call(rp.Batched, {"value": INPUTS, "dim": 0}, {"dim": "-1 0"}),
    "MicroBatches": Call(rp.MicroBatches, {"parts": [INPUTS]}, {"parts": "", "weights": "None"},
                         {"parts": "parts|micro-batch"}),
    "RemoteBatches": Call(rp.RemoteBatches, {"make": list}, {"make": "", "start": "0", "seed": "0"}),
    "RemoteBatches.batch": Call(rp.RemoteBatches(list).batch, {}, {"number": "0"}),
    "RemoteBatches.inputs": Call(rp.RemoteBatches(list).inputs, {}, {"number": "0"}),
    "view": Call(lambda **given: rp.view(**{"pipe": pipe()} | given).close(), {}, {"pipe": "", "port": "0"}),
    "JsonLines": Call(rp.callbacks.JsonLines, {}, {"path": "'x'"}),
    "TensorBoard": Call(rp.callbacks.TensorBoard, {}, {"directory": "'x'"}),
}  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _in_a_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("parameters")
        patch.chdir(folder)
        patch.setenv("SAVED", str(folder / "saved"))
        pipe().save(folder / "saved")
        yield


@pytest.mark.parametrize("name", CALLS)
def test_every_parameter_is_taken_or_refused_by_its_name(name: str) -> None:
    call = CALLS[name]
    wrong = {f"{parameter}={value}": call.complaint(parameter, value) for parameter, value in call.cases()}
    assert {case: complaint for case, complaint in wrong.items() if complaint} == {}


def test_afterwards_a_step_has_its_bits() -> None:
    [other], untouched = batches(1), pipeline()
    pipe().load_state_dict(untouched.state_dict())
    pipe().trained = untouched.trained
    assert pipe().train_step(*other).loss == untouched.train_step(*other).loss


HUGE = 10**9


def test_nothing_is_built_for_huge_sizes() -> None:
    """Each is refused at once; built, they would take the machine's memory."""
    model, made = mlp(4), pipeline()
    calls: dict[str, Callable[[], Any]] = {
        "chunks=": lambda: pipeline(chunks=HUGE),
        "chunks= ": lambda: setattr(made, "chunks", HUGE),
        "virtual_stages=": lambda: pipeline(schedule="interleaved", virtual_stages=HUGE),
        "replicas": lambda: pipeline(replicas=HUGE),
        "workers": lambda: launch(workers=HUGE),
        "spares": lambda: launch(workers=1, spares=HUGE),
        "threads": lambda: launch(workers=1, threads=HUGE),
        "timeout": lambda: launch(workers=1, timeout=1e300),
        "WORLD_SIZE|timeout": lambda: connect(timeout=10**400),
        "workers ": lambda: rp.schedules.get("1f1b", HUGE, 2),
        "chunks=  ": lambda: rp.schedules.get("gpipe", 2, HUGE),
        "width": lambda: timeline().to_text(HUGE),
        "stages": lambda: rp.balance_by_parameters(model, HUGE),
        "workers  ": lambda: plan(workers=HUGE),
        "replicas ": lambda: plan(replicas=HUGE),
        "count": lambda: of_cluster("add_workers")(count=HUGE),
    }
    for name, call in calls.items():
        with pytest.raises(rp.RpcPipeError, match=name.strip()):
            call()
    assert made.chunks == 2
