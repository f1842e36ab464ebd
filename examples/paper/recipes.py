"""The paper's two fine-tuning recipes (arXiv 2505.14238, Table 13): models, data, hyper-parameters and evaluation."""
from collections.abc import Mapping
from dataclasses import dataclass

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "gate_proj", "down_proj")
LLM_ADAPTERS = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main"


@dataclass(frozen=True)
class Source:
    """Where rows come from.

    Attributes:
        path: Name of a data set on the Hugging Face hub; or path or URL of a .json, .jsonl or .parquet file.
        schema: The rows' columns, a key of data.SCHEMAS.
        config: Configuration of a hub data set that has several.
        split: Split of a hub data set; a file is one split.
    """

    path: str
    schema: str
    config: str | None = None
    split: str = "train"


@dataclass(frozen=True)
class Task:
    """A test set, and how many tokens an answer to one of its questions may have."""

    source: Source
    max_new_tokens: int


@dataclass(frozen=True)
class Recipe:
    """A fine-tuning with AdamW, without weight decay, of a base in bfloat16, and the tasks that it is judged by.

    Attributes:
        models: Hub names of the base models that the paper fine-tunes so.
        train: What is trained on.
        tasks: What is evaluated, by name.
        rows: Training rows, drawn at random; None for all.
        batch: Sequences of a forward.
        accumulation: Forwards of an optimizer step.
        max_length: Tokens of a sequence; longer ones lose their end.
        epochs: Passes through the training rows.
        dropout: On the adapter's input.
        schedule: Of the learning rate after the warmup, down to 0: "linear" or "cosine".
        answer_start: What the response begins with in evaluation, after the prompt.
        learning_rate: Its peak.
        warmup: Share of the steps in which the learning rate rises.
        rank: r1 + r2 of ABBA, r of LoRA.
        alpha: α of ABBA, out of the best values in Tables 4 and 8.
        targets: Names of the adapted layers.
    """

    models: tuple[str, ...]
    train: Source
    tasks: Mapping[str, Task]
    rows: int | None
    batch: int
    accumulation: int
    max_length: int
    epochs: int
    dropout: float
    schedule: str
    answer_start: str = ""
    learning_rate: float = 1e-3
    warmup: float = 0.02
    rank: int = 32
    alpha: float = 16.0
    targets: tuple[str, ...] = TARGETS


def _commonsense(folder: str) -> Task:
    return Task(Source(f"{LLM_ADAPTERS}/dataset/{folder}/test.json", "commonsense"), max_new_tokens=32)


RECIPES = {
    "commonsense": Recipe(
        models=("meta-llama/Llama-3.2-1B", "meta-llama/Llama-3.2-3B"),
        train=Source("zwhe99/commonsense_170k", "commonsense"),
        tasks={
            "boolq": _commonsense("boolq"),
            "piqa": _commonsense("piqa"),
            "siqa": _commonsense("social_i_qa"),
            "hellaswag": _commonsense("hellaswag"),
            "winogrande": _commonsense("winogrande"),
            "arc_easy": _commonsense("ARC-Easy"),
            "arc_challenge": _commonsense("ARC-Challenge"),
            "openbookqa": _commonsense("openbookqa"),
        },
        rows=None, batch=6, accumulation=24, max_length=256, epochs=2, dropout=0.05, schedule="linear"),
    "math": Recipe(
        models=("mistralai/Mistral-7B-v0.1", "google/gemma-2-9b"),
        train=Source("meta-math/MetaMathQA", "metamath"),
        tasks={
            "gsm8k": Task(Source("openai/gsm8k", "gsm8k", "main", "test"), max_new_tokens=512),
            "math": Task(Source("DigitalLearningGmbH/MATH-lighteval", "math", split="test"), max_new_tokens=2048),
        },
        rows=20_000, batch=1, accumulation=32, max_length=512, epochs=1, dropout=0.0, schedule="cosine",
        answer_start=" Let's think step by step."),
}
