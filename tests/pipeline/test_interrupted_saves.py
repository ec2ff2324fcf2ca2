"""A save that is killed between any two calls of the file system."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from support.models import batches
from support.saving import contents, make


class Moments:
    """Copies of ``folder`` as it is before each file system call of the block: what a kill there leaves."""

    def __init__(self, folder: Path, copies: Path) -> None:
        self.folder, self.copies = folder, copies
        self.taken: list[Path] = []
        self._active = False

    def __enter__(self) -> Moments:
        self._active = True
        sys.addaudithook(self._hook)  # for ever, so it has a switch
        return self

    def __exit__(self, *_: object) -> None:
        self._active = False

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._active and (event.startswith("os.") or event in ("open", "shutil.rmtree")):
            self._active = False  # copying is made of such calls as well
            copy = self.copies / f"{len(self.taken):04}"
            shutil.copytree(self.folder, copy)
            self.taken.append(copy)
            self._active = True


def test_a_kill_between_any_two_calls_leaves_the_checkpoint_before_or_the_new_one(tmp_path: Path) -> None:
    pipe, directory = make(2), tmp_path / "run"
    states = {}
    for batch in batches(2):
        pipe.train_step(*batch)
        states[pipe.trained] = pipe.state_dict()
        if pipe.trained == 1:
            pipe.save(directory)
    with Moments(directory, tmp_path) as moments:
        pipe.save(directory, keep=1)
    assert len(moments.taken) > 20
    loaded = []
    for left in moments.taken:
        pipe.load(left)
        loaded.append(pipe.trained)
        assert all(torch.equal(value, states[pipe.trained][name]) for name, value in pipe.state_dict().items())
        pipe.save(left, keep=1)
        assert len(contents(left)) == 1
    assert loaded == sorted(loaded)
    assert set(loaded) == {1, 2}
