"""Forward only on real processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.models import batches, cross_entropy, mlp, sgd


def test_metrics_of_a_script_on_real_workers(cluster: rp.Cluster) -> None:
    class Local:
        def __call__(self, output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, int]:
            return (output.argmax(-1) == target).sum(), len(target)

    pipe = rp.Pipeline(mlp(), cluster, loss=cross_entropy, optimizer=sgd, chunks=3)
    data = list(batches(5, 7))
    with torch.no_grad():
        hits = sum(int((mlp().eval()(x).argmax(-1) == y).sum()) for x, y in data)
    assert pipe.evaluate(data, {"accuracy": Local()})["accuracy"] == pytest.approx(hits / 35)
    assert (
        nn.functional.mse_loss(torch.cat(list(pipe.predict(x for x, _ in data))), torch.cat([pipe(x) for x, _ in data]))
        == 0
    )
    pipe.close()
