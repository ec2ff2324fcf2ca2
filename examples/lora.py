"""Train LoRA adapters of the library peft in a frozen model, and save them as peft does: pip install peft

python examples/lora.py                  # in a tiny Llama of bytes
python examples/lora.py --model FOLDER   # in any causal model of transformers, whose tokens are bytes here
"""

from __future__ import annotations

import argparse
import pydoc_data.topics
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import rpcpipe as rp


def main() -> None:
    """Train, save the adapters, and read them back into the base."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, help="default: a new temporary folder")
    args = parser.parse_args()
    args.out = args.out or Path(tempfile.mkdtemp())
    if args.model is None:
        args.model, sizes = args.out / "base", {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4}
        config = LlamaConfig(vocab_size=256, num_attention_heads=4, initializer_range=0.1, **sizes)
        LlamaForCausalLM(config).save_pretrained(args.model)
    ids = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()))
    rows = ids[: (args.steps + 1) * 16 * 64].view(-1, 16, 64)
    held_out, *train = [({"input_ids": row}, {"labels": row}) for row in rows]

    base = AutoModelForCausalLM.from_pretrained(args.model)
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    with rp.launch(workers=2) as cluster:
        pipe = rp.from_transformers(
            model, cluster, optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2), chunks=4
        )
        for result in pipe.train(train, ahead=1):
            if result.step % 10 == 0:
                print(f"step {result.step:4}  loss {result.loss:.3f}", flush=True)
        loss = pipe.evaluate([held_out])
        adapters = pipe.state_dict(trainable=True)  # these alone travel
    model.load_state_dict(adapters, strict=False)
    model.save_pretrained(args.out / "adapter")
    size = (args.out / "adapter" / "adapter_model.safetensors").stat().st_size
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(args.model), args.out / "adapter")
    with torch.no_grad():
        again = float(model(**held_out[0], **held_out[1]).loss)
    print(f"{len(adapters)} tensors, {size:,} bytes: loss {again:.5f} in one process, {loss:.5f} in the pipeline")


if __name__ == "__main__":
    main()
