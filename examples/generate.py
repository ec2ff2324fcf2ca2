"""Generate text with a causal model in a pipeline, from a folder that save_pretrained has written.

python examples/generate.py                                # a tiny Llama of bytes learns Python's help first
python examples/generate.py --model FOLDER "The with " …   # any causal model; without a tokenizer, bytes
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig

import rpcpipe as rp

CONFIG = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4)


def learned(cluster: rp.Cluster, steps: int) -> rp.Pipeline:
    """A pipeline of a tiny model that has read some of Python's help."""
    ids = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()))
    pipe = rp.from_transformers(CONFIG, cluster, optimizer=lambda params: torch.optim.AdamW(params, lr=5e-3), chunks=2)
    rows = ids[: len(ids) // 1024 * 1024].view(-1, 16, 64)
    for result in pipe.train([({"input_ids": part}, {"labels": part}) for part in rows[:steps]]):
        loss = result.loss
    print(f"loss {loss:.2f} after {steps} steps")
    return pipe


def main() -> None:
    """Read or learn a model, and write on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=["The with statement", "If an exception", "class "])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--tokens", type=int, default=60)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=0.7)
    args = parser.parse_args()
    tokenizer: Any = None
    if args.model is not None and (args.model / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(args.model)
    prompts = [
        torch.tensor(tokenizer(text)["input_ids"] if tokenizer else list(text.encode())) for text in args.prompts
    ]
    with rp.launch(workers=2) as cluster:
        pipe = learned(cluster, args.steps) if args.model is None else rp.from_transformers(args.model, cluster)
        rows = rp.generate(
            pipe, prompts, args.tokens, temperature=args.temperature, top_k=20, inputs=lambda ids: {"input_ids": ids}
        )
    for ids in rows:
        print(repr(tokenizer.decode(ids) if tokenizer else bytes(ids.tolist()).decode(errors="replace")))


if __name__ == "__main__":
    main()
