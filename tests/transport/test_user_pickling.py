"""What plain pickling loses, raises at or sends by a name that nobody can import."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from rpcpipe.errors import ModelError
from rpcpipe.model.layers import LayerSpec, unpicklable
from rpcpipe.transport import user_pickling
from support.by_path import imported


class Recorded(nn.Linear):
    """Hooks that refer to the module itself."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.seen: list[Any] = []
        self.weight.register_hook(self.note)
        self.bias.register_post_accumulate_grad_hook(self.note)

    def note(self, value: torch.Tensor) -> None:
        self.seen.append(value)


def frozen_later() -> nn.Module:
    layer = Recorded()
    layer.weight.requires_grad_(False)
    return layer


def shared_memory() -> nn.Module:
    layer = nn.Linear(3, 3)
    layer.register_buffer("first", layer.weight.data[:1])
    return layer


MODULES: dict[str, Callable[[], nn.Module]] = {
    "hooks": Recorded,
    "frozen after its hooks": frozen_later,
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(3, 3)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(3, 3)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(3, 3)),
    "two parametrizations": lambda: parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(3, 3))),
    "inside another": lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.ReLU()),
}


def copied(value: Any, times: int = 1) -> Any:
    for _ in range(times):
        value = user_pickling.loads(user_pickling.dumps(value))
    return value


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("make", MODULES.values(), ids=MODULES)
def test_a_module_arrives_with_its_state_and_what_it_computes(make: Callable[[], nn.Module], times: int) -> None:
    torch.manual_seed(0)
    module, x = make(), torch.randn(2, 3)
    found = copied(module, times)
    assert module.state_dict().keys() == found.state_dict().keys()
    for _ in range(2):
        for one in module, found:
            one(x).square().sum().backward()
    for (name, mine), (_, other) in zip(module.named_parameters(), found.named_parameters(), strict=True):
        assert (mine.grad is None and other.grad is None) or torch.equal(mine.grad, other.grad), name


def test_hooks_refer_to_the_module_that_arrived() -> None:
    module = Recorded()
    found = copied(module, 2)
    found(torch.ones(1, 3)).sum().backward()
    assert len(found.seen) == 2
    assert found.bias in found.seen
    assert not module.seen


def test_a_hook_marked_as_not_to_be_serialized_stays_behind() -> None:
    layer = nn.Linear(2, 2)
    layer.weight.register_hook(torch.utils.hooks.unserializable_hook(lambda grad: grad * 0))
    found = copied(layer)
    found(torch.ones(1, 2)).sum().backward()
    assert found.weight.grad.any()


def test_tensors_go_on_sharing_memory() -> None:
    found = copied(shared_memory())
    found.weight.data.fill_(3.0)
    assert torch.equal(found.first, torch.full((1, 3), 3.0))


def test_a_parametrized_module_can_be_set_and_made_plain_again() -> None:
    found = copied(parametrizations.orthogonal(nn.Linear(3, 3)))
    found.weight = torch.eye(3)
    torch.nn.utils.parametrize.remove_parametrizations(found, "weight")
    assert type(found) is nn.Linear
    assert torch.allclose(found.weight, torch.eye(3))


class Locked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(2, 2)
        self.lock = threading.Lock()


def compiled() -> nn.Module:
    layer = nn.Sequential(nn.Linear(2, 2))
    layer[0].compile(backend="eager")
    return layer


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a lock": (Locked, "a Locked, cannot be pickled.*lock"),
    "compiled": (compiled, "compiled a Linear, and what it made does not travel"),
    "an argument": (lambda: LayerSpec(nn.Linear, 2, threading.Lock()), "LayerSpec.*cannot be pickled"),
}


@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_carried_is_named(make: Callable[[], Any], words: str) -> None:
    layers = {"fine": nn.Linear(2, 2), "bad": make()}
    with pytest.raises(Exception) as caught:
        user_pickling.dumps(layers)
    error = unpicklable(layers, caught.value)
    assert isinstance(error, ModelError)
    with pytest.raises(ModelError, match=f"(?s)layer bad.*{words}.*LayerSpec"):
        raise error


@pytest.fixture
def by_path(tmp_path: Path) -> Iterator[ModuleType]:
    source = "from torch import nn\nWIDTH = 2\nclass Net(nn.Linear): pass\ndef make(): return Net(WIDTH, WIDTH)\n"
    with imported(tmp_path / "net_by_path.py", source) as module:
        yield module


VALUES: dict[str, Callable[[Any], Any]] = {
    "an instance": lambda module: module.Net(2, 2),
    "a class": lambda module: module.Net,
    "a function": lambda module: module.make,
    "a function that uses the module": lambda module: lambda: module.make(),
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_a_module_found_by_path_defines_can_be_read_elsewhere(
    by_path: ModuleType, value: Callable[[Any], Any]
) -> None:
    data = user_pickling.dumps(value(by_path))
    read = textwrap.dedent(
        """
        import pickle, sys
        found = pickle.load(sys.stdin.buffer)
        print(type(found(2, 2) if isinstance(found, type) else found if hasattr(found, "weight") else found()))
        """
    )
    done = subprocess.run([sys.executable, "-c", read], input=data, capture_output=True, check=True)
    assert done.stdout.decode().strip() == "<class 'net_by_path.Net'>"


NAMES = {
    "torch": True, "torch.nn.functional": True, "torch._C._nn": True, "os": True, "os.path": True, "math": True,
    "rpcpipe.transport.user_pickling": True, "__main__": False, "net_by_path": False, "no.such": False,
}  # fmt: skip


@pytest.mark.parametrize(("name", "found"), NAMES.items())
def test_it_is_known_what_a_worker_can_import(by_path: ModuleType, name: str, found: bool) -> None:
    assert user_pickling.WorkerImports().find(name) is found


def test_a_module_of_the_same_name_elsewhere_on_the_path_is_another_one(by_path: ModuleType, tmp_path: Path) -> None:
    imports = user_pickling.WorkerImports()
    imports.adopt([str(tmp_path)])
    assert imports.find("net_by_path")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "net_by_path.py").write_text("")
    imports.adopt([str(tmp_path / "other")])
    assert not imports.find("net_by_path")


def test_code_that_goes_by_value_keeps_the_name_of_its_file() -> None:
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def fail():\n    def inner():\n        1 / 0\n    inner()", "somebodys_script.py", "exec"), scope)
    with pytest.raises(ZeroDivisionError) as caught:
        user_pickling.loads(user_pickling.dumps(scope["fail"]))()
    files = [frame.filename for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert files[1:] == ["somebodys_script.py"] * 2
