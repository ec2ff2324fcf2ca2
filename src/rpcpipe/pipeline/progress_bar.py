"""Show how training gets on."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sized
from contextlib import closing
from typing import Any

from tqdm import tqdm

from rpcpipe._arguments import require_flag
from rpcpipe.driver.result import StepResult

NOT_TRAINED = (
    "pipe.train(batches) was never iterated over, so nothing was trained; write `for result in pipe.train(batches): …`,"
    " or list(pipe.train(batches))"
)


def shown(
    results: Generator[StepResult, Any, Any], batches: Iterable[Any], progress: bool
) -> Generator[StepResult, None, None]:
    """Yield ``results`` of training on ``batches``; with ``progress`` a bar shows them."""
    return _with_bar(results, batches, require_flag("progress", progress))


def _with_bar(
    results: Generator[StepResult, Any, Any], batches: Iterable[Any], progress: bool
) -> Generator[StepResult, None, None]:
    total = len(batches) if isinstance(batches, Sized) else None
    with closing(results), tqdm(results, total=total, disable=not progress, unit="step") as bar:
        for result in bar:
            bar.set_postfix(loss=f"{result.loss:.4f}", bubble=f"{result.bubble:.0%}", refresh=False)
            yield result
