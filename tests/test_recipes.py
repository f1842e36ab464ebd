"""The paper's recipes: rows, prompts, labels, the optimizer of Table 13, resuming, generation, final answers."""
import json
import math
import sys
from pathlib import Path

import pytest
import torch

for package in ("accelerate", "datasets", "peft", "tqdm", "transformers"):
    pytest.importorskip(package)
PAPER = Path(__file__).parents[1] / "examples" / "paper"
sys.path.insert(0, str(PAPER))

import answers  # noqa: E402
import data  # noqa: E402
import evaluate  # noqa: E402
import recipes  # noqa: E402
import runs  # noqa: E402
import train  # noqa: E402
from datasets import Dataset  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import abba_ext  # noqa: E402

METAMATH = [{"type": "GSM_Rephrased", "query": f"Ann has {a} pens and gets {b} more. How many has she?",
             "original_question": "Pens?", "response": f"She has {a} + {b} = {a + b} pens.\nThe answer is: {a + b}"}
            for a in range(1, 9) for b in range(1, 9)]
GSM8K = [{"question": f"A box holds {n} eggs. How many are in {n} boxes?",
          "answer": f"There are {n} * {n} = <<{n}*{n}={n * n}>>{n * n} eggs.\n#### {n * n:,}"} for n in (3, 12, 40, 55)]
MATH = [{"problem": f"Halve ${n}$." + " Show your work." * (n // 9), "level": "Level 1", "type": "Prealgebra",
         "solution": f"We get ${n}/2 = \\boxed{{\\frac{{{n}}}{{2}}}}$."} for n in (3, 14, 9)]
COMMONSENSE = [{"instruction": f"Please choose the correct answer to the question: What is near {n}?\n\nAnswer1: {n + 1} "
                               f"Answer2: {n + 70}\n\nAnswer format: answer1/answer2", "input": "",
                "output": f"the correct answer is answer{1 + n % 2}", "answer": f"answer{1 + n % 2}"} for n in range(150)]
ROWS = {"metamath": METAMATH, "gsm8k": GSM8K, "math": MATH, "commonsense": COMMONSENSE}


def write(path, rows):
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Folder of a random Llama with a byte-level tokenizer that puts a token in front of a text, as Llama's does."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = [f"{item.prompt} {item.response}" for schema, rows in ROWS.items() for item in map(data.SCHEMAS[schema][1], rows)]
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<bos>", "<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    tokenizer.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])])
    folder = tmp_path_factory.mktemp("base")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=512, bos_token_id=0, eos_token_id=1)).save_pretrained(folder)
    return str(folder)


# --- rows, prompts and labels ---


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet"])
def test_files_of_every_kind(tmp_path, suffix):
    rows = data.load_rows(recipes.Source(write(tmp_path / f"rows{suffix}", METAMATH), "metamath"))
    assert list(rows) == METAMATH


@pytest.mark.parametrize(("schema", "row", "question", "answer"), [
    ("metamath", METAMATH[0], METAMATH[0]["query"], None),
    ("gsm8k", GSM8K[2], GSM8K[2]["question"], "1600"),
    ("math", MATH[1], MATH[1]["problem"], "7"),
    ("commonsense", COMMONSENSE[3], COMMONSENSE[3]["instruction"], "answer2"),
])
def test_schemas(schema, row, question, answer):
    item = data.example(schema, row)
    assert item.prompt == ("Below is an instruction that describes a task. Write a response that appropriately completes the "
                           f"request.\n\n### Instruction:\n{question}\n\n### Response:")
    assert item.response in row.values() and item.answer == answer


def test_prompt_with_input():
    assert data.alpaca("Add.", "1, 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a response "
        "that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:")


