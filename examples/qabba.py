"""QABBA: a 4-bit base (bitsandbytes NF4) fine-tuned through ABBA factors in fp32; runs on a CPU too.

    pip install ".[examples]" bitsandbytes
    python examples/qabba.py --model HuggingFaceTB/SmolLM2-135M --data texts.jsonl --output adapter

Each line of the data is an object with a field "text". The factors start from the SVD of the dequantised weights.
"""
import argparse

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import abba_ext


def main(argv: list[str] | None = None) -> list[float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="abba_adapter")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"],
                        help="of activations and products; float32 is faster on a CPU without bf16 instructions")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    dtype = getattr(torch, args.dtype)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(args.model, quantization_config=four_bit, dtype=dtype)
    abba_ext.patch_model(model, abba_ext.AbbaConfig(r=32, alpha=16), verbose=True)
    texts = load_dataset("json", data_files=args.data, split="train")["text"]
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)

    torch.manual_seed(0)
    losses = []
    for step in range(args.steps):
        chosen = [texts[i] for i in torch.randint(len(texts), (args.batch,)).tolist()]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=args.max_length).to(model.device)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        loss = model(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: loss {losses[-1]:.4f}")
    abba_ext.save_adapter(model, args.output)
    return losses


if __name__ == "__main__":
    main()
