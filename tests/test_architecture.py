"""The layers of the design: who may import what, and how large anything may grow."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import rpcpipe as rp
from rpcpipe.schedules.weight_versions import POLICIES

ROOT = Path(__file__).parent.parent / "src" / "rpcpipe"
FILES = sorted(ROOT.rglob("*.py"))
# From the bottom up: a package imports what stands before it, and itself.
LAYERS = [
    "errors", "_arguments", "_tables", "schedules", "planning", "transport", "model", "stage", "checkpoint", "cluster",
    "worker", "driver", "pipeline", "view", "__init__", "__main__",
]  # fmt: skip
NO_TORCH = ("errors", "_arguments", "_tables", "schedules", "planning")


def module_of(path: Path) -> str:
    return path.relative_to(ROOT).with_suffix("").parts[0]


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


@functools.cache
def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def needs(path: Path) -> set[Path]:
    """The files of ours that ``path`` imports: of ``from package import module`` the module."""
    found = set()
    for name in imports(path):
        inner = [one for one in imports(path) if one.startswith(f"{name}.") and target(one)]
        if not inner and (file := target(name) or target(name.rpartition(".")[0])):
            found.add(file)
    return found - {path}


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
        reached = "torch._C._distributed" in path.read_text()
        assert not reached or path == ROOT / "transport" / "rpc.py", f"{path} reaches below torch's RPC"


def target(name: str) -> Path | None:
    """The file that ``import name`` means, if it is one of ours."""
    path = ROOT.joinpath(*name.split(".")[1:])
    if not name.startswith("rpcpipe."):
        return None
    return next((one for one in (path.with_suffix(".py"), path / "__init__.py") if one.exists()), None)


def test_no_circle() -> None:
    TopologicalSorter({path: needs(path) for path in FILES}).prepare()  # raises CycleError with the circle


def hidden(tree: ast.Module) -> Iterator[ast.stmt]:
    """The imports that are not at the top of their file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and node not in tree.body:
            yield node


# Extras are imported where they are used first; transformers by all of `hf`, which `from_transformers` imports.
LAZY = (
    "matplotlib",
    "tensorboard",
    "torch.utils.tensorboard",
    "transformers",
    "rpcpipe.model.hf",
    "rpcpipe.view.server",
)


def test_no_import_is_hidden() -> None:
    for path in FILES:
        for node in hidden(parsed(path)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [one.name for one in node.names]  # type: ignore[attr-defined]
            assert all(name.startswith(LAZY) for name in names), f"{path.relative_to(ROOT)}:{node.lineno} {names}"


# Other people's privates, which torch gives no public name for; ``_replace`` and its like are public of named tuples.
FOREIGN = {
    "_version", "_cdata", "_input_metadata", "_init_weights", "_update_group_membership", "_replace", "_asdict",
    "_fields", "_attn_implementation", "_backward_hooks", "_post_accumulate_grad_hooks", "_untyped_storage",
    "_adjust_missing_and_unexpected_keys", "_get_dtype_plan",
}  # fmt: skip
# Those that our classes have too: in these files they are a module's.
OF_MODULES = {
    "_buffers": {"stage/buffers.py", "stage/rollback.py", "worker/kept_signs.py", "worker/revival.py"},
    "_modules": {"model/layers.py", "model/splitting/piece.py", "stage/outputs.py", "stage/trainable.py"},
    "_parameters": {"stage/trainable.py", "worker/kept_signs.py"},
}
MODULES = {
    "torch",
    "rpc",
    "api",
    "dist_autograd",
    "internal",
    "os",
    "sys",
    "_BINDINGS",
    "_AUTOGRAD",
    "_tables",
    "parametrize",
}


def own_members(path: Path) -> set[str]:
    """The names that classes in ``path`` define: methods, fields, and attributes of ``self``."""
    found = set()
    for kind in ast.walk(parsed(path)):
        for node in ast.walk(kind) if isinstance(kind, ast.ClassDef) else ():
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) in ("self", "cls") else set()
            elif isinstance(node, ast.AnnAssign):
                found.add(ast.unparse(node.target))
    return found


def test_foreign_names_are_no_names_of_ours() -> None:
    """Else what is let pass below might be ours."""
    assert {str(path.relative_to(ROOT)): both for path in FILES if (both := own_members(path) & FOREIGN)} == {}


def test_nobody_is_in_anothers_private_rooms() -> None:
    """But for objects of the same class (``other._parts``), which is what the name ``other`` says."""
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                fine = owner in ("self", "cls", "other") or owner.split(".")[0] in MODULES
                fine = fine or node.attr in FOREIGN or name in OF_MODULES.get(node.attr, ())
                assert fine, f"{name}:{node.lineno} {ast.unparse(node)}"


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(parsed(path)) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400
    for node in functions(path):
        assert node.end_lineno is not None
        assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"