def test_hub_data_sets(monkeypatch):
    """The one thing that needs a network: what is asked of it."""
    asked = []

    def load(*names, **options):
        asked.append((*names, options))
        return Dataset.from_list(ROWS[schema])

    monkeypatch.setattr(data, "load_dataset", load)
    for recipe in recipes.RECIPES.values():
        for source in (recipe.train, *(task.source for task in recipe.tasks.values())):
            schema = source.schema
            assert len(data.load_rows(source, limit=2)) == 2
    github = "https://raw.githubusercontent.com/AGI-Edgerunners/LLM-Adapters/main/dataset"
    folders = ("boolq", "piqa", "social_i_qa", "hellaswag", "winogrande", "ARC-Easy", "ARC-Challenge", "openbookqa")
    assert asked == [
        ("zwhe99/commonsense_170k", None, {"split": "train"}),
        *(("json", {"data_files": f"{github}/{folder}/test.json", "split": "train"}) for folder in folders),
        ("meta-math/MetaMathQA", None, {"split": "train"}),
        ("openai/gsm8k", "main", {"split": "test"}),
        ("DigitalLearningGmbH/MATH-lighteval", None, {"split": "test"}),
    ]


def test_rows_are_drawn_by_seed(tmp_path):
    source = recipes.Source(write(tmp_path / "rows.jsonl", METAMATH), "metamath")
    drawn = [[row["query"] for row in data.load_rows(source, limit=10, seed=seed)] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10
    assert list(data.load_rows(source, limit=10)) == METAMATH[:10]


@pytest.mark.parametrize(("rows", "message"), [
    ([{"question": "Why?"}], r"must have the columns \['problem', 'solution'\], got \['question'\]"),
    ([{"problem": "Why?", "solution": "So."}], r"row 1 of .* must hold a final answer, got 'So.'"),
    ([{"problem": "Why?", "solution": None}], r"a row must have text in \['solution'\]"),
])
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        data.load_questions(recipes.Source(write(tmp_path / "rows.jsonl", rows), "math"))


def test_labels_are_the_response_alone(base):
    tokenizer = runs.load_tokenizer(base, "right")
    for schema, rows in ROWS.items():
        for item in (data.example(schema, row) for row in rows[:5]):
            encoded = data.encode(tokenizer, item, 512)
            learnt = [token for token in encoded["labels"] if token != -100]
            prompt = encoded["input_ids"][:len(encoded["labels"]) - len(learnt)]
            assert encoded["labels"] == [-100] * len(prompt) + learnt
            assert encoded["input_ids"] == prompt + learnt
            assert prompt == tokenizer(item.prompt)["input_ids"]
            assert tokenizer.decode(learnt) == f" {item.response}<eos>"


def test_long_rows_lose_their_end(base, tmp_path, capsys):
    tokenizer = runs.load_tokenizer(base, "right")
    item = data.example("metamath", METAMATH[0])
    whole = data.encode(tokenizer, item, 512)
    length = len(whole["input_ids"])
    assert data.encode(tokenizer, item, length) == whole
    cut = data.encode(tokenizer, item, length - 3)
    assert cut == {key: values[:length - 3] for key, values in whole.items()}

    rows = [METAMATH[0], {**METAMATH[1], "query": "why " * 500}]
    source = recipes.Source(write(tmp_path / "rows.jsonl", rows), "metamath")
    kept = data.load_encoded(source, tokenizer, 512, limit=None, seed=0)
    assert list(kept) == [whole]
    assert "left out 1 of 2 rows" in capsys.readouterr().out
    with pytest.raises(ValueError, match="prompts shorter than 8 tokens, got none"):
        data.load_encoded(source, tokenizer, 8, limit=None, seed=0)


# --- training ---


@pytest.mark.parametrize(("name", "rows", "sequences", "steps", "warmup", "length", "dropout"), [
    ("commonsense", 170_420, 6 * 24, 2 * 1184, 48, 256, 0.05),
    ("math", 20_000, 1 * 32, 625, 13, 512, 0.0),
])
def test_table_13(base, tmp_path, name, rows, sequences, steps, warmup, length, dropout):
    args = train.parse_args([name, "--model", base, "--output", str(tmp_path), "--device", "cpu"])
    recipe = train.chosen_recipe(args)
    model = train.attach(runs.load_base(base, "cpu", args.bf16), args.method, recipe, args.seed)
    layers = abba_ext.abba_layers(model)
    assert sorted(layer.rpartition(".")[2] for layer in layers) == sorted(recipes.TARGETS)
    assert all(layer.abba_ranks == (16, 16) and layer.abba_dropout == dropout for layer in layers.values())
    assert all(layer.abba_scale == 16**2 / 16 and layer.weight.dtype == torch.bfloat16 for layer in layers.values())
    assert recipe.max_length == length and (recipe.rows or rows) == rows

    dataset = Dataset.from_dict({"input_ids": [[0]] * rows})
    settings = train.training_arguments(recipe, args)
    trainer = train.build_trainer(model, runs.load_tokenizer(base, "right"), dataset, settings, args.method)
    *_, total_batch, _, max_steps = trainer.set_initial_training_values(settings, trainer.get_train_dataloader())
    assert (total_batch, max_steps) == (sequences, steps)
    trainer.create_optimizer_and_scheduler(max_steps)
    assert type(trainer.optimizer) is torch.optim.AdamW
    assert all(group["weight_decay"] == 0 and group["initial_lr"] == 1e-3 for group in trainer.optimizer.param_groups)
    assert sum(len(group["params"]) for group in trainer.optimizer.param_groups) == 4 * len(layers)
    for step in (0, 1, warmup - 1, warmup, steps // 3, steps // 2, steps - 1, steps):
        left = (steps - step) / (steps - warmup)
        after = left if name == "commonsense" else 0.5 * (1 + math.cos(math.pi * (1 - left)))
        for factor in trainer.lr_scheduler.lr_lambdas:
            assert factor(step) == pytest.approx(step / warmup if step < warmup else after), step


def run_training(name, base, rows, output, *options):
    return train.main([name, "--model", base, "--output", str(output), "--data", rows, "--device", "cpu", "--rank", "4",
                       "--save-every", "1", *map(str, options)])


@pytest.mark.parametrize("method", ["abba", "lora"])
def test_killed_and_resumed_training_is_the_same(base, tmp_path, monkeypatch, method):
    """Two epochs of two steps with dropout, cut off in the third step, with a later checkpoint that is half written."""
    rows = write(tmp_path / "rows.json", COMMONSENSE)
    options = ("--batch", 48, "--method", method, "--no-bf16")
    run_training("commonsense", base, rows, tmp_path / "whole", *options)
    assert train.last_checkpoint(tmp_path / "whole" / "checkpoints") == str(tmp_path / "whole" / "checkpoints" / "checkpoint-4")

    forwards, step = [], train.Trainer.training_step

    def killed(*args, **kwargs):
        forwards.append(None)
        if len(forwards) == 6:  # 3 of the first epoch and step, 1 of the second step; then the third
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train.Trainer, "training_step", killed)
        run_training("commonsense", base, rows, tmp_path / "resumed", *options)
    checkpoints = tmp_path / "resumed" / "checkpoints"
    assert not (tmp_path / "resumed" / "adapter_model.safetensors").exists()
    assert train.last_checkpoint(checkpoints) == str(checkpoints / "checkpoint-2")
    assert not list(checkpoints.rglob("model*.safetensors"))
    (checkpoints / "checkpoint-3").mkdir()
    (checkpoints / "checkpoint-3" / "trainer_state.json").write_text('{"epoch": 1', encoding="utf-8")

    forwards.clear()
    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "training_step", lambda *args, **kwargs: (forwards.append(None), step(*args, **kwargs))[1])
        run_training("commonsense", base, rows, tmp_path / "resumed", *options)
    assert len(forwards) == 4  # the second epoch's
    whole, resumed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
    with pytest.raises(ValueError, match=r"holds a run with learning_rate 0.001, got 0.5: choose another --output"):
        run_training("commonsense", base, rows, tmp_path / "resumed", *options, "--lr", "0.5")


