"""What somebody who is new to rpcpipe gets wrong is answered in one sentence that says what to pass."""

from __future__ import annotations

import re
from typing import Any

import numpy
import pytest
import torch
from torch import nn

import rpcpipe as rp
from support.local_cluster import LocalCluster
from support.models import cross_entropy, mlp, sgd

X, Y = torch.randn(8, 12), torch.arange(8) % 4


@pytest.fixture
def pipe() -> rp.Pipeline:
    return rp.Pipeline(mlp(), LocalCluster(2, seed=0), loss=cross_entropy, optimizer=sgd, chunks=2)


def refusal(call: Any) -> str:
    with pytest.raises(rp.ArgumentError) as caught:
        call()
    said = str(caught.value)
    assert "\n" not in said
    return said


WRONG = {
    "None": (None, "are None; pass a tensor with the batch in dimension 0"),
    "list": ([1.0, 2.0], "they are of type list; pass torch.tensor(…) of its numbers"),
    "tokenizer": (
        {"input_ids": [[1, 2], [3, 4]]},
        "of type dict; pass torch.tensor(…) of its numbers; have a tokenizer",
    ),
    "str": ("hello", "of type str; pass token ids, as tokenizer(texts, return_tensors='pt', padding=True)"),
    "strings": (["hello", "you"], "of type list; pass token ids, as tokenizer("),
    "module": (nn.Linear(1, 1), "of type Linear; pass a tensor, or a tuple, list, dict or dataclass of tensors"),
    "empty": ([], "of type list; pass a tensor, or a tuple, list, dict or dataclass of tensors"),
    "array": (numpy.ones((8, 12)), "has a numpy ndarray, which would not be cut into micro-batches; pass torch.as_t"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_batch_of_another_kind_is_named_with_what_to_pass(pipe: rp.Pipeline, kind: str) -> None:
    value, said = WRONG[kind]
    calls = {
        "inputs": (lambda: pipe.train_step(value, Y), lambda: pipe(value), lambda: pipe.evaluate([(value, Y)])),
        "targets": (lambda: pipe.train_step(X, value), lambda: list(pipe.train([(X, value)]))),
    }
    for argument, wrong in calls.items():
        for call in wrong:
            message = refusal(call)
            assert message.startswith(argument)
            assert said in message
    assert pipe.train_step(X, Y).loss > 0


def test_a_loader_of_dicts_is_answered_with_how_to_make_pairs(pipe: rp.Pipeline) -> None:
    for call in (pipe.evaluate, lambda batches: list(pipe.train(batches))):
        said = refusal(lambda call=call: call([{"x": X, "labels": Y}]))
        assert "pairs (inputs, targets), and got a dict with the keys ['x', 'labels']; make pairs" in said
        assert said.endswith("for instance ((batch['x'], batch['labels']) for batch in loader)")
    said = refusal(lambda: pipe.evaluate([{"input_ids": X, "attention_mask": X, "labels": Y}]))  # type: ignore[list-item]
    code = said.partition("for instance ")[2].partition(", as models of transformers take them")[0]
    [(inputs, targets)] = eval(code, {"loader": [{"input_ids": X, "attention_mask": X, "labels": Y}]})
    assert (list(inputs), list(targets)) == (["input_ids", "attention_mask"], ["labels"])


def test_a_list_of_samples_is_answered_with_how_to_make_a_batch(pipe: rp.Pipeline) -> None:
    assert "torch.stack(inputs) makes a batch of a list" in refusal(lambda: pipe.train_step(list(X), Y))
    assert "torch.stack" not in refusal(lambda: pipe.train_step(X, Y[:4]))


def test_a_loss_without_parentheses_is_named() -> None:
    said = refusal(lambda: rp.Pipeline(mlp(), LocalCluster(2, seed=0), loss=nn.CrossEntropyLoss, optimizer=sgd))
    assert said.endswith("CrossEntropyLoss is a class: pass CrossEntropyLoss()")


def test_what_modules_of_transformers_have_is_answered_with_what_to_call(pipe: rp.Pipeline) -> None:
    for name, instead in (("generate", "rp.generate(pipe, prompts"), ("save_pretrained", "pipe.state_dict()")):
        with pytest.raises(AttributeError, match=re.escape(instead)):
            getattr(pipe, name)


def test_a_check_on_a_worker_shows_no_frames_of_rpcpipe(pipe: rp.Pipeline) -> None:
    vector = rp.Pipeline(mlp(), LocalCluster(2, seed=0), loss=lambda output, target: output, optimizer=sgd)
    with pytest.raises(rp.ModelError, match="scalar") as caught:
        vector.train_step(X, Y)
    assert "traceback" not in str(caught.value)
    assert ".py" not in str(caught.value)
    assert len(str(caught.value).splitlines()) < 4


def test_an_optimizer_that_is_made_already_is_answered_with_a_function() -> None:
    model = mlp()
    made: Any = torch.optim.SGD(model.parameters(), lr=0.1)
    said = refusal(lambda: rp.Pipeline(model, LocalCluster(2, seed=0), loss=cross_entropy, optimizer=made))
    assert "not an object of type SGD" in said
    assert said.endswith("lambda params: SGD(params, lr=…)")


class Broken(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[:, 1000]


def test_the_traceback_begins_with_the_users_code() -> None:
    pipe = rp.Pipeline(
        [nn.Linear(12, 4), Broken()], LocalCluster(2, seed=0), loss=cross_entropy, optimizer=sgd, chunks=2
    )
    with pytest.raises(IndexError) as caught:
        pipe.train_step(X, Y)
    lines = str(caught.value).splitlines()
    first = lines.index("Traceback (most recent call last):") + 1
    assert "test_first_mistakes.py" in lines[first]
    assert lines[first].endswith("in forward")


def test_only_public_names_are_shown() -> None:
    assert {name for name in dir(rp) if not name.startswith("__")} == set(rp.__all__)
    for name in dir(rp):
        assert hasattr(rp, name)
