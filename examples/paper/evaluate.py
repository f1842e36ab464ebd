"""Evaluates a model, with or without an adapter, on the tasks of one of the paper's recipes.

    python examples/paper/evaluate.py commonsense --model meta-llama/Llama-3.2-1B --adapter out --output out/eval
    python examples/paper/evaluate.py math --model mistralai/Mistral-7B-v0.1 --adapter out --output out/eval --tasks gsm8k

Greedy generation; an answer is right if its final answer equals the data set's. Every answer is a line of
OUTPUT/TASK.jsonl, from where an interrupted evaluation goes on; the accuracies are in OUTPUT/scores.json. The adapter may
be one of train.py, by either method.
"""
import argparse
import dataclasses
import hashlib
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from answers import find_answer
from data import Example, load_questions
from recipes import RECIPES, Source
from runs import load_base, load_tokenizer, option_parser, positive, record_settings, write_json
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig

import abba_ext
from abba_ext.checkpoint import WEIGHTS_NAME, replace_file
from abba_ext.formats.adapter import PEFT_CONFIG_NAME


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = option_parser(__doc__)
    parser.add_argument("--adapter", type=Path, help="folder of an ABBA or PEFT adapter (default: the base model alone)")
    parser.add_argument("--merge", action=argparse.BooleanOptionalAction, default=True,
                        help="merge the adapter into the weights first, which is faster (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="some of the recipe's tasks (default: all)")
    parser.add_argument("--data", nargs="+", default=[], metavar="TASK=SOURCE",
                        help="hub names, or .json, .jsonl or .parquet files, with the columns of the recipe's data")
    parser.add_argument("--limit", type=positive, help="questions of a task, the first ones (default: all)")
    parser.add_argument("--batch", type=positive, default=32, help="questions of a generation (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=positive, help="tokens of an answer (default: the recipe's)")
    args = parser.parse_args(argv)
    tasks = RECIPES[args.recipe].tasks
    args.tasks = args.tasks or list(tasks)
    args.data = dict(entry.partition("=")[::2] for entry in args.data)
    for name in (*args.tasks, *args.data):
        if name not in tasks:
            parser.error(f"--tasks and --data must name tasks out of {', '.join(tasks)}, got {name!r}")
    return args


def load_model(args: argparse.Namespace) -> nn.Module:
    """The base model with the adapter, for greedy generation."""
    model = load_base(args.model, args.device, args.bf16)
    model.generation_config = GenerationConfig()  # without what the model's own says about sampling
    if args.adapter is None:
        return model.eval()
    if (args.adapter / PEFT_CONFIG_NAME).exists():
        import peft

        from abba_ext.peft import AbbaPeftConfig  # noqa: F401  (the import makes the method known)

        model = peft.PeftModel.from_pretrained(model, args.adapter)
        return (model.merge_and_unload(safe_merge=True) if args.merge else model).eval()
    abba_ext.load_adapter(model, args.adapter)
    return (abba_ext.merge_and_unload(model, safe=True) if args.merge else model).eval()


@torch.inference_mode()
def generate(model: nn.Module, tokenizer: Any, prompts: list[str], max_new_tokens: int) -> list[str]:
    """The likeliest continuation of every prompt, token by token."""
    inputs = tokenizer(prompts, padding=True, return_tensors="pt", return_token_type_ids=False).to(model.device)
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=tokenizer.eos_token_id,
                            pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].size(1):], skip_special_tokens=True)


def read_results(path: Path, questions: list[Example]) -> dict[int, dict[str, Any]]:
    """The answers in a file by their question's index. A last line that was cut off is removed from it.

    Raises:
        ValueError: They are answers to other questions.
    """
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8")
    whole = text[:text.rfind("\n") + 1]
    if whole != text:
        replace_file(str(path), lambda part: Path(part).write_text(whole, encoding="utf-8"))
    results = {result["index"]: result for result in map(json.loads, whole.splitlines()) if result["index"] < len(questions)}
    for index, result in results.items():
        if result["prompt"] != questions[index].prompt:
            raise ValueError(f"{path} must hold answers to the same questions, but question {index} was {result['prompt']!r} and "
                             f"is {questions[index].prompt!r}")
    return results


