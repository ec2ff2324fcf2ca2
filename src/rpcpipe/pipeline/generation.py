"""Text from a causal language model that lives in a pipeline.

Every new token costs a pass over all tokens so far: there is no key-value cache. Prompts are dealt
into groups, and while one group's next token is drawn the others are on their way through the stages.
Only the logits of a row's last position travel, as the last stage picks them out.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rpcpipe.driver.inference import Passes, tell_last_stage
from rpcpipe.errors import require, require_whole
from rpcpipe.model import rng
from rpcpipe.model.microbatch import Nest
from rpcpipe.pipeline.pipeline import Pipeline
from rpcpipe.transport.pickling import dumps
from rpcpipe.worker.operations import SetSelection


def _same(value: Any) -> Any:
    return value


@dataclass
class _Row:
    """A prompt and what has been added to it. Its random numbers are its own, whatever the others do."""

    ids: torch.Tensor
    left: int
    generator: torch.Generator


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits: the likeliest at ``temperature`` 0, else one of the ``top_k`` likeliest."""

    temperature: float = 0.0
    top_k: int | None = None

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """A token's number from (vocabulary) logits."""
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < len(logits):
            least = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < least, -torch.inf)
        return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def generate(
    pipe: Pipeline,
    prompts: Sequence[torch.Tensor] | torch.Tensor,
    new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    seed: int = 0,
    context: int | None = None,
    stop: int | None = None,
    inputs: Callable[[torch.Tensor], Nest] = _same,
    logits: Callable[[Nest], torch.Tensor] = _same,
) -> list[torch.Tensor]:
    """Every prompt with up to ``new_tokens`` more tokens, in eval mode.

    ``prompts``: (batch, time) token ids, or a list of (time) tensors of any lengths from 1 on.
    ``temperature`` 0 takes the likeliest token, else one is drawn from softmax(logits / temperature),
    of the ``top_k`` likeliest; the same ``seed`` gives a prompt the same tokens, whatever its
    neighbours. The model sees the last ``context`` tokens at most. A row ends with the token ``stop``.
    ``inputs`` makes the model's input of (batch, time) ids, ``logits`` finds (batch, time, vocabulary)
    in its output, on the last stage's worker.

    The model must be causal: shorter rows are filled up on the right, with zeros that no position
    before them may see. Raises ArgumentError for arguments that cannot be.
    """
    require_whole("new_tokens", new_tokens, least=0)
    require_whole("seed", seed, least=-math.inf)
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    require(number and temperature >= 0, f"temperature must be a number and not negative, is {temperature!r}")
    for name, value in (("top_k", top_k), ("context", context)):
        if value is not None:
            require_whole(name, value, otherwise=", or None")
    require(all(row.dim() == 1 and len(row) for row in prompts), "every prompt must be a row of at least one token")
    pipe.runtime.check()
    tell_last_stage(pipe.runtime, SetSelection(dumps(_LastLogits(logits), "what to select")))
    rows = [_row(prompt, new_tokens, rng.derive(seed, index)) for index, prompt in enumerate(prompts)]
    passes, sampling = Passes(pipe.runtime), Sampling(temperature, top_k)
    groups = passes.ahead + 1
    known = deque(group for group in (rows[start::groups] for start in range(groups)) if group and new_tokens)
    under_way = deque[list[_Row]]()

    def feed() -> Iterator[tuple[Nest, torch.Tensor]]:
        while known:
            under_way.append(known.popleft())
            ids, last = _window(under_way[-1], context)
            yield inputs(ids), last

    while known:  # again where a group that had ended left a gap
        for passed in passes.run(feed(), keep_outputs=True):
            if group := _grow(under_way.popleft(), passed.output, sampling, stop):
                known.append(group)
    return [row.ids for row in rows]


class _LastLogits:
    """Of a micro-batch's logits those at each row's last position: (batch, vocabulary)."""

    def __init__(self, logits: Callable[[Nest], torch.Tensor]) -> None:
        self._logits = logits

    def __call__(self, output: Nest, last: torch.Tensor) -> torch.Tensor:
        found = self._logits(output)
        return found[torch.arange(len(last), device=found.device), last]


def _row(prompt: torch.Tensor, new_tokens: int, seed: int) -> _Row:
    return _Row(prompt.long().cpu(), new_tokens, torch.Generator().manual_seed(seed))


def _window(rows: list[_Row], context: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids filled up with zeros, each row's last position)."""
    seen = [row.ids if context is None else row.ids[-context:] for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True)
    return ids, torch.tensor([len(row) - 1 for row in seen])


def _grow(rows: list[_Row], logits: torch.Tensor, sampling: Sampling, stop: int | None) -> list[_Row]:
    """Add a token to every row; the rows that go on."""
    for row, scores in zip(rows, logits, strict=True):
        token = sampling.draw(scores, row.generator)
        row.ids = torch.cat([row.ids, torch.tensor([token])])
        row.left = 0 if token == stop else row.left - 1
    return [row for row in rows if row.left]
