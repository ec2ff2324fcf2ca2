#!/usr/bin/env bash
# A driver and two workers as on three hosts, here all on this one: each process is told by its environment who it is.
# On real hosts run one of the three commands on each, with MASTER_ADDR the driver's and RPCPIPE_BIND the network's
# interface or CIDR (docs/guide/multi-host.md).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
python="${PYTHON:-python}"
port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export WORLD_SIZE=3 MASTER_ADDR=127.0.0.1 MASTER_PORT="${MASTER_PORT:-$port}"
RPCPIPE_SECRET="$("$python" -c 'import secrets; print(secrets.token_hex(32))')" && export RPCPIPE_SECRET

RANK=1 "$python" -m rpcpipe.worker & first=$!
RANK=2 "$python" -m rpcpipe.worker & second=$!
trap 'kill "$first" "$second" 2>/dev/null || true' EXIT
RANK=0 "$python" - <<'PY'
import torch
from torch import nn

import rpcpipe as rp

model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))
with rp.connect(timeout=60) as cluster:  # the only line that differs from one host
    print(cluster)
    pipe = rp.Pipeline(
        model, cluster, chunks=8, loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
    )
    x = torch.randn(64, 16)
    for _ in range(20):
        result = pipe.train_step(x, x[:, :4].argmax(1))
    print(f"loss {result.loss:.3f}")
PY
wait "$first" "$second"
trap - EXIT
echo "all three ended with status 0"
