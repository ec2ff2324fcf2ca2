"""The layers of the design: who may import what, and how large anything may grow."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "rpcpipe"
FILES = sorted(ROOT.rglob("*.py"))
# From the bottom up: a package imports what stands before it, and itself.
LAYERS = [
    "errors", "_tables", "schedules", "planning", "transport", "model", "stage", "checkpoint", "cluster", "worker",
    "driver", "pipeline", "__init__", "__main__",
]  # fmt: skip
NO_TORCH = ("errors", "_tables", "schedules", "planning")


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    """Those inside of functions and under TYPE_CHECKING, too."""
    own = LAYERS.index(module_of(path))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "rpcpipe" and len(parts) > 1 and parts[1] in LAYERS:
            assert LAYERS.index(parts[1]) <= own, f"{path.relative_to(ROOT)} imports {name}"


@pytest.mark.parametrize("path", [path for path in FILES if module_of(path) in NO_TORCH], ids=lambda path: path.name)
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


TESTS = Path(__file__).parent
TEST_FILES = sorted(TESTS.rglob("*.py"))


def test_test_files_stay_small() -> None:
    sizes = {str(path.relative_to(TESTS)): len(path.read_text().splitlines()) for path in TEST_FILES}
    assert {name: size for name, size in sizes.items() if size > 400} == {}


def test_test_modules_share_code_through_support_only() -> None:
    """Their names are unique, as pytest imports them without packages."""
    names = [path.stem for path in TEST_FILES if path.name.startswith("test_")]
    assert len(names) == len(set(names))
    for path in TEST_FILES:
        assert not imports(path) & set(names), f"{path.relative_to(TESTS)} imports a test module"
