"""Fine-tunes a causal language model with ABBA and the Hugging Face Trainer; checkpoints resume with --resume.

    pip install ".[examples]"
    python examples/hf_trainer.py --model HuggingFaceTB/SmolLM2-135M --data texts.jsonl --output adapter

Each line of the data is an object with a field "text".
"""
import argparse

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import abba_ext


def main(argv: list[str] | None = None) -> float:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", default="abba_adapter")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT/checkpoints")
    args = parser.parse_args(argv)

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(args.model)
    abba_ext.patch_model(model, abba_ext.AbbaConfig(r=32, alpha=16), verbose=True)

    texts = load_dataset("json", data_files=args.data, split="train")
    texts = texts.map(lambda row: tokenizer(row["text"], truncation=True, max_length=args.max_length),
                      remove_columns=texts.column_names)
    settings = TrainingArguments(f"{args.output}/checkpoints", max_steps=args.steps, learning_rate=1e-3, warmup_steps=0.02,
                                 per_device_train_batch_size=args.batch, save_steps=max(args.steps // 2, 1), logging_steps=10,
                                 report_to="none")
    trainer = Trainer(model, settings, train_dataset=texts, data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False))
    loss = trainer.train(resume_from_checkpoint=args.resume).training_loss
    abba_ext.save_adapter(model, args.output)
    return loss


if __name__ == "__main__":
    main()
