"""Which worker holds which stage of which replica, and which part of a batch it gets."""

from __future__ import annotations

import torch

from rpcpipe.driver.layout import Layout


def test_layout() -> None:
    layout = Layout(tuple("abcdef"), 3)
    assert layout.pipeline_size == 2
    assert [layout.replicas_of(worker) for worker in range(2)] == [tuple("abc"), tuple("def")]
    assert [layout.pipeline_of(replica) for replica in range(3)] == [tuple("ad"), tuple("be"), tuple("cf")]
    assert layout.index("e") == (1, 1)
    assert layout.replica_of("z") is None
    shares = layout.cut({"x": torch.arange(7), "flag": True}, 2)
    assert [[part["x"].tolist() for part in share] for share in shares] == [[[0, 1], [2]], [[3, 4], [5]], [[6]]]
    assert [len(share) for share in layout.cut(torch.arange(1), 2)] == [1, 0, 0]
