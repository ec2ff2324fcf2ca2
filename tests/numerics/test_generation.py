"""Tokens through a pipeline are those of the unsplit model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import rpcpipe as rp
from gpt_model import gpt, next_token_loss
from rpcpipe.model import rng
from rpcpipe.model.layers import build
from rpcpipe.pipeline.generation import Sampling
from support.local_cluster import LocalCluster
from support.models import sgd

VOCABULARY, CONTEXT = 50, 24


def layers() -> list[nn.Module]:
    """Large weights, so that no two logits are nearly equal."""
    made = [build(spec, seed=3, index=index) for index, spec in enumerate(gpt(VOCABULARY, 32, 4, 4, CONTEXT))]
    for layer in made:
        for parameter in layer.parameters():
            parameter.data *= 3 if parameter.dim() > 1 else 1
    return made


def local(workers: int = 3, chunks: int = 4, seed: int = 0, cluster: Any = None) -> rp.Pipeline:
    return rp.Pipeline(
        layers(), cluster or LocalCluster(workers, seed), loss=next_token_loss, optimizer=sgd, chunks=chunks
    )


@torch.no_grad()
def unsplit(prompt: torch.Tensor, new_tokens: int, *, context: int = CONTEXT, draw: Any = None) -> torch.Tensor:
    """The plain loop, one prompt at a time."""
    model = nn.Sequential(*layers()).eval()
    for _ in range(new_tokens):
        logits = model(prompt[None, -context:])[0, -1]
        token = int(logits.argmax()) if draw is None else draw(logits)
        prompt = torch.cat([prompt, torch.tensor([token])])
    return prompt


def prompts(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (1 + 3 * at % 8,), generator=generator) for at in range(count)]


@pytest.mark.parametrize(("workers", "chunks"), [(1, 1), (3, 1), (3, 4), (2, 8)])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_greedy_equals_the_unsplit_model(workers: int, chunks: int, count: int) -> None:
    given = prompts(count)
    found = rp.generate(local(workers, chunks, count), given, 10)
    assert [row.tolist() for row in found] == [unsplit(prompt, 10).tolist() for prompt in given]
    assert [len(prompt) for prompt in given] == [1 + 3 * at % 8 for at in range(count)]  # left as they were


def test_beyond_the_context_the_last_tokens_count() -> None:
    given = prompts(3)
    found = rp.generate(local(), torch.stack([given[0].repeat(20), given[0].repeat(20)]), 8, context=CONTEXT)
    assert found[0].tolist() == found[1].tolist() == unsplit(given[0].repeat(20), 8).tolist()
    found = rp.generate(local(), given, 9, context=5)
    assert [row.tolist() for row in found] == [unsplit(prompt, 9, context=5).tolist() for prompt in given]


def test_sampled_tokens_are_a_function_of_seed_and_row() -> None:
    given = prompts(5)
    options: dict[str, Any] = {"temperature": 2.0, "top_k": 8, "seed": 11}
    found = [row.tolist() for row in rp.generate(local(3, 4), given, 10, **options)]
    for at, prompt in enumerate(given):
        generator, sampling = torch.Generator().manual_seed(rng.derive(11, at)), Sampling(2.0, 8)
        draw = lambda logits, g=generator, s=sampling: s.draw(logits, g)  # noqa: E731
        assert found[at] == unsplit(prompt, 10, draw=draw).tolist()
    assert found == [row.tolist() for row in rp.generate(local(2, 1, 5), given, 10, **options)]
    assert found[:2] == [row.tolist() for row in rp.generate(local(1, 2), given[:2], 10, **options)]
    assert found != [row.tolist() for row in rp.generate(local(), given, 10, **{**options, "seed": 12})]


def test_a_row_ends_with_the_stop_token_and_the_others_go_on() -> None:
    given = prompts(6)
    whole = [unsplit(prompt, 10).tolist() for prompt in given]
    stop = whole[1][len(given[1]) + 2]
    found = [row.tolist() for row in rp.generate(local(), given, 10, stop=stop)]
    for row, prompt, full in zip(found, given, whole, strict=True):
        new = full[len(prompt) :]
        assert row == [*prompt.tolist(), *(new[: new.index(stop) + 1] if stop in new else new)]
    assert len(found[1]) < len(whole[1])


def test_sampling_draws_from_the_likeliest() -> None:
    logits, generator = torch.tensor([0.0, 3.0, 1.0, 2.0]), torch.Generator().manual_seed(0)
    assert Sampling().draw(logits, generator) == 1
    assert {Sampling(5.0, 2).draw(logits, generator) for _ in range(200)} == {1, 3}
    drawn = [Sampling(1.0).draw(logits, generator) for _ in range(4000)]
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / 4000
    torch.testing.assert_close(shares, logits.softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"new_tokens": -1}, "new_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"context": 0}, "context"),
        ({"prompts": torch.zeros(3)}, "of at least one token"),
        ({"prompts": [torch.zeros(0)]}, "of at least one token"),
        ({"prompts": ["once"]}, "not a string, which the model's tokenizer makes a tensor of"),
        ({"prompts": "once"}, "not a string"),
        ({"prompts": [[1, 2]]}, r"not a list: pass torch\.tensor"),
        ({"prompts": [3]}, "not a int"),
        ({"cache": True}, "cache=True is for models of rp.from_transformers"),
    ],
)
def test_arguments_that_cannot_be(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        rp.generate(local(), **{"prompts": prompts(1), "new_tokens": 1, **wrong})


def test_through_real_workers_with_a_dict_in_and_out(cluster: rp.Cluster) -> None:
    class Unwrap(nn.Module):
        def forward(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
            return given["ids"]

    class Wrap(nn.Module):
        def forward(self, logits: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": logits}

    pipe = rp.Pipeline(
        [Unwrap(), *layers(), Wrap()], cluster, loss=next_token_loss, optimizer=sgd, chunks=2, balance=[2, 2, 2, 2]
    )
    given = prompts(4)
    found = rp.generate(pipe, given, 6, inputs=lambda ids: {"ids": ids}, logits=lambda output: output["logits"])
    assert [row.tolist() for row in found] == [unsplit(prompt, 6).tolist() for prompt in given]
    assert [row.tolist() for row in rp.generate(pipe, given, 0)] == [prompt.tolist() for prompt in given]
    assert rp.generate(pipe, [], 3) == []
    pipe.close()
