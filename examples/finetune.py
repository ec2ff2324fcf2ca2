"""Fine-tune a causal model from a folder that save_pretrained has written, and save it for from_pretrained.

python examples/finetune.py                  # a tiny Llama of bytes, which this program saves first
python examples/finetune.py --model FOLDER   # any causal model of transformers, whose tokens are bytes here
"""

from __future__ import annotations

import argparse
import math
import pydoc_data.topics
import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rpcpipe as rp


def batches(size: int, length: int) -> list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]]:
    """Python's help as batches of bytes; each is (inputs, targets) as the model's forward takes them."""
    ids = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()))
    rows = ids[: len(ids) // length * length].view(-1, length)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    return [({"input_ids": part}, {"labels": part}) for part in torch.split(rows, size)]


def main() -> None:
    """Perplexity before, training, perplexity after, and the model read back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, help="default: a new temporary folder")
    args = parser.parse_args()
    args.out = args.out or Path(tempfile.mkdtemp())
    if args.model is None:
        args.model, sizes = args.out / "base", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
        LlamaForCausalLM(LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes)).save_pretrained(args.model)
    held_out, train = (data := batches(16, 64))[:4], data[4 : 4 + args.steps]
    with rp.launch(workers=2) as cluster:  # the weights are read there; this process has none of them
        pipe = rp.from_transformers(
            args.model, cluster, optimizer=lambda params: torch.optim.AdamW(params, lr=3e-3), chunks=4
        )
        print(f"perplexity before {math.exp(pipe.evaluate(held_out)):.1f}")
        for result in pipe.train(train, ahead=1):
            if result.step % 20 == 0:
                print(f"step {result.step:4}  loss {result.loss:.3f}", flush=True)
        print(f"perplexity after {math.exp(loss := pipe.evaluate(held_out)):.1f}")
        folder = pipe.save(args.out / "tuned")
    AutoConfig.from_pretrained(args.model).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        again = sum(float(model(**inputs, **targets).loss) for inputs, targets in held_out) / len(held_out)
    print(f"{folder}: loss {again:.5f} in one process, {loss:.5f} in the pipeline")


if __name__ == "__main__":
    main()
