"""Generate text with a causal language model in a pipeline.

A model of transformers keeps keys and values on its stages, so that a new token costs a pass over this token alone;
without a cache it costs a pass over all tokens so far. Prompts are dealt into groups, and while the next tokens of one
group are drawn the other groups are on their way through the stages. The last stage selects the logits at each row's
last position; only these are sent to the driver.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rpcpipe._arguments import require_callable, require_flag, require_iterable, require_kind, require_number
from rpcpipe.driver.inference import Passes, release_caches, tell_last_stage
from rpcpipe.errors import ArgumentError, ModelError, require, require_whole
from rpcpipe.model import rng
from rpcpipe.model.language_model import CachedRows, CacheLost, LanguageModel
from rpcpipe.model.microbatch import Nest
from rpcpipe.model.nest_types import NestOfTensors
from rpcpipe.pipeline.pipeline import Pipeline
from rpcpipe.transport.user_pickling import named_dumps
from rpcpipe.worker.operations import SetSelection


def _same(value: Any) -> Any:
    """Return ``value``."""
    return value


_OTHER_PROMPTS = {
    "str": "a string, which the model's tokenizer makes a tensor of:"
    " tokenizer(text, return_tensors='pt')['input_ids'][0]",
    "list": "a list: pass torch.tensor(prompt)",
}
_MOST_IN_VAIN = 3  # deaths one after the other, without a token between them


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
    inputs: Callable[[torch.Tensor], NestOfTensors] | None = None,
    logits: Callable[[Nest], torch.Tensor] | None = None,
    cache: bool | None = None,
) -> list[torch.Tensor]:
    """Return every prompt with up to ``new_tokens`` tokens added to it, each a (time) tensor; runs in eval mode.

    ``prompts``: (batch, time) token ids, or a list of (time) tensors of one or more tokens each. ``temperature`` 0
    takes the likeliest token; otherwise a token is drawn from softmax(logits / temperature) over the ``top_k``
    likeliest. The same ``seed`` gives the prompt at the same index the same tokens, whatever the other prompts are.
    The model sees the last ``context`` tokens at most. A row ends with the token ``stop``.

    ``inputs`` makes the model's input of (batch, time) ids, by default the ids themselves, or the dict that a model of
    ``from_transformers`` takes; ``logits`` returns (batch, time, vocabulary) from its output and is called on the last
    stage's worker. ``cache``: keep keys and values on the stages, so that a new token costs a pass over this token
    alone; by default where the model can, which those of ``from_transformers`` with attention in all blocks do, and
    where ``context`` is not reached.

    The model must be causal: shorter rows are padded, without a cache on the right with zeros, which earlier positions
    must not see, and with one on the left, with a mask. Raises ArgumentError for a wrong argument, and StageError,
    WorkerLost or DeadlineExceeded.
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
    if inputs is not None:
        require_callable("inputs", inputs, "that makes the model's inputs of token ids")
    if logits is not None:
        require_callable("logits", logits, "that returns the logits in the model's output")
    _check_prompts(prompts)
    model = pipe.recipe.language_model
    require(
        model is None or model.causal,
        "the tokens of this model see later ones, so it cannot generate; its config needs is_decoder=True",
        error=ModelError,
    )
    rows = [_row(prompt, new_tokens, rng.derive(seed, index)) for index, prompt in enumerate(prompts)]
    longest = max((len(row.ids) + row.left for row in rows), default=0)
    cached = _uses_cache(pipe, cache, inputs, context is not None and longest > context)
    plain = _Plain(inputs or (_same if model is None else model.inputs), context)
    drawn = _Drawn(Sampling(temperature, top_k), stop)
    pipe.turn.run("generate", _generate, pipe, rows, drawn, logits or _logits, None if cached else plain)
    return [row.ids for row in rows]


def _check_prompts(prompts: Sequence[Any] | torch.Tensor) -> None:
    """Raise ArgumentError unless every prompt is a (time) tensor; the message says how to make it of what it is."""
    several = [prompts] if isinstance(prompts, str) else prompts
    require_iterable("prompts", several, "tensors of token ids")
    for row in several:
        if not isinstance(row, torch.Tensor):
            how = _OTHER_PROMPTS.get(type(row).__name__, f"a {type(row).__name__}")
            raise ArgumentError(f"every prompt must be a tensor of token ids, not {how}")
        require(
            row.dim() == 1 and len(row) > 0, "every prompt must be a tensor of one dimension, of at least one token"
        )


def _uses_cache(pipe: Pipeline, asked: bool | None, inputs: Any, is_cut: bool) -> bool:
    """Return whether the stages keep keys and values; raises ArgumentError if they are asked to and cannot."""
    if asked is not None:
        require_flag("cache", asked)
    model = pipe.recipe.language_model
    can = model is not None and model.cached and inputs is None and not is_cut
    require(
        can or not asked,
        "cache=True is for models of rp.from_transformers whose blocks all have attention, with their own inputs, and"
        " where no more than context tokens are seen; leave cache out",
    )
    return can if asked is None else asked


