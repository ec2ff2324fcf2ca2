"""What a driver's calls say where, or when, they cannot work; the job that is there goes on."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import rpcpipe as rp

MODULE = """
import rpcpipe as rp
def work():
    return 7
cluster = rp.launch(workers=1)
"""


def test_a_launch_on_a_worker_is_refused(cluster: rp.Cluster, tmp_path: Path) -> None:
    """Also by a module that the worker imports; the worker lives on."""
    pid = cluster.call(1, os.getpid)
    (tmp_path / "launches_when_imported.py").write_text(MODULE)

    def load() -> None:
        sys.path.insert(0, str(tmp_path))
        try:
            __import__("launches_when_imported")
        finally:
            sys.path.remove(str(tmp_path))

    for call in (load, lambda: rp.launch(workers=1), rp.connect):
        with pytest.raises(rp.StageError, match=r"was called on the worker worker0-\d+ .*only the driver makes"):
            cluster.call(1, call)
    assert cluster.call(1, os.getpid) == pid


def test_a_limit_of_open_files_that_is_too_low_is_named() -> None:
    """And nothing has been started; with what it says the same launch works."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    rp.launch(workers=1, threads=1).close()
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
        with pytest.raises(rp.StateError, match=r"may open \d+ files \(ulimit -n\)") as caught:
            rp.launch(workers=2, threads=1)
        enough = int(str(caught.value).partition("`ulimit -n ")[2].partition("`")[0])
        resource.setrlimit(resource.RLIMIT_NOFILE, (enough, hard))
        with rp.launch(workers=2, threads=1) as cluster:
            assert cluster.call(2, max, 1, 2) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SHUT_DOWN = """
import rpcpipe as rp
from torch.distributed import rpc
cluster = rp.launch(workers=1, threads=1)
rpc.shutdown(graceful=False)
try:
    cluster.call(1, max, 1, 2)
except rp.StateError as error:
    print(error)
cluster.close()
with rp.launch(workers=2, threads=1) as cluster:
    print(cluster.call(2, max, 1, 2))
"""


def test_torchs_shutdown_by_the_user() -> None:
    done = subprocess.run([sys.executable, "-c", SHUT_DOWN], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "torch RPC was shut down here, by torch.distributed.rpc.shutdown()" in done.stdout
    assert done.stdout.splitlines()[-1] == "2"
    assert "Traceback" not in done.stderr
