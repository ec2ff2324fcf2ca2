"""Saving on real processes: a full disk, Ctrl-C, kills."""

from __future__ import annotations

import os
import random
import resource
import signal
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.checkpoint import directory as checkpoints
from support.killed_saves import Kills
from support.models import adamw, batches, cross_entropy, mlp
from support.saving import contents


@pytest.fixture
def pipe(cluster: rp.Cluster) -> Iterator[rp.Pipeline]:
    made = rp.Pipeline(mlp(width=64), cluster, loss=cross_entropy, optimizer=adamw, chunks=3)
    yield made
    made.close()


def limit_files(module: nn.Module, size: int) -> None:
    """From now on no file of this process may be larger: as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def test_a_worker_that_cannot_write_is_named_and_the_checkpoint_before_stays(pipe: rp.Pipeline, tmp_path: Path) -> None:
    data = list(batches(3, width=64))
    pipe.train_step(*data[0])
    first, before = pipe.save(tmp_path), pipe.state_dict()
    pipe.train_step(*data[1])
    pipe.stages[2].call(partial(limit_files, size=4096))
    with pytest.raises(rp.CheckpointError, match=r"^worker2 on .*: cannot write .*model-00003-of-00004.*large"):
        pipe.save(tmp_path)
    assert contents(tmp_path) == [first]
    pipe.stages[2].call(partial(limit_files, size=resource.RLIM_INFINITY))
    pipe.load(tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())
    pipe.train_step(*data[2])
    pipe.save(tmp_path)


def test_a_pipe_among_the_files_is_refused_and_the_workers_live(pipe: rp.Pipeline, tmp_path: Path) -> None:
    folder, pids = pipe.save(tmp_path), [worker.pid for worker in pipe.cluster.workers]
    (folder / "model-00003-of-00004.safetensors").unlink()
    os.mkfifo(folder / "model-00003-of-00004.safetensors")
    before = pipe.state_dict()
    with pytest.raises(rp.CheckpointError, match=r"^worker2 on .*model-00003-of-00004.* it is no regular file \(prw"):
        pipe.load(tmp_path)
    assert [worker.pid for worker in pipe.cluster.workers] == pids
    assert all(torch.equal(value, before[name]) for name, value in pipe.state_dict().items())


def test_ctrl_c_in_a_save_leaves_it_done_or_not_done_and_the_pipeline_usable(pipe: rp.Pipeline, tmp_path: Path) -> None:
    draw, data, interrupted, done = random.Random(2), list(batches(4, width=64)), 0, 0
    pipe.save(tmp_path, position=0)
    for attempt in range(1, 21):
        pipe.train_step(*data[attempt % 4])
        before = checkpoints.newest(tmp_path)
        timer = threading.Timer(draw.uniform(0.0, 0.05), os.kill, (os.getpid(), signal.SIGINT))
        try:
            timer.start()
            pipe.save(tmp_path, position=attempt, keep=1)
            timer.join()
            time.sleep(0)  # it comes here at the latest
        except KeyboardInterrupt:
            interrupted += 1
            done += checkpoints.newest(tmp_path) != before
    assert interrupted == 20
    assert done < 20, "none came in time"
    state, trained = pipe.state_dict(), pipe.trained
    pipe.save(tmp_path, position="end", keep=1)
    assert len(contents(tmp_path)) == 1
    assert pipe.load(tmp_path) == "end"
    assert pipe.trained == trained
    assert all(torch.equal(value, state[name]) for name, value in pipe.state_dict().items())


def test_ctrl_c_in_a_load_leaves_all_of_one_state(pipe: rp.Pipeline, tmp_path: Path) -> None:
    draw, data, loaded = random.Random(4), list(batches(4, width=64)), 0
    pipe.train_step(*data[0])
    states = {pipe.trained: pipe.state_dict()}
    pipe.save(tmp_path)
    for attempt in range(1, 16):
        pipe.train_step(*data[attempt % 4])
        before = pipe.trained
        states[before] = pipe.state_dict()
        timer = threading.Timer(draw.uniform(0.0, 0.1), os.kill, (os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):  # noqa: PT012
            timer.start()
            pipe.load(tmp_path)
            timer.join()
            time.sleep(0)  # it comes here at the latest
        assert pipe.trained in (1, before)
        loaded += pipe.trained == 1
        assert all(torch.equal(value, states[pipe.trained][name]) for name, value in pipe.state_dict().items())
    assert loaded > 0
    pipe.load(tmp_path)
    assert pipe.trained == 1


@pytest.mark.parametrize("victim", ["driver", "worker"])
def test_a_run_killed_at_a_random_moment_goes_on(tmp_path: Path, victim: str) -> None:
    """As in ./benchmarks/run checkpoints, which was run for a hundred of them."""
    kills = Kills(tmp_path / "run", seed=11)
    kills.round(victim)
    assert kills.steps >= 1
