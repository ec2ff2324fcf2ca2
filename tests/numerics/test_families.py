"""Every family of causal models of the installed transformers in a pipeline is the unsplit model, or is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from rpcpipe.model.hf.cut import cut
from rpcpipe.model.hf.examination import accepted_inputs
from rpcpipe.model.hf.losses import RoutedLoss
from rpcpipe.model.hf.recipe import Recipe
from rpcpipe.model.layers import Sequential
from support.families import (
    LOST,
    MOST,
    ONLY_FROM_A_MODEL,
    PAGE,
    REFUSED,
    VOCABULARY,
    configuration,
    families,
    refused,
    row,
)
from support.local_cluster import LocalCluster

BATCH, TIME = 4, 7
FAMILIES = families()
CARRIED = [family for family in FAMILIES if family not in REFUSED]


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, a mask of rows of different lengths, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (BATCH, TIME), generator=generator)
    mask = (torch.arange(TIME) < torch.tensor([[5], [3], [7], [6]])).long()
    labels = torch.where(mask.bool() & (torch.rand(ids.shape, generator=generator) < 0.7), ids, -100)
    return ids, mask, labels


def model_of(family: str) -> tuple[nn.Module, Any]:
    """A model of the family with random weights, and its config."""
    cls = FAMILIES[family]
    config = configuration(family, cls)
    assert sum(one.numel() for one in Recipe.of(cls, config).weightless().parameters()) < MOST
    torch.manual_seed(0)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)  # norms and biases differ, too
    return model, config


def sgd(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def logits(output: Any) -> torch.Tensor:
    found: torch.Tensor = output["logits"] if isinstance(output, dict) else output
    return found


def close(mine: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def check_generation(pipe: rp.Pipeline) -> None:
    """Where the stages keep keys and values, the tokens are those of passes over whole rows."""
    found = pipe.recipe.language_model
    assert found is not None
    if found.cached:
        prompts = [torch.tensor([5, 9, 4, 7, 8, 3]), torch.tensor([6, 3, 11])]
        cached, whole = (rp.generate(pipe, prompts, 3, cache=cache) for cache in (True, False))
        assert [row.tolist() for row in cached] == [row.tolist() for row in whole]


@pytest.mark.parametrize("family", CARRIED)
def test_the_pipeline_is_the_unsplit_model(family: str, tmp_path: Path) -> None:
    """Its logits, one update, its names, and what is saved; with a loss of routers as one micro-batch."""
    model, config = model_of(family)
    cluster: Any = LocalCluster(2)
    layers, own_loss, _ = cut(config)
    assert str(row(family, layers, isinstance(own_loss, RoutedLoss))) in PAGE.read_text(), "see docs: the page is old"
    if family in ONLY_FROM_A_MODEL:
        with pytest.raises(rp.ModelError, match=ONLY_FROM_A_MODEL[family]):
            Sequential(layers)
    else:
        assert Sequential(layers).state_dict().keys() == model.state_dict().keys()
    chunks = 1 if isinstance(own_loss, RoutedLoss) else 2
    pipe = rp.from_transformers(model, cluster, optimizer=sgd, chunks=chunks)
    ids, mask, labels = batch()
    given = {"input_ids": ids, "attention_mask": mask}
    padded = {name: value for name, value in given.items() if name in accepted_inputs(FAMILIES[family])}
    for inputs in (padded, {"input_ids": ids}):
        with torch.no_grad():
            expected = model(**inputs).logits
        seen = mask.bool() if "attention_mask" in inputs else slice(None)
        close(logits(pipe(inputs))[seen], expected[seen])
    loss = model(**padded, labels=labels).loss
    loss.backward()
    assert pipe.train_step(padded, {"labels": labels}).loss == pytest.approx(float(loss.detach()), abs=1e-5)
    sgd([parameter for parameter in model.parameters() if parameter.requires_grad]).step()
    state = pipe.state_dict()
    assert state.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(
            state[name], value, atol=1e-5, rtol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
        )
    check_generation(pipe)
    folder = pipe.save(tmp_path)
    config.save_pretrained(folder)
    again = FAMILIES[family].from_pretrained(folder).state_dict()
    assert again.keys() == state.keys()
    lost = {name for name, value in state.items() if not torch.equal(again[name], value)}
    assert lost <= LOST.get(family, set())
    if family in LOST:
        model.save_pretrained(tmp_path / "own")
        own = FAMILIES[family].from_pretrained(tmp_path / "own").state_dict()
        assert not any(torch.equal(own[name], value) for name, value in state.items() if name in LOST[family])


@pytest.mark.parametrize("family", REFUSED)
def test_what_a_pipeline_cannot_carry_is_refused(family: str) -> None:
    with pytest.raises((rp.RpcPipeError, ImportError), match=REFUSED[family]):
        cut(configuration(family, FAMILIES[family]))
    assert str(refused(family)) in PAGE.read_text(), "see docs: the page is old"


def test_the_page_has_every_family_and_no_other() -> None:
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")][1:]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == list(FAMILIES)
    assert len(CARRIED) >= 40