def test_half_of_all_functions_are_short() -> None:
    lengths = sorted(node.end_lineno - node.lineno + 1 for path in FILES for node in functions(path) if node.end_lineno)
    assert lengths[len(lengths) // 2] <= 15


def test_constructors_take_eight_parameters_at_most() -> None:
    for path in FILES:
        for node in functions(path):
            arguments = [one.arg for one in (*node.args.args, *node.args.kwonlyargs) if one.arg != "self"]
            if node.name == "__init__" and path != ROOT / "pipeline" / "pipeline.py":
                assert len(arguments) <= 8, f"{path.relative_to(ROOT)}:{node.lineno} {arguments}"


# Users and the planner give the first figures of these by their order, forward, I, W: ``Costs(1, 1, 1)``.
POSITIONAL = {"schedules/costs.py Costs", "planning/layer_cost.py LayerCost"}


def test_dataclasses_of_more_than_eight_fields_are_built_by_keyword() -> None:
    """Of so many values nobody sees which is which."""
    for path in FILES:
        for node in ast.walk(parsed(path)):
            if not isinstance(node, ast.ClassDef) or f"{path.relative_to(ROOT)} {node.name}" in POSITIONAL:
                continue
            made = [ast.unparse(one) for one in node.decorator_list if "dataclass" in ast.unparse(one)]
            fields = [one for one in node.body if isinstance(one, ast.AnnAssign)]
            fine = not made or len(fields) <= 8 or "kw_only=True" in made[0]
            assert fine, f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {len(fields)} fields"


def test_ten_classes_are_public_at_the_top() -> None:
    """Beside the errors; the others are under their package (``rp.schedules.Timeline``)."""
    classes = [one for one in (getattr(rp, name) for name in rp.__all__) if isinstance(one, type)]
    assert len([one for one in classes if not issubclass(one, Exception)]) <= 10


def defaults(tree: ast.Module) -> set[ast.AST]:
    """What parameters and fields are unless they are given."""
    found: set[ast.expr | None] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.arguments):
            found.update(node.defaults, node.kw_defaults)
        elif isinstance(node, ast.AnnAssign):
            found.add(node.value)
    return {node for node in found if node is not None}


def test_no_schedule_is_asked_by_name_where_it_runs_or_is_planned() -> None:
    """It says itself what it needs: ``schedules/`` alone knows names of schedules and of weight policies.

    But for the one that is the default.
    """
    names = {*rp.schedules.names(), *(policy.name for allowed in POLICIES.values() for policy in allowed)}
    for path in FILES:
        if module_of(path) not in ("planning", "stage", "worker", "driver", "pipeline"):
            continue
        tree = parsed(path)
        for node in set(ast.walk(tree)) - defaults(tree):
            found = isinstance(node, ast.Constant) and node.value in names
            assert not found, f"{path.relative_to(ROOT)}:{node.lineno} {ast.unparse(node)}"


# Other types than those of the tree: what is caught again inside of rpcpipe, and what torch's RRef raises.
INTERNAL = {
    "cluster/control_channel.py": {"EOFError", "ValueError"}, "cluster/template.py": {"EOFError", "TemplateError"},
    "model/nest_types.py": {"_Held"}, "transport/local.py": {"RuntimeError"}, "transport/slots.py": {"OSError"},
    "transport/user_pickling.py": {"PicklingError"}, "transport/lane_receiver.py": {"OSError"},
    "checkpoint/files.py": {"OSError"}, "__main__.py": {"ArgumentTypeError"},
    "pipeline/hints.py": {"AttributeError"}, "model/hf/chain.py": {"Reached"}, "model/hf/decoding.py": {"CacheLost"},
    "model/hf/probes.py": {"Reached"}, "model/hf/staged.py": {"Reached"},
    "model/splitting/numbers.py": {"AttributeError"},
}  # fmt: skip


def test_what_users_meet_is_of_the_tree_of_errors() -> None:
    """But for AssertionError and NotImplementedError, which nobody meets. A function may make the error to raise."""
    tree = {name for name, kind in vars(rp.errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
    tree |= {"AuthenticationError", "AssertionError", "NotImplementedError"}
    for path in FILES:
        name = str(path.relative_to(ROOT))
        for node in ast.walk(parsed(path)):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                raised = ast.unparse(node.exc.func).rpartition(".")[2]
                known = raised in tree or raised.lstrip("_")[0].islower() or raised in INTERNAL.get(name, ())
                assert known, f"{name}:{node.lineno} {raised}"


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
