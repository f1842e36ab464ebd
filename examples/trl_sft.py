"""Supervised fine-tuning with TRL's SFTTrainer and ABBA as a PEFT method.

    pip install ".[examples]"
    python examples/trl_sft.py --model HuggingFaceTB/SmolLM2-135M --data texts.jsonl --output adapter

Each line of the data is an object with a field "text" (or "messages", or "prompt" and "completion": whatever TRL takes).
"""
import argparse

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from abba_ext.peft import AbbaPeftConfig


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="abba_adapter")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    args = parser.parse_args(argv)

    trainer = SFTTrainer(
        model=args.model,
        args=SFTConfig(args.output, max_steps=args.steps, learning_rate=1e-3, per_device_train_batch_size=args.batch,
                       max_length=args.max_length, save_strategy="no", logging_steps=10, report_to="none",
                       use_cpu=not torch.accelerator.is_available()),
        train_dataset=load_dataset("json", data_files=args.data, split="train"),
        peft_config=AbbaPeftConfig(r=32, alpha=16, task_type="CAUSAL_LM"),
    )
    trainer.model.print_trainable_parameters()
    loss = trainer.train().training_loss
    trainer.save_model(args.output)  # PeftModel and AutoModelForCausalLM load it, once abba_ext.peft is imported
    return loss


if __name__ == "__main__":
    main()
