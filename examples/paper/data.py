"""Training and test rows of the recipes: where they come from, the prompt they become, and what is learnt of them."""
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from answers import boxed, find_choice, find_number, normalise
from datasets import Dataset, load_dataset
from recipes import Source

FILES = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
IGNORED = -100  # label of a token that is not learnt


class Example(NamedTuple):
    """A question as a prompt, the response to learn, and its final answer in canonical form (None where none is needed)."""

    prompt: str
    response: str
    answer: str | None = None


def alpaca(instruction: str, context: str = "") -> str:
    """The Alpaca prompt of an instruction, up to its response."""
    if context:
        return ("Below is an instruction that describes a task, paired with an input that provides further context. Write a "
                "response that appropriately completes the request.\n\n"
                f"### Instruction:\n{instruction}\n\n### Input:\n{context}\n\n### Response:")
    return ("Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            f"### Instruction:\n{instruction}\n\n### Response:")


def _metamath(row: Mapping[str, Any]) -> Example:
    return Example(alpaca(row["query"]), row["response"])


def _gsm8k(row: Mapping[str, Any]) -> Example:
    return Example(alpaca(row["question"]), row["answer"], find_number(row["answer"]))


def _math(row: Mapping[str, Any]) -> Example:
    answer = boxed(row["solution"])
    return Example(alpaca(row["problem"]), row["solution"], None if answer is None else normalise(answer))


def _commonsense(row: Mapping[str, Any]) -> Example:
    return Example(alpaca(row["instruction"], row["input"]), row["output"], find_choice(row["answer"], row["answer"]))


# columns that rows must have, and what makes an example of a row
SCHEMAS: dict[str, tuple[tuple[str, ...], Callable[[Mapping[str, Any]], Example]]] = {
    "metamath": (("query", "response"), _metamath),
    "gsm8k": (("question", "answer"), _gsm8k),
    "math": (("problem", "solution"), _math),
    "commonsense": (("instruction", "input", "output", "answer"), _commonsense),
}


def load_rows(source: Source, limit: int | None = None, seed: int | None = None) -> Dataset:
    """The rows of a file or hub data set.

    Args:
        source: See :class:`recipes.Source`.
        limit: How many rows at most; None for all.
        seed: Shuffles the rows before they are counted; None keeps their order.

    Raises:
        ValueError: There are no rows, or they lack a column.
    """
    kind = FILES.get(PurePosixPath(source.path).suffix)
    if kind:
        rows = load_dataset(kind, data_files=source.path, split="train")
    else:
        rows = load_dataset(source.path, source.config, split=source.split)
    columns, _ = SCHEMAS[source.schema]
    missing = [column for column in columns if column not in rows.column_names]
    if missing:
        raise ValueError(f"{source.path!r} must have the columns {list(columns)}, got {rows.column_names}")
    if not len(rows):
        raise ValueError(f"{source.path!r} must have rows, got none")
    if seed is not None:
        rows = rows.shuffle(seed=seed)
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def example(schema: str, row: Mapping[str, Any]) -> Example:
    """What a row of a schema asks and teaches.

    Raises:
        ValueError: A column is empty, other than "input".
    """
    columns, convert = SCHEMAS[schema]
    empty = [column for column in columns if column != "input" and not row[column]]
    if empty:
        raise ValueError(f"a row must have text in {empty}, got {dict(row)}")
    return convert(row)


def load_questions(source: Source, limit: int | None = None) -> list[Example]:
    """The rows of a test set as examples, all of which have an answer.

    Raises:
        ValueError: See :func:`load_rows`; or the answer of a row cannot be found.
    """
    questions = [example(source.schema, row) for row in load_rows(source, limit)]
    for number, question in enumerate(questions, start=1):
        if not question.answer:
            raise ValueError(f"row {number} of {source.path!r} must hold a final answer, got {question.response!r}")
    return questions


def encode(tokenizer: Any, item: Example, max_length: int) -> dict[str, list[int]]:
    """Prompt, response and end token as ids, and labels that are IGNORED on the prompt.

    Text beyond max_length is cut off, and the end token with it.
    """
    encoded = tokenizer(f"{item.prompt} {item.response}", return_offsets_mapping=True, truncation=True, max_length=max_length)
    ids = encoded["input_ids"]
    learnt = [end > len(item.prompt) for _, end in encoded["offset_mapping"]]
    if ids[-1] == tokenizer.eos_token_id:
        learnt[-1] = True
    elif len(ids) < max_length:
        ids, learnt = [*ids, tokenizer.eos_token_id], [*learnt, True]
    return {"input_ids": ids, "attention_mask": [1] * len(ids),
            "labels": [token if label else IGNORED for token, label in zip(ids, learnt, strict=True)]}


def load_encoded(source: Source, tokenizer: Any, max_length: int, limit: int | None, seed: int) -> Dataset:
    """Rows drawn at random as :func:`encode` gives them, without those whose prompt leaves no room for a response.

    Raises:
        ValueError: See :func:`load_rows`; or no row is left.
    """
    rows = load_rows(source, limit, seed)
    options = {"keep_in_memory": True, "load_from_cache_file": False}
    encoded = rows.map(lambda row: encode(tokenizer, example(source.schema, row), max_length),
                       remove_columns=rows.column_names, desc="tokenizing", **options)
    kept = encoded.filter(lambda row: any(label != IGNORED for label in row["labels"]), desc="filtering", **options)
    if len(kept) < len(encoded):
        print(f"left out {len(encoded) - len(kept)} of {len(encoded)} rows, whose prompts have {max_length} tokens or more")
    if not len(kept):
        raise ValueError(f"{source.path!r} must have rows with prompts shorter than {max_length} tokens, got none")
    return kept
