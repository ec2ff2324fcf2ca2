"""The layers of the design: who may import what, and how large anything may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "rpcpipe"
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = [
    {
        "errors",
        "schedules",
        "simulate",
        "timeline",
        "render",
        "partition",
        "versions",
        "wires",
        "memory",
        "sharing",
        "profiles",
        "search",
        "estimates",
        "planner",
        "transformer",
    }
    | {"interrupts", "tables", "storage", "logs", "handshake", "place", "pickling", "spawner", "template"},
    {
        "messages",
        "microbatch",
        "metrics",
        "rng",
        "layers",
        "flow",
        "ties",
        "backward",
        "split_backward",
        "gradients",
        "undo",
        "precision",
        "accumulation",
        "batchnorm",
        "snapshots",
        "activations",
        "recompute",
        "profiler",
        "balance",
        "chain",
        "weights",
        "optimizer",
        "encoding",
        "tensorfile",
        "manifest",
        "exchange",
        "mailbox",
        "process",
        "forkserver",
        "channel",
        "watch",
        "door",
    },
    {"stage", "shard", "holdings", "actor", "executor", "program", "transport"},
    {"driver", "group", "formation", "cluster", "launch", "connect", "agent", "worker"}
    | {"result", "tracking", "trace", "handle", "arguments", "replicas"},
    {
        "core",
        "pipeline",
        "planning",
        "step",
        "stream",
        "building",
        "feeding",
        "snapshot",
        "saving",
        "moving",
        "inference",
        "generation",
        "hf",
        "cli",
        "doctor",
        "__main__",
        "__init__",
    },
]


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> int:
    return next(index for index, names in enumerate(LAYERS) if module in names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_lower_layers_never_import_higher_ones(path: Path) -> None:
    mine = layer_of(module_of(path))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "rpcpipe" and len(parts) > 1 and (ROOT / parts[1]).with_suffix("").name != "__init__":
            known = [index for index, names in enumerate(LAYERS) if parts[1] in names]
            assert not known or known[0] <= mine, f"{path.name} (layer {mine}) imports {name} (layer {known[0]})"


@pytest.mark.parametrize("path", [path for path in FILES if layer_of(module_of(path)) == 0], ids=lambda path: path.name)
def test_what_decides_imports_no_torch(path: Path) -> None:
    assert not [name for name in imports(path) if name.split(".")[0] == "torch"]


def test_only_the_rpc_transport_imports_torch_rpc() -> None:
    for path in FILES:
        used = [n for n in imports(path) if n.startswith(("torch.distributed.rpc", "torch.distributed.autograd"))]
        assert not used or path == ROOT / "transport" / "rpc.py", f"{path} imports {used}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
