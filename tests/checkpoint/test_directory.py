from __future__ import annotations

import json
from pathlib import Path

import pytest

from rpcpipe.checkpoint import directory as checkpoints
from rpcpipe.checkpoint.lock import LOCK
from rpcpipe.errors import CheckpointError, DeadlineExceeded


def save(directory: Path, step: int, keep: int | None = 2) -> Path:
    with checkpoints.draft(directory) as folder:
        (folder / checkpoints.MANIFEST).write_text(str(step))
        final = checkpoints.publish(folder, step)
    checkpoints.prune(directory, keep)
    return final


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != LOCK)


def test_saves_are_numbered_whatever_their_steps(tmp_path: Path) -> None:
    assert save(tmp_path / "new" / "run", 20) == checkpoints.newest(tmp_path / "new" / "run")
    for step in (40, 30, 30):  # an older one was loaded in between
        final = save(tmp_path, step, keep=None)
        assert checkpoints.newest(tmp_path) == final
    assert checkpoints.newest(tmp_path / "00001-step-000040").name == "00001-step-000040"
    assert names(tmp_path) == ["00001-step-000040", "00002-step-000030", "00003-step-000030", "new"]


def test_only_old_checkpoints_are_deleted(tmp_path: Path) -> None:
    for other in ("best", "step-000001", "00001-step-000001-kept"):
        (tmp_path / other).mkdir()
    (tmp_path / "notes.txt").write_text("")
    for step in range(1, 5):
        save(tmp_path, step, keep=2)
    kept = ["00003-step-000003", "00004-step-000004"]
    assert names(tmp_path) == sorted([*kept, "best", "step-000001", "00001-step-000001-kept", "notes.txt"])


def test_what_does_not_end_leaves_nothing_and_what_was_killed_is_cleaned_up(tmp_path: Path) -> None:
    first = save(tmp_path, 1)
    killed = tmp_path / ".rpcpipe-0123"
    (killed / "sub").mkdir(parents=True)
    with pytest.raises(KeyboardInterrupt), checkpoints.draft(tmp_path) as folder:  # noqa: PT012
        (folder / "model").write_text("half")
        assert not killed.exists()
        raise KeyboardInterrupt
    assert names(tmp_path) == [first.name]


def test_where_another_process_saves_its_draft_stays(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_text(json.dumps({"host": "elsewhere", "pid": 1, "started": 1.0, "since": 1.0}))
    (tmp_path / ".rpcpipe-0123").mkdir()
    with pytest.raises(CheckpointError, match="process 1 on elsewhere saves to"), checkpoints.draft(tmp_path):
        pass
    assert names(tmp_path) == [".rpcpipe-0123"]


def test_refusals_of_the_file_system_name_the_folder(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match=f"cannot save to {file}"), checkpoints.draft(file):
        pass
    # An error of ours that is an OSError as well stays what it is.
    with pytest.raises(DeadlineExceeded), checkpoints.draft(tmp_path):
        raise DeadlineExceeded("a worker")


def test_an_old_checkpoint_that_cannot_be_removed_is_no_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        save(tmp_path, step)

    def refuse(path: Path, target: Path) -> Path:
        raise PermissionError(f"not {path}")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="the new checkpoint is saved, but an old one cannot be removed: not"):
        checkpoints.prune(tmp_path, keep=1)


def test_two_that_save_to_one_folder_do_not_replace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with checkpoints.draft(tmp_path) as folder:
        (folder / checkpoints.MANIFEST).write_text("mine")
        other = tmp_path / "00001-step-000005"
        other.mkdir()
        (other / checkpoints.MANIFEST).write_text("the other's")
        monkeypatch.setattr(checkpoints, "_published", lambda directory: {})  # as it was a moment ago
        with pytest.raises(OSError, match="not empty"):
            checkpoints.publish(folder, 5)
    assert (other / checkpoints.MANIFEST).read_text() == "the other's"


def test_without_a_checkpoint_there_is_no_newest_and_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / ".rpcpipe-0123").mkdir()
    (tmp_path / "00009-step-000001").write_text("")
    assert [checkpoints.newest(folder) for folder in (tmp_path, tmp_path / "nowhere")] == [None, None]
    with pytest.raises(CheckpointError, match="00009-step-000001 cannot be looked into for checkpoints"):
        checkpoints.newest(tmp_path / "00009-step-000001")