def test_bad_batch_is_named(base, tmp_path):
    with pytest.raises(ValueError, match="--batch must divide the recipe's 32 sequences of a step, got 5"):
        run_training("math", base, "rows.json", tmp_path, "--batch", 5)


# --- evaluation ---


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    """Folder of an adapter that the math recipe trained for ten steps, in bfloat16."""
    folder = tmp_path_factory.mktemp("math")
    rows = [*METAMATH] * 5
    log = run_training("math", base, write(folder / "rows.jsonl", rows), folder / "out", "--batch", 16, "--lr", "0.02")
    assert [entry["step"] for entry in log] == [10] and 0 < log[0]["loss"] < math.log(600)
    assert json.loads((folder / "out" / "log.json").read_text(encoding="utf-8")) == log
    assert all(value.dtype == torch.float32 for value in load_file(folder / "out" / "adapter_model.safetensors").values())
    return str(folder / "out")


def run_evaluation(base, output, *options):
    scores = evaluate.main(["math", "--model", base, "--output", str(output), "--device", "cpu", "--no-bf16",
                            "--max-new-tokens", "6", *map(str, options)])
    results = {path.stem: {entry["index"]: entry for entry in map(json.loads, path.read_text(encoding="utf-8").splitlines())}
               for path in output.glob("*.jsonl")}
    return scores, results


