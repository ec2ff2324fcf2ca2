"""Pre-train transformers' BertForPreTraining on real documents: masked words and next sentences, 4 stages.

python examples/bert.py                 # a tiny BERT learns pydoc's topics
python examples/bert.py --size large    # BERT-Large is built on the workers and takes one step
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import re
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from tokenizers import BertWordPieceTokenizer
from torch import nn
from transformers import BertConfig, BertForPreTraining

import rpcpipe as rp

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 2000, "hidden_size": 96, "num_hidden_layers": 6, "num_attention_heads": 4},
    "large": {"vocab_size": 30522, "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
}
PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"
Batch = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


class Documents:
    """pydoc's topics as documents of sentences, each a list of WordPiece ids."""

    def __init__(self, vocabulary: int) -> None:
        texts = [re.sub(r"\s+", " ", topic) for topic in pydoc_data.topics.topics.values()]
        self.tokenizer = BertWordPieceTokenizer()
        self.tokenizer.train_from_iterator(texts, vocab_size=vocabulary, show_progress=False)
        self.ids: dict[str, int] = self.tokenizer.get_vocab()
        sentences = [re.split(r"(?<=[.:]) ", text) for text in texts]
        encoded = [
            [self.tokenizer.encode(one, add_special_tokens=False).ids for one in document] for document in sentences
        ]
        self.documents = [document for document in encoded if len(document) > 1]

    def batches(self, size: int, length: int, seed: int) -> Iterator[Batch]:
        """Endless batches: pairs of sentences, half of them torn apart, 15 % of their words to be guessed."""
        generator = torch.Generator().manual_seed(seed)
        while True:
            rows = [self._pair(length, generator) for _ in range(size)]
            ids, types, following = (torch.tensor(column) for column in zip(*rows, strict=True))
            masked, labels = self._mask(ids, generator)
            inputs = {"input_ids": masked, "token_type_ids": types, "attention_mask": (ids != self.ids[PAD]).long()}
            yield inputs, {"labels": labels, "next_sentence_label": following}

    def _pair(self, length: int, generator: torch.Generator) -> tuple[list[int], list[int], int]:
        def draw(below: int) -> int:
            return int(torch.randint(below, (), generator=generator))

        document = self.documents[draw(len(self.documents))]
        at, torn = draw(len(document) - 1), draw(2)
        other = self.documents[draw(len(self.documents))]
        second = other[draw(len(other))] if torn else document[at + 1]
        half = (length - 3) // 2
        first, second = document[at][:half], second[:half]
        ids = [self.ids[CLS], *first, self.ids[SEP], *second, self.ids[SEP]]
        types = [0] * (len(first) + 2) + [1] * (len(second) + 1)
        fill = length - len(ids)
        return ids + [self.ids[PAD]] * fill, types + [0] * fill, torn

    def _mask(self, ids: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the chosen 15 %, 80 % become [MASK], 10 % another word, 10 % stay (Devlin et al., 2019)."""
        special = torch.isin(ids, torch.tensor([self.ids[PAD], self.ids[CLS], self.ids[SEP]]))
        chosen = (torch.rand(ids.shape, generator=generator) < 0.15) & ~special
        how = torch.rand(ids.shape, generator=generator)
        words = torch.randint(len(self.ids), ids.shape, generator=generator)
        masked = ids.masked_fill(chosen & (how < 0.8), self.ids[MASK])
        return torch.where(chosen & (how >= 0.9), words, masked), ids.masked_fill(~chosen, -100)


def adamw(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    """No decay for biases and norms."""
    weights, others = [p for p in params if p.dim() > 1], [p for p in params if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=1e-3)


def words(output: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Masked words guessed."""
    counts = targets["labels"] != -100
    return ((output["prediction_logits"].argmax(-1) == targets["labels"]) & counts).sum(), counts.sum()


def pairs(output: dict[str, torch.Tensor], targets: dict[str, torch.Tensor]) -> tuple[torch.Tensor, int]:
    """Pairs judged rightly."""
    right = output["seq_relationship_logits"].argmax(-1) == targets["next_sentence_label"]
    return right.sum(), len(right)


def compare(pipe: rp.Pipeline, config: BertConfig, batch: Batch) -> None:
    """The pipeline's loss beside that of the unsplit model with the same weights."""
    model = BertForPreTraining(config).eval()
    model.load_state_dict(pipe.state_dict())
    inputs, targets = batch
    with torch.no_grad():
        unsplit = float(model(**inputs, **targets).loss)
    piped = pipe.evaluate([batch])
    print(f"loss {piped:.6f} through {len(pipe.stages)} stages, {unsplit:.6f} in one process")
    assert abs(piped - unsplit) < 1e-5, "they should be equal"


def main() -> None:
    """Train, and show what happened."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--steps", type=int, help="200, for large 1")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=48)
    args = parser.parse_args()
    tiny = args.size == "tiny"
    sizes = SIZES[args.size]
    config = BertConfig(**sizes, intermediate_size=4 * sizes["hidden_size"])
    documents = Documents(config.vocab_size)
    data, held_out = (documents.batches(args.batch, args.length, seed) for seed in (0, 1))
    steps, rss = args.steps or (200 if tiny else 1), psutil.Process().memory_info().rss
    with rp.launch(workers=4) as cluster:
        pipe = rp.from_transformers(
            config, cluster, optimizer=adamw, chunks=16, clip_grad_norm=1.0, checkpoint="never" if tiny else "always"
        )
        print(cluster, pipe, sep="\n")
        if tiny:
            compare(pipe, config, next(held_out))
        schedule: Any = torch.optim.lr_scheduler.OneCycleLR(pipe.optimizer, 2e-3, total_steps=steps + 1)
        for step, (inputs, targets) in zip(range(steps), data, strict=False):
            result = pipe.train_step(inputs, targets)
            schedule.step()
            if step % (steps // 5 or 1) == 0:
                print(f"step {step:4}  loss {result.loss:.3f}  {result.seconds:.2f} s", flush=True)
        if tiny:
            found = pipe.evaluate([next(held_out) for _ in range(4)], {"words": words, "pairs": pairs})
            print(", ".join(f"{name} {value:.3f}" for name, value in found.items()), "on held-out pairs")
        grown = (psutil.Process().memory_info().rss - rss) / 2**20
        weights = sum(sum(stage.sizes.values()) for stage in pipe.stages) * 4 / 2**20
        print(f"weights {weights:,.0f} MiB on the workers; this process grew by {grown:,.0f} MiB")


if __name__ == "__main__":
    main()
