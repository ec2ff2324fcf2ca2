"""Which worker holds which stage of which replica."""

from __future__ import annotations

from rpcpipe.driver.layout import Layout


def test_layout() -> None:
    layout = Layout(tuple("abcdef"), 3)
    assert layout.pipeline_size == 2
    assert [layout.replicas_of(worker) for worker in range(2)] == [tuple("abc"), tuple("def")]
    assert [layout.pipeline_of(replica) for replica in range(3)] == [tuple("ad"), tuple("be"), tuple("cf")]
    assert layout.index("e") == (1, 1)
    assert layout.replica_of("z") is None
