from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe import layers


def test_names_are_the_unsplit_models() -> None:
    from collections import OrderedDict

    named = nn.Sequential(OrderedDict(embed=nn.Embedding(3, 2), head=nn.Linear(2, 3)))
    assert list(layers.named_layers(named)) == ["embed", "head"]
    assert list(layers.named_layers([nn.ReLU(), rp.LayerSpec(nn.Linear, 1, 1)])) == ["0", "1"]


def test_specs_count_parameters_without_memory_and_build_from_the_seed() -> None:
    huge = rp.LayerSpec(nn.Linear, 10**6, 10**6, bias=False)
    assert layers.parameter_counts({"a": huge, "b": nn.Linear(2, 2)}) == [10**12, 6]
    spec = rp.LayerSpec(nn.Linear, 3, 3)
    weights = [layers.build(spec, seed=seed, index=index).weight for seed, index in [(1, 2), (1, 2), (1, 3), (2, 2)]]
    assert torch.equal(weights[0], weights[1])  # type: ignore[arg-type]
    assert not torch.equal(weights[0], weights[2])  # type: ignore[arg-type]
    assert not torch.equal(weights[0], weights[3])  # type: ignore[arg-type]
    assert repr(rp.LayerSpec(nn.Linear, 3, bias=False)) == "LayerSpec(Linear, 3, bias=False)"


def test_a_spec_of_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="made a dict, not an"):
        rp.LayerSpec(dict).build()


@pytest.mark.parametrize("number", [0, 1])
def test_the_programs_of_docs_models_run(number: int) -> None:
    text = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    program = re.findall(r"```python\n(.*?)```", text, re.DOTALL)[number]
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split()[-1] == ("100])", "True")[number]