@pytest.fixture
def sources(tmp_path):
    return ["--data", f"gsm8k={write(tmp_path / 'questions.parquet', GSM8K)}", f"math={write(tmp_path / 'problems.json', MATH)}"]


def test_batched_generation_is_that_of_single_questions(base, adapter, sources, tmp_path):
    scores, batched = run_evaluation(base, tmp_path / "batched", *sources, "--adapter", adapter, "--batch", 4)
    _, single = run_evaluation(base, tmp_path / "single", *sources, "--adapter", adapter, "--batch", 1)
    assert batched == single
    assert [len(batched[name]) for name in ("gsm8k", "math")] == [4, 3]
    assert json.loads((tmp_path / "batched" / "scores.json").read_text(encoding="utf-8")) == scores
    _, unmerged = run_evaluation(base, tmp_path / "unmerged", *sources, "--adapter", adapter, "--no-merge")
    assert unmerged == batched
    _, plain = run_evaluation(base, tmp_path / "plain", *sources)
    assert plain != batched

    tokenizer = runs.load_tokenizer(base, "left")
    model = abba_ext.load_adapter(runs.load_base(base, "cpu", bf16=False), adapter).eval()
    for index, row in enumerate(GSM8K):
        ids = tokenizer(data.alpaca(row["question"]) + " Let's think step by step.", return_tensors="pt")["input_ids"]
        start = ids.size(1)
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        text = tokenizer.decode(ids[0, start:]).partition("<eos>")[0]
        assert batched["gsm8k"][index]["output"] == text


def test_lora_adapters_are_evaluated(base, sources, tmp_path):
    rows = write(tmp_path / "rows.jsonl", METAMATH)
    run_training("math", base, rows, tmp_path / "lora", "--batch", 16, "--lr", "0.05", "--method", "lora", "--no-bf16")
    config = json.loads((tmp_path / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], sorted(config["target_modules"])) == (4, 8.0, sorted(recipes.TARGETS))
    _, merged = run_evaluation(base, tmp_path / "merged", *sources, "--adapter", tmp_path / "lora")
    _, unmerged = run_evaluation(base, tmp_path / "unmerged", *sources, "--adapter", tmp_path / "lora", "--no-merge")
    assert merged == unmerged != run_evaluation(base, tmp_path / "plain", *sources)[1]


def test_evaluation_goes_on_where_it_was_interrupted(base, sources, tmp_path, monkeypatch):
    asked = []

    def respond(model, tokenizer, prompts, max_new_tokens):
        if len(asked) == 5:
            raise KeyboardInterrupt
        asked.extend(prompts)
        return ["It is 9.\nThe answer is: 9" if "3 eggs" in prompt else "so \\boxed{7.0}" for prompt in prompts]

    monkeypatch.setattr(evaluate, "generate", respond)
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(base, tmp_path / "eval", *sources, "--batch", 1)
    assert not (tmp_path / "eval" / "scores.json").exists()
    whole = (tmp_path / "eval" / "math.jsonl").read_bytes()
    (tmp_path / "eval" / "math.jsonl").write_bytes(whole + b'{"index": 2, "prompt": "Below')
    asked.append(None)
    scores, results = run_evaluation(base, tmp_path / "eval", *sources, "--batch", 1)
    asked.remove(None)
    assert len(asked) == len(set(asked)) == 7
    assert {name: sorted(entries) for name, entries in results.items()} == {"gsm8k": [0, 1, 2, 3], "math": [0, 1, 2]}
    assert scores == {"tasks": {"gsm8k": {"correct": 1, "items": 4, "accuracy": 0.25},
                                "math": {"correct": 1, "items": 3, "accuracy": 1 / 3}}, "mean": (1 / 4 + 1 / 3) / 2}

    assert run_evaluation(base, tmp_path / "eval", *sources, "--tasks", "gsm8k", "--limit", 1)[0]["mean"] == 1.0
    assert len(asked) == 7
    with pytest.raises(ValueError, match=r"holds a run with merge True, got False"):
        run_evaluation(base, tmp_path / "eval", *sources, "--no-merge")
    write(tmp_path / "problems.json", MATH[::-1])
    with pytest.raises(ValueError, match=r"math.jsonl must hold answers to the same questions, but question 2 was"):
        run_evaluation(base, tmp_path / "eval", *sources)


