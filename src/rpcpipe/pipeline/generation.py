"""Generate text with a causal language model in a pipeline.

There is no key-value cache: every new token costs a pass over all tokens so far. Prompts are dealt into groups, and
while the next tokens of one group are drawn the other groups are on their way through the stages. The last stage
selects the logits at each row's last position; only these are sent to the driver.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rpcpipe._arguments import require_callable, require_iterable, require_kind, require_number
from rpcpipe.driver.inference import Passes, tell_last_stage
from rpcpipe.errors import require, require_whole
from rpcpipe.model import rng
from rpcpipe.model.microbatch import Nest
from rpcpipe.pipeline.pipeline import Pipeline
from rpcpipe.transport.user_pickling import named_dumps
from rpcpipe.worker.operations import SetSelection


def _same(value: Any) -> Any:
    """Return ``value``."""
    return value


@dataclass
class _Row:
    """Holds a prompt with the tokens added to it, (time) ``ids``, and how many tokens are ``left`` to add.

    Every row has a generator, so the tokens that it draws do not depend on other rows.
    """

    ids: torch.Tensor
    left: int
    generator: torch.Generator


@dataclass(frozen=True)
class Sampling:
    """Draws tokens from logits: the likeliest at ``temperature`` 0, else one of the ``top_k`` likeliest."""

    temperature: float = 0.0
    top_k: int | None = None

    def draw(self, logits: torch.Tensor, generator: torch.Generator) -> int:
        """Return the index of the token drawn from ``logits``, (vocabulary)."""
        if self.temperature == 0:
            return int(logits.argmax())
        logits = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < len(logits):
            lowest = logits.topk(self.top_k).values[-1]
            logits = logits.masked_fill(logits < lowest, -torch.inf)
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
    """Return every prompt with up to ``new_tokens`` tokens added to it, each a (time) tensor; runs in eval mode.

    ``prompts``: (batch, time) token ids, or a list of (time) tensors of one or more tokens each. ``temperature`` 0
    takes the likeliest token; otherwise a token is drawn from softmax(logits / temperature) over the ``top_k``
    likeliest. The same ``seed`` gives the prompt at the same index the same tokens, whatever the other prompts are.
    The model sees the last ``context`` tokens at most. A row ends with the token ``stop``. ``inputs`` makes the
    model's input of (batch, time) ids; ``logits`` returns (batch, time, vocabulary) from its output and is called on
    the last stage's worker.

    The model must be causal: shorter rows are padded on the right with zeros, which earlier positions must not see.
    Raises ArgumentError for a wrong argument, and StageError, WorkerLost or DeadlineExceeded.
    """
    require_kind("pipe", pipe, Pipeline, "a Pipeline")
    require_whole("new_tokens", new_tokens, least=0)
    require_whole("seed", seed, least=-math.inf)
    require_number("temperature", temperature, least=0)
    for name, value in (("top_k", top_k), ("context", context)):
        if value is not None:
            require_whole(name, value, otherwise=", or None")
    if stop is not None:
        require_whole("stop", stop, least=-math.inf, otherwise=", or None")
    require_callable("inputs", inputs, "that makes the model's inputs of token ids")
    require_callable("logits", logits, "that returns the logits in the model's output")
    require_iterable("prompts", prompts, "tensors of token ids")
    require(
        all(isinstance(row, torch.Tensor) and row.dim() == 1 and len(row) for row in prompts),
        "every prompt must be a tensor of one dimension, of at least one token",
    )
    rows = [_row(prompt, new_tokens, rng.derive(seed, index)) for index, prompt in enumerate(prompts)]
    pipe.turn.run("generate", _generate, pipe, rows, Sampling(temperature, top_k), context, stop, inputs, logits)
    return [row.ids for row in rows]


def _generate(
    pipe: Pipeline,
    rows: Sequence[_Row],
    sampling: Sampling,
    context: int | None,
    stop: int | None,
    inputs: Callable[[torch.Tensor], Nest],
    logits: Callable[[Nest], torch.Tensor],
) -> None:
    """Add their tokens to ``rows``."""
    pipe.runtime.check()
    tell_last_stage(pipe.runtime, SetSelection(named_dumps(_LastLogits(logits), "what to select")))
    passes = Passes(pipe.runtime, keep_outputs=True)
    groups = passes.ahead + 1
    waiting = deque(group for group in (list(rows[start::groups]) for start in range(groups)) if _unfinished(group))
    under_way = deque[list[_Row]]()

    def feed() -> Iterator[tuple[Nest, torch.Tensor]]:
        while waiting:
            under_way.append(waiting.popleft())
            ids, last = _window(under_way[-1], context)
            yield inputs(ids), last

    while waiting:  # a run ends early if no group was waiting when it asked for the next one
        for passed in passes.run(feed()):
            if group := _grow(under_way.popleft(), passed.output, sampling, stop):
                waiting.append(group)


class _LastLogits:
    """Selects the logits at each row's last position, (batch, vocabulary), from a micro-batch's output."""

    def __init__(self, logits: Callable[[Nest], torch.Tensor]) -> None:
        self._logits = logits

    def __call__(self, output: Nest, last: torch.Tensor) -> torch.Tensor:
        logits = self._logits(output)
        return logits[torch.arange(len(last), device=logits.device), last]


def _row(prompt: torch.Tensor, new_tokens: int, seed: int) -> _Row:
    """Return the row that starts with ``prompt``, on the CPU."""
    return _Row(prompt.long().cpu(), new_tokens, torch.Generator().manual_seed(seed))


def _window(rows: list[_Row], context: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows' last ``context`` ids, (batch, time) padded with zeros, and each row's last position, (batch)."""
    windows = [row.ids if context is None else row.ids[-context:] for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)
    return ids, torch.tensor([len(window) - 1 for window in windows])


def _grow(rows: list[_Row], logits: torch.Tensor, sampling: Sampling, stop: int | None) -> list[_Row]:
    """Add a token, drawn from (batch, vocabulary) ``logits``, to every row; return the rows that need more tokens."""
    for row, scores in zip(rows, logits, strict=True):
        token = sampling.draw(scores, row.generator)
        row.ids = torch.cat([row.ids, torch.tensor([token])])
        row.left = 0 if token == stop else row.left - 1
    return _unfinished(rows)


def _unfinished(rows: list[_Row]) -> list[_Row]:
    return [row for row in rows if row.left]