def batches(tokenizer: Any, prompts: dict[int, str], size: int) -> Iterator[list[int]]:
    """The prompts' indices in groups of similar length, the longest first: what does not fit into memory fails at once."""
    lengths = {index: len(tokenizer(prompt)["input_ids"]) for index, prompt in prompts.items()}
    order = sorted(prompts, key=lengths.__getitem__, reverse=True)
    return (order[start: start + size] for start in range(0, len(order), size))


def evaluate(model: nn.Module, tokenizer: Any, questions: list[Example], schema: str, path: Path, *, answer_start: str,
             max_new_tokens: int, batch: int) -> dict[str, float]:
    """Answers what is not yet answered in a file, and scores all of it.

    Args:
        model: The model.
        tokenizer: Its tokenizer, which pads on the left.
        questions: See :func:`data.load_questions`.
        schema: Theirs, a key of data.SCHEMAS.
        path: The .jsonl file of the answers, appended to after every batch.
        answer_start: What every response begins with.
        max_new_tokens: Tokens of an answer.
        batch: Questions of a generation.

    Returns:
        "correct" and "items", the numbers of right answers and of questions, and "accuracy".
    """
    results = read_results(path, questions)
    prompts = {index: item.prompt + answer_start for index, item in enumerate(questions) if index not in results}
    with (open(path, "a", encoding="utf-8") as file,
          tqdm(total=len(questions), initial=len(results), desc=path.stem, unit="question") as bar):
        for group in batches(tokenizer, prompts, batch):
            for index, output in zip(group, generate(model, tokenizer, [prompts[index] for index in group], max_new_tokens),
                                     strict=True):
                item = questions[index]
                found = find_answer(schema, output, item.answer)
                results[index] = {"index": index, "prompt": item.prompt, "output": output, "answer": item.answer, "found": found,
                                  "correct": found == item.answer}
            file.write("".join(json.dumps(results[index]) + "\n" for index in group))
            file.flush()
            bar.update(len(group))
    correct = sum(result["correct"] for result in results.values())
    return {"correct": correct, "items": len(questions), "accuracy": correct / len(questions)}


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Evaluates, and returns what it writes to scores.json."""
    args = parse_args(argv)
    recipe = RECIPES[args.recipe]
    tasks = {}
    for name in args.tasks:
        task = recipe.tasks[name]
        source = Source(args.data[name], task.source.schema) if name in args.data else task.source
        tasks[name] = (source, load_questions(source, args.limit), args.max_new_tokens or task.max_new_tokens)
    weights = args.adapter and args.adapter / WEIGHTS_NAME
    for name, (source, _, max_new_tokens) in tasks.items():
        record_settings(args.output / f"{name}.json", {
            "model": args.model, "adapter": weights and hashlib.sha256(weights.read_bytes()).hexdigest(), "merge": args.merge,
            "bf16": args.bf16, "answer_start": recipe.answer_start, "max_new_tokens": max_new_tokens,
            **dataclasses.asdict(source)})

    tokenizer, model = load_tokenizer(args.model, padding_side="left"), load_model(args)
    scores = {name: evaluate(model, tokenizer, questions, source.schema, args.output / f"{name}.jsonl", batch=args.batch,
                             answer_start=recipe.answer_start, max_new_tokens=max_new_tokens)
              for name, (source, questions, max_new_tokens) in tasks.items()}
    summary = {"tasks": scores, "mean": statistics.fmean(score["accuracy"] for score in scores.values())}
    write_json(args.output / "scores.json", summary)
    for name, score in scores.items():
        print(f"{name:<14}{score['accuracy']:>7.2%}  {score['correct']} of {score['items']}")
    print(f"{'mean':<14}{summary['mean']:>7.2%}")
    return summary


if __name__ == "__main__":
    main()
