"""Fine-tunes a model by one of the paper's recipes, with ABBA or with PEFT's LoRA of equal size.

    pip install ".[examples]"
    python examples/paper/train.py commonsense --model meta-llama/Llama-3.2-1B --output out
    python examples/paper/train.py math --model mistralai/Mistral-7B-v0.1 --output out --method lora

The adapter is written to OUTPUT, the losses to OUTPUT/log.json. A run that was interrupted goes on from the last whole
checkpoint in OUTPUT/checkpoints. One process drives one GPU; `torchrun` starts several, with the same sequences in a step.
"""
import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import transformers
from data import IGNORED, load_encoded
from datasets import Dataset
from recipes import RECIPES, Recipe, Source
from runs import load_base, load_tokenizer, option_parser, positive, record_settings, write_json
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

import abba_ext


class AdapterTrainer(Trainer):
    """A Trainer whose checkpoints hold the ABBA adapter and not the base model, as they do for PEFT's methods."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        abba_ext.save_adapter(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        abba_ext.load_adapter(self.model, resume_from_checkpoint)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("--method", choices=("abba", "lora"), default="abba")
    parser.add_argument("--data", help="hub name, or .json, .jsonl or .parquet file, with the columns of the recipe's data")
    parser.add_argument("--limit", type=positive, help="training rows, drawn at random (default: the recipe's)")
    parser.add_argument("--rank", type=positive, help="r1 + r2 of ABBA, r of LoRA (default: the recipe's)")
    parser.add_argument("--alpha", type=float, help="α (default: ABBA the recipe's, LoRA twice its rank)")
    parser.add_argument("--lr", type=float, help="peak learning rate (default: the recipe's)")
    parser.add_argument("--batch", type=positive, help="sequences of a forward; those of a step stay the recipe's")
    parser.add_argument("--save-every", type=positive, default=100, help="steps between checkpoints (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def chosen_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe with what the command line changes in it.

    Raises:
        ValueError: The batch does not divide the sequences of a step.
    """
    recipe = RECIPES[args.recipe]
    sequences = recipe.batch * recipe.accumulation
    batch = args.batch or recipe.batch
    if sequences % batch:
        raise ValueError(f"--batch must divide the recipe's {sequences} sequences of a step, got {batch}")
    rank = args.rank or recipe.rank
    alpha = recipe.alpha if args.method == "abba" else 2.0 * rank
    return dataclasses.replace(
        recipe, train=Source(args.data, recipe.train.schema) if args.data else recipe.train, rows=args.limit or recipe.rows,
        batch=batch, accumulation=sequences // batch, rank=rank, alpha=alpha if args.alpha is None else args.alpha,
        learning_rate=recipe.learning_rate if args.lr is None else args.lr)


def attach(model: nn.Module, method: str, recipe: Recipe, seed: int) -> nn.Module:
    """Freezes a base model and attaches the recipe's adapter; returns the model to train."""
    if method == "abba":
        return abba_ext.patch_model(model, abba_ext.AbbaConfig(
            r=recipe.rank, alpha=recipe.alpha, dropout=recipe.dropout, target_modules=recipe.targets, seed=seed))
    import peft

    return peft.get_peft_model(model, peft.LoraConfig(
        r=recipe.rank, lora_alpha=recipe.alpha, lora_dropout=recipe.dropout, target_modules=list(recipe.targets),
        task_type="CAUSAL_LM"))


def training_arguments(recipe: Recipe, args: argparse.Namespace) -> TrainingArguments:
    """The recipe's optimizer, schedule and sequences in a step.

    Raises:
        ValueError: The processes do not divide the forwards of a step, or one process would drive several GPUs.
    """
    settings = TrainingArguments(
        str(args.output / "checkpoints"), num_train_epochs=recipe.epochs, per_device_train_batch_size=recipe.batch,
        learning_rate=recipe.learning_rate, lr_scheduler_type=recipe.schedule, warmup_steps=recipe.warmup, optim="adamw_torch",
        weight_decay=0.0, bf16=args.bf16, save_steps=args.save_every, save_total_limit=2, logging_steps=10, report_to="none",
        seed=args.seed, use_cpu=args.device == "cpu", dataloader_pin_memory=args.device == "cuda",
        ddp_find_unused_parameters=False)
    if settings.n_gpu > 1:
        raise ValueError(f"a process must drive one GPU, got {settings.n_gpu}: choose one with CUDA_VISIBLE_DEVICES, or start "
                         "one process for each with torchrun")
    if recipe.accumulation % settings.world_size:
        raise ValueError(f"the processes must divide the {recipe.accumulation} forwards of a step, got {settings.world_size}")
    settings.gradient_accumulation_steps = recipe.accumulation // settings.world_size
    return settings


def build_trainer(model: nn.Module, tokenizer: Any, dataset: Dataset, settings: TrainingArguments, method: str) -> Trainer:
    """A Trainer for the adapter, which pads every batch to its longest sequence."""
    collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED, pad_to_multiple_of=8)
    trainer = AdapterTrainer if method == "abba" else Trainer
    return trainer(model, settings, data_collator=collator, train_dataset=dataset)


def last_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; the Trainer's state is the last file of one."""
    for path in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            continue
        return str(path)
    return None


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Trains, and returns what it writes to log.json: step, loss, norm of the gradient and learning rate, every ten steps."""
    args = parse_args(argv)
    recipe = chosen_recipe(args)
    transformers.set_seed(args.seed)
    record_settings(args.output / "training.json", {
        "model": args.model, "method": args.method, "seed": args.seed, "bf16": args.bf16, "data": recipe.train.path,
        **{key: value for key, value in dataclasses.asdict(recipe).items() if key not in ("models", "train", "tasks")}})

    tokenizer = load_tokenizer(args.model, padding_side="right")
    dataset = load_encoded(recipe.train, tokenizer, recipe.max_length, recipe.rows, args.seed)
    settings = training_arguments(recipe, args)
    model = attach(load_base(args.model, settings.device, args.bf16), args.method, recipe, args.seed)
    trainer = build_trainer(model, tokenizer, dataset, settings, args.method)
    trainer.train(resume_from_checkpoint=last_checkpoint(args.output / "checkpoints"))
    trainer.save_model(str(args.output))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    if trainer.is_world_process_zero():
        write_json(args.output / "log.json", log)
    return log


if __name__ == "__main__":
    main()
