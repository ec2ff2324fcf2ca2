"""The progress bar of ``pipe.train``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sized

from tqdm import tqdm

from rpcpipe._arguments import require_flag
from rpcpipe.driver.result import StepResult


def with_bar(results: Iterable[StepResult], batches: Iterable[object], progress: bool) -> Iterator[StepResult]:
    """Yield ``results``, of training on ``batches``; ``progress`` shows how many there are and the last loss.

    Raises ArgumentError unless ``progress`` is True or False.
    """
    require_flag("progress", progress)
    total = len(batches) if isinstance(batches, Sized) else None
    with tqdm(results, total=total, disable=not progress, unit="step") as bar:
        for result in bar:
            bar.set_postfix(loss=f"{result.loss:.4f}", bubble=f"{result.bubble:.0%}", refresh=False)
            yield result