def _generate(
    pipe: Pipeline,
    rows: Sequence[_Row],
    drawn: _Drawn,
    logits: Callable[[Nest], torch.Tensor],
    plain: _Plain | None,
) -> None:
    """Add their tokens to ``rows``: with a cache on the stages if there is no ``plain`` way to feed them."""
    pipe.runtime.check()
    tell_last_stage(pipe.runtime, SetSelection(named_dumps(_LastLogits(logits), "what to select")))
    if plain is not None:
        _run(pipe, rows, drawn, plain)
        return
    model = pipe.recipe.language_model
    assert model is not None
    in_vain = 0
    while unfinished := _unfinished(rows):
        left = sum(row.left for row in unfinished)
        try:
            _run(pipe, unfinished, drawn, _Cached(model))
        except CacheLost:  # a worker has died, and its successor has none; all tokens go through the stages again
            in_vain = in_vain + 1 if sum(row.left for row in rows) == left else 0
            if in_vain == _MOST_IN_VAIN:
                raise
    release_caches(pipe.runtime)


def _run(pipe: Pipeline, rows: Sequence[_Row], drawn: _Drawn, feeding: _Plain | _Cached) -> None:
    """Add their tokens to ``rows``, in groups that follow each other through the stages."""
    passes = Passes(pipe.runtime, keep_outputs=True)
    if isinstance(feeding, _Cached):  # a pass over a token is mostly overhead, of which larger groups have less
        passes.ahead = -(-(pipe.runtime.layout.pipeline_size + 1) // pipe.runtime.chunks) - 1
    groups = passes.ahead + 1
    waiting = deque(group for group in (list(rows[start::groups]) for start in range(groups)) if _unfinished(group))
    under_way = deque[list[_Row]]()

    def feed() -> Iterator[tuple[Nest, torch.Tensor]]:
        while waiting:
            under_way.append(waiting.popleft())
            yield feeding.inputs(under_way[-1])

    while waiting:  # a run ends early if no group was waiting when it asked for the next one
        for passed in passes.run(feed()):
            group = under_way.popleft()
            tokens = drawn.grow(group, passed.output)
            if group := feeding.after(group, tokens):
                waiting.append(group)


@dataclass(frozen=True)
class _Plain:
    """Feeds all tokens of a row with every pass, the last ``context`` at most."""

    make: Callable[[torch.Tensor], NestOfTensors]
    context: int | None

    def inputs(self, rows: list[_Row]) -> tuple[Nest, torch.Tensor]:
        """Return the inputs of ``rows``, padded on the right with zeros, and each row's last position, (batch)."""
        windows = [row.ids if self.context is None else row.ids[-self.context :] for row in rows]
        ids = torch.nn.utils.rnn.pad_sequence(windows, batch_first=True)
        return self.make(ids), torch.tensor([len(window) - 1 for window in windows])

    def after(self, rows: list[_Row], tokens: torch.Tensor) -> list[_Row]:
        """Return the rows that need more tokens."""
        return _unfinished(rows)


class _Cached:
    """Feeds the tokens that no stage has seen; a group keeps its rows until all are finished."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self._session = int.from_bytes(os.urandom(7))
        self._groups: dict[int, CachedRows] = {}
        self._rows = 0

    def inputs(self, rows: list[_Row]) -> tuple[Nest, torch.Tensor]:
        """Return the inputs of ``rows``, padded on the left, and each row's last position, (batch)."""
        key = id(rows[0])
        if key not in self._groups:
            self._groups[key] = CachedRows(self._model, self._session, [row.ids for row in rows], self._rows)
            self._rows += len(rows)
        group = self._groups[key]
        return group.inputs(), group.last()

    def after(self, rows: list[_Row], tokens: torch.Tensor) -> list[_Row]:
        """Add ``tokens``, (batch), to ``rows``; return all of them if one needs more."""
        self._groups[id(rows[0])].add(tokens)
        return rows if _unfinished(rows) else []


@dataclass(frozen=True)
class _Drawn:
    """Adds tokens to rows, which end with the token ``stop``."""

    sampling: Sampling
    stop: int | None

    def grow(self, rows: list[_Row], logits: torch.Tensor) -> torch.Tensor:
        """Add a token, drawn from (batch, vocabulary) ``logits``, to every unfinished row; return all tokens."""
        tokens = []
        for row, scores in zip(rows, logits, strict=True):
            if not row.left:
                tokens.append(int(row.ids[-1]))  # a place in the batch that nobody looks at
                continue
            tokens.append(self.sampling.draw(scores, row.generator))
            row.ids = torch.cat([row.ids, torch.tensor(tokens[-1:])])
            row.left = 0 if tokens[-1] == self.stop else row.left - 1
        return torch.tensor(tokens)


def _logits(output: Nest) -> torch.Tensor:
    """Return the logits in a language model's ``output``."""
    logits: torch.Tensor = output["logits"] if isinstance(output, dict) else output
    return logits


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


def _unfinished(rows: Sequence[_Row]) -> list[_Row]:
    return [row for row in rows if row.left]