def test_the_longest_questions_come_first(base):
    tokenizer = runs.load_tokenizer(base, "left")
    prompts = {0: "a b", 5: "a b c d e f", 7: "a", 8: "a b c d"}
    assert list(evaluate.batches(tokenizer, prompts, 3)) == [[5, 8, 0], [7]]


def test_bad_task_is_named(capsys):
    with pytest.raises(SystemExit):
        evaluate.parse_args(["math", "--model", "m", "--output", "o", "--data", "piqa=rows.json"])
    assert "--tasks and --data must name tasks out of gsm8k, math, got 'piqa'" in capsys.readouterr().err


# --- final answers ---


@pytest.mark.parametrize(("text", "number"), [
    ("7 + 8 is 15.\nThe answer is: 15", "15"),
    ("The answer is 15.", "15"),
    ("The answer is: 1,234,567 coins", "1234567"),
    ("The answer is: $1,200.50.", "2401/2"),
    ("The answer is: -$5", "-5"),
    ("The answer is: $-5", "-5"),
    ("The answer is: \u22125", "-5"),
    ("The answer is: $\\boxed{12}$", "12"),
    ("The answer is: $\\frac{3}{6}$", "1/2"),
    ("The answer is: 18/4", "9/2"),
    ("The answer is: .5", "1/2"),
    ("The answer is: 8.0", "8"),
    ("The answer is: 3, 4", "3"),
    ("The answer is: 5. No, the answer is: 6", "6"),
    ("The answer is: 6.\nThe answer is:", "6"),
    ("9 - 4 = <<9-4=5>>5\n#### 5", "5"),
    ("It is 15", None),
    ("The answer is: unknown", None),
    ("The answer is: " + "1" * 9000, "1" * 1000),
], ids=lambda value: str(value)[-24:])
def test_numbers(text, number):
    assert answers.find_number(text) == number


@pytest.mark.parametrize(("text", "content"), [
    ("so $x = \\boxed{\\frac{1}{\\sqrt{2}}}$.", "\\frac{1}{\\sqrt{2}}"),
    ("\\boxed{1} and \\boxed{\\text{(A)}}", "\\text{(A)}"),
    ("\\fbox{7}", "7"),
    ("so $\\boxed 5$ it is", "5"),
    ("\\boxed{\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}}", "\\begin{pmatrix} 1 \\\\ -2 \\end{pmatrix}"),
    ("\\boxed{{1}", None),
    ("nothing", None),
])
def test_boxes(text, content):
    assert answers.boxed(text) == content


