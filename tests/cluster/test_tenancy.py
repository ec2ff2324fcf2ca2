"""What a snapshot must not die with."""

from __future__ import annotations

from dataclasses import replace

from rpcpipe.cluster.tenancy import kept_apart
from rpcpipe.planning.loss_cost import keepers
from support.mortal_hosts import MortalHosts


def test_a_snapshot_is_kept_on_another_machine_if_there_is_one_and_else_by_another_agent() -> None:
    cluster = MortalHosts(4)  # of each worker an agent of its own
    names = [worker.name for worker in cluster.workers]
    assert kept_apart(cluster, names) == ["host1", "host2", "host3", "host4"]
    cluster.workers = [replace(worker, host="ab"[at // 2]) for at, worker in enumerate(cluster.workers)]
    assert kept_apart(cluster, names) == ["a", "a", "b", "b"]
    assert keepers(kept_apart(cluster, names)) == [2, 3, 0, 1]  # the next in turn would be on the same machine
    assert kept_apart(cluster, names[:2]) == ["host1", "host2"]
