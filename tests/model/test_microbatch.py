from __future__ import annotations

from collections import UserDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rpcpipe.model import microbatch
from rpcpipe.model.batch import count_tokens


@pytest.mark.parametrize(("size", "chunks"), [(8, 4), (10, 4), (3, 8), (1, 1), (7, 3)])
def test_split_is_tensor_chunk_and_merge_its_inverse(size: int, chunks: int) -> None:
    x = torch.randn(size, 2)
    parts = microbatch.split({"x": x, "plain": 7, "scalar": torch.tensor(3.0)}, chunks)
    for part, expected in zip(parts, x.chunk(chunks), strict=True):
        assert torch.equal(part["x"], expected)
        assert part["plain"] == 7
        assert part["scalar"] == 3.0
    assert torch.equal(microbatch.merge([(part["x"],) for part in parts])[0], x)


def test_merge_keeps_what_has_no_batch_as_a_list() -> None:
    assert microbatch.merge([{"n": 1}, {"n": 2}]) == {"n": [1, 2]}
    assert microbatch.merge([{"n": 1}]) == {"n": 1}


@pytest.mark.parametrize("nest", [5, torch.tensor(1.0), torch.empty(0, 3), (torch.ones(2), torch.ones(3))])
def test_no_batch_no_split(nest: Any) -> None:
    with pytest.raises(ValueError, match="agree on a dimension 0"):
        microbatch.split(nest, 2)


def test_packing_keeps_everything() -> None:
    class Local(NamedTuple):
        x: torch.Tensor
        rest: object

    nest = Local(torch.ones(2, 3), {"a": [torch.zeros(1), None, "text"], "b": lambda: 7})
    tensors, data = microbatch.pack(nest)
    assert len(tensors) == 2
    again = microbatch.unpack((tensors, data))
    assert type(again).__name__ == "Local"
    assert torch.equal(again.x, nest.x)
    assert again.rest["a"][1:] == [None, "text"]
    assert again.rest["b"]() == 7


def test_a_batch_is_cut_for_replicas_and_then_into_micro_batches() -> None:
    shares, samples, by_caller = microbatch.cut({"x": torch.arange(7), "flag": True}, 3, 2)
    assert [[part["x"].tolist() for part in share] for share in shares] == [[[0, 1], [2]], [[3, 4], [5]], [[6]]]
    assert samples == [2, 1, 2, 1, 1]
    assert not by_caller
    assert [len(share) for share in microbatch.cut(torch.arange(1), 3, 2).shares] == [1, 0, 0]


IDS = torch.ones(6, 5, dtype=torch.long)


@pytest.mark.parametrize(
    ("inputs", "tokens"),
    [
        (IDS, 30), (IDS.to(torch.uint8), 30), (IDS[:, 0], 0), (IDS[..., None], 0), (IDS.float(), 0), (IDS.bool(), 0),
        ((IDS, torch.ones(6, 3)), 30), ((torch.ones(6, 3), IDS), 0), ([{"x": IDS, "y": IDS}], 30),
        ({"attention_mask": torch.ones(6, 5), "input_ids": IDS}, 30), ({"pixels": torch.ones(6, 3), "ids": IDS}, 0),
        (UserDict(mask=torch.ones(6, 5), input_ids=IDS), 30), ((microbatch.Replicated(torch.ones(1, 5)), IDS), 30),
        (microbatch.Batched(IDS.T, 1), 30), (microbatch.MicroBatches([IDS, (IDS[:2], 7)]), 40), (None, 0),
    ],
)  # fmt: skip
def test_tokens_are_the_elements_of_two_dimensional_integers(inputs: Any, tokens: int) -> None:
    assert count_tokens(inputs) == tokens


class Point(NamedTuple):
    x: Any


class Named(dict[str, Any]):
    pass


LEAVES = st.sampled_from([torch.ones(1), torch.nn.Parameter(torch.zeros(2)), None, 3, "text", torch.float32, object()])
NESTS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["b", "a", "c"]), inner),
        st.dictionaries(st.sampled_from(["b", "a"]), inner).map(Named),
        inner.map(Point),
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(NESTS)
def test_what_is_built_in_is_gone_through_as_pytree_does(nest: Any) -> None:
    leaves, spec = microbatch.flatten(nest)
    expected = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    assert [*map(id, microbatch.tensors(nest))] == [*map(id, expected)]
    order: list[int] = []
    changed = microbatch.map_tensors(lambda leaf: order.append(id(leaf)) or (leaf,), nest)
    assert order == [*map(id, expected)]
    wrapped = [(leaf,) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    assert repr(changed) == repr(microbatch.unflatten(wrapped, spec))