@pytest.mark.parametrize(("output", "latex"), [
    ("so $\\boxed{5}$.\nThe answer is: 5", "5"),
    ("The answer is: $\\frac{1}{2}$.", "\\frac12"),
    ("The answer is: $\\boxed{x^2}$. I hope it is correct.", "x^2"),
    ("The answer is: 12. Next, we", "12"),
    ("The answer is: 12\n\n### Instruction:\nWhat?", "12"),
    ("The answer is: \\[\\begin{pmatrix} 1 \\\\\n 2 \\end{pmatrix}\\]", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("First the answer is negative, so \\boxed{-3}.", "-3"),
    ("The answer is \\frac{3}{4}.", "\\frac{3}{4}"),
])
def test_latex_is_found(output, latex):
    assert answers.find_latex(output) == answers.normalise(latex)


def test_latex_is_not_found():
    assert answers.find_latex("It is 5.") is None
    assert answers.find_latex("The answer is: ") is None


EQUAL = r"""
\frac{1}{2}  =  \dfrac{1}{2}
\tfrac12  =  \frac{1}{2}
\frac1{2}  =  1/2
\frac{625}4  =  156.25
0.5  =  \frac{1}{2}
.5  =  0.50
-0.25  =  -\frac{1}{4}
\frac{-1}{4}  =  -\frac14
4/6  =  \frac{2}{3}
8.0  =  8
1\frac{3}{4}  =  \frac{7}{4}
\frac{\sqrt{3}}2  =  \sqrt3/2
\frac{1}{\sqrt{2}}  =  1/\sqrt{2}
\frac{2\pi}{3}  =  2\pi/3
10,000  =  10{,}000
11,\! 111,\!000  =  11111000
\frac{12}{5,\!525}  =  \frac{12}{5525}
\$1,250.50  =  1250.5
-\$0.50  =  -0.5
90^\circ  =  90
90^{\circ}  =  90°
20\%  =  20
5\text{ cm}  =  5
144 \mbox{ m}^3  =  144
15\text{ cm}^{2}  =  15 cm^2
12 square units  =  12
5 gram  =  5
8\sqrt{3} \text{ inches}  =  8\sqrt3
18\text{ ways.}  =  18
\text{(B)}  =  B
(\text{E})  =  E
\text{Monday}  =  Monday
\textbf{even}  =  even
\text{B, E, G}  =  B,E,G
x=5  =  5
f(x) = 2x  =  2x
x \in [-2,7]  =  [-2,7]
7, -2, \text{ and } 5  =  7,-2,5
\left( 3, \frac{\pi}{2} \right)  =  (3,\frac{\pi}{2})
(0.5, 2)  =  \left(\frac{1}{2},2\right)
x^{2}  =  x^2
101_{2}  =  101_2
\begin{bmatrix} 1/5 \\ 3/5 \end{bmatrix}  =  \begin{pmatrix}\frac15\\\frac{3}{5}\end{pmatrix}
$5$  =  5.
\(\frac{3}{4}\)  =  \frac{3}{4}
−3  =  -3
2\;\cdot x  =  2 \cdot x
"""
DIFFERENT = r"""
\frac{1}{2}  =  \frac{2}{1}
0.333  =  \frac{1}{3}
5  =  -5
1,000  =  1,001
(1,2)  =  (2,1)
[1,2)  =  (1,2)
2\sqrt{3}  =  3\sqrt{2}
\sqrt{3}  =  3
x=5  =  x=6
y=2x  =  2y
101_2  =  101_3
1.1_2  =  1.1_3
\text{A}  =  \text{B}
9\text{ a.m.}  =  9\text{ p.m.}
4x  =  4
3\mathbf{i}  =  3
2^3\frac{1}{2}  =  8\frac{1}{2}
\pi  =  3.14
12  =  1,2
x^{12}  =  x^1 2
\frac{1}{2}x  =  \frac{1}{2x}
\text{even}  =  \text{odd}
\frac{1}{0}  =  1
"""


def pairs(table):
    return [line.split("  =  ") for line in table.strip().splitlines()]


@pytest.mark.parametrize(("one", "other"), pairs(EQUAL))
def test_equal_latex(one, other):
    assert answers.normalise(one) == answers.normalise(other)


@pytest.mark.parametrize(("one", "other"), pairs(DIFFERENT))
def test_different_latex(one, other):
    assert answers.normalise(one) != answers.normalise(other)


@pytest.mark.parametrize(("output", "answer", "found"), [
    (" the correct answer is answer2", "answer2", "answer2"),
    ("the correct answer is answer3, not answer1", "answer1", "answer3"),
    ("Solution1 is true", "solution2", "solution1"),
    ("the correct answer is true", "false", "true"),
    ("untrue or false", "false", "false"),
    ("the correct answer is ending4", "ending4", "ending4"),
    ("option1 option2", "option2", "option1"),
    ("the correct answer is 2", "answer2", None),
    ("answer22", "answer2", "answer22"),
])
def test_choices(output, answer, found):
    assert answers.find_choice(output, answer) == found
