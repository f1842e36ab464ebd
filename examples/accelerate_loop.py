"""A training loop of one's own with accelerate: one device or many, any precision.

    pip install ".[examples]"
    accelerate launch examples/accelerate_loop.py --model HuggingFaceTB/SmolLM2-135M --data texts.jsonl --output adapter

Each line of the data is an object with a field "text".
"""
import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

import abba_ext


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="abba_adapter")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    args = parser.parse_args(argv)

    accelerator = Accelerator(gradient_accumulation_steps=2)
    set_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = abba_ext.patch_model(AutoModelForCausalLM.from_pretrained(args.model), abba_ext.AbbaConfig(r=32, alpha=16))
    texts = load_dataset("json", data_files=args.data, split="train")
    rows = [tokenizer(text, truncation=True, max_length=args.max_length) for text in texts["text"]]
    loader = torch.utils.data.DataLoader(rows, args.batch, shuffle=True,
                                         collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    model, optimizer, loader = accelerator.prepare(model.train(), optimizer, loader)

    losses = []
    for _ in range(args.epochs):
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(accelerator.reduce(loss.detach(), "mean").item())
            accelerator.print(f"batch {len(losses)}: loss {losses[-1]:.4f}")
    abba_ext.save_adapter(accelerator.unwrap_model(model), args.output)  # every process: the adapter may be sharded
    return losses


if __name__ == "__main__":
    main()
