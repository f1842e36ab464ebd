"""The paper's experiments on a language model: runs that resume, their losses, starts, verdicts and pictures."""
import argparse
import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

for package in ("accelerate", "matplotlib", "peft", "transformers", "tqdm"):
    pytest.importorskip(package)
PAPER = Path(__file__).parents[1] / "benchmarks" / "paper"
QUESTIONS = Path(__file__).parent / "data" / "questions.jsonl"
sys.path.insert(0, str(PAPER))

import common  # noqa: E402
import comparison  # noqa: E402
import finetune  # noqa: E402
import outcomes  # noqa: E402
import starts  # noqa: E402
import step_memory  # noqa: E402
import step_time  # noqa: E402
import sweeps  # noqa: E402
from bench_train import SIZES  # noqa: E402

import abba_ext  # noqa: E402
from abba_ext import reference  # noqa: E402

FACTORS = ("abba_A1", "abba_B1", "abba_A2", "abba_B2")


@pytest.fixture
def run(tiny_model, tmp_path_factory, monkeypatch):
    """Four steps on the tiny model, with the seed that learning rates are chosen by."""
    monkeypatch.setattr(finetune, "LOCKS", tmp_path_factory.mktemp("locks"))
    finetune.load_base.cache_clear()
    yield finetune.Run("abba", seed=finetune.TUNING_SEED, rank=4, dropout=0.1, model=str(tiny_model), data=(str(QUESTIONS),),
                       items=8, batch=2, max_length=64, eval_items=2, validation_items=1)
    finetune.load_base.cache_clear()


def interrupt(monkeypatch, steps):
    """Makes the training stop with an exception after some steps; returns the list of the steps that were made."""
    made, step = [], finetune.Training.step

    def interrupted(training):
        if len(made) == steps:
            raise KeyboardInterrupt
        made.append(len(training.losses))
        return step(training)

    monkeypatch.setattr(finetune.Training, "step", interrupted)
    return made


# --- one run ---


@pytest.mark.parametrize("method", ["abba", "pissa"])  # of the latter the base changes too
def test_an_interrupted_run_resumes_with_the_same_result(method, run, tmp_path, monkeypatch):
    run = replace(run, method=method)
    whole = finetune.execute(run, checkpoints=tmp_path)
    assert len(whole["losses"]) == whole["steps"] == 4 and not any(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            finetune.execute(run, every=2, checkpoints=tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".pt"]
    made = interrupt(monkeypatch, math.inf)
    resumed = finetune.execute(run, every=2, checkpoints=tmp_path)
    assert made == [2, 3]
    assert not any(tmp_path.iterdir())
    for key in ("losses", "gradient_norms", "training_loss", "validation", "held_out"):
        assert resumed[key] == whole[key]
    assert whole["losses"] != finetune.execute(replace(run, seed=2))["losses"]


def full_forward_losses(model, tokenizer, item, max_length=64, end=False):
    """Negative log-likelihoods of the tokens of each choice: one forward without padding each.

    A question too long for its longest answer loses its start.
    """
    answers = [tokenizer(" " + choice, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id] * end
               for choice in item.choices]
    prompt = tokenizer(item.prompt)["input_ids"][-(max_length - max(map(len, answers))):]
    losses = []
    for answer in answers:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1: -1]
        losses.append(cross_entropy(logits, torch.tensor(answer), reduction="none"))
    return losses


@pytest.mark.parametrize("max_length", [64, 16])
def test_evaluation_is_that_of_one_full_forward_per_answer(run, max_length):
    items = finetune.load_questions(str(QUESTIONS), 1)[0]
    model, tokenizer = finetune.load_base(run.model, "cpu", "float32").eval(), finetune.load_text(run.model)
    losses = [full_forward_losses(model, tokenizer, item, max_length) for item in items]
    sums = [[loss.sum().item() for loss in own] for own in losses]
    by_byte = [[loss / len(text.encode()) for loss, text in zip(own, item.choices, strict=True)]
               for own, item in zip(sums, items, strict=True)]
    found = finetune.evaluate(model, tokenizer, {"a": items[:3], "b": items[3:]}, max_length, choices=True)
    for part, chosen in (("a", slice(0, 3)), ("b", slice(3, None))):
        answers = [item.answer for item in items[chosen]]
        expected = {
            "loss": [own[answer].mean().item() for own, answer in zip(losses[chosen], answers, strict=True)],
            "acc": [own.index(min(own)) == answer for own, answer in zip(sums[chosen], answers, strict=True)],
            "acc_norm": [own.index(min(own)) == answer for own, answer in zip(by_byte[chosen], answers, strict=True)]}
        assert found[part] == pytest.approx({key: sum(values) / len(values) for key, values in expected.items()}, rel=1e-4)
    if max_length == 64:  # where no question loses its start
        right = finetune.evaluate(model, tokenizer, {"a": items[:3]}, max_length, choices=False)
        assert right["a"] == {"loss": pytest.approx(found["a"]["loss"], rel=1e-4)}


def test_a_step_learns_the_mean_over_all_its_answer_tokens(run):
    run = replace(run, accumulation=2, dropout=0.0)
    questions, *_ = finetune.split(run)
    tokenizer = finetune.load_text(run.model)
    training = finetune.Training(finetune.adapt(run, "cpu"), tokenizer, questions, run)
    assert training.steps == 2 and sorted(sum(training.plan, [])) == list(range(8))
    chosen = [i for batch in training.plan[:2] for i in batch]
    losses = torch.cat([full_forward_losses(training.model, tokenizer, questions[i], end=True)[questions[i].answer]
                        for i in chosen])
    sums, counts = finetune.answer_losses(training.model, [training.packs[i] for i in chosen])
    assert counts.sum() == len(losses)
    (sums.sum() / counts.sum()).backward()
    norm = torch.stack([p.grad.norm() for p in training.parameters if p.grad is not None]).norm().item()
    training.optimizer.zero_grad()
    assert training.step()
    assert training.losses == [pytest.approx(losses.mean().item(), rel=1e-5)]
    assert training.norms == [pytest.approx(norm, rel=1e-4)]


def test_a_run_that_diverges_says_so(run):
    result = finetune.execute(replace(run, lr=1e30))
    assert result["diverged"] is True and "losses" not in result and "held_out" not in result
    json.dumps(result, allow_nan=False)


@pytest.mark.parametrize("method", ["base", *dict.fromkeys(method.method for method in comparison.METHODS)])
def test_every_method_trains_on_the_budget(run, method):
    result = finetune.execute(replace(run, method=method, items=2))
    budgets = {name: 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80) for name in ("lora", "rslora", "pissa", "hira", "loha", "abba")}
    budgets |= {"base": 0, "dora": budgets["lora"] + 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)}
    assert result["trainable"] == budgets[method]
    assert result.get("steps", 0) == (method != "base") and math.isfinite(outcomes.loss(result))


def test_seeds_draw_their_training_questions_and_share_the_others(run):
    run = replace(run, items=5)
    first, second = finetune.split(run), finetune.split(replace(run, seed=2))
    assert first[0] != second[0] and first[1:] == second[1:]
    validation, held_out = (next(iter(part.values())) for part in first[1:])
    assert len(validation) == 1 and len(held_out) == 2 and not {q.question for q in first[0]} & {
        q.question for q in validation + held_out}


# --- many runs ---


def test_finished_runs_are_not_repeated(run, tmp_path, monkeypatch):
    done = []

    def execute(run, device, every):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(run.seed)
        return {"losses": [float(i) for i in range(120)], "seconds": 1.5, "processor_seconds": 1.0, "diverged": False}

    monkeypatch.setattr(finetune, "execute", execute)
    options = argparse.Namespace(full=False, quick=True, output=tmp_path, device="cpu")
    labelled = [(str(seed), replace(run, seed=seed)) for seed in range(4)]
    with pytest.raises(KeyboardInterrupt):
        finetune.Runs(options).all(labelled, "planted")
    assert done == [0, 1]
    done.clear()
    runs = finetune.Runs(options)
    rows = runs.all(labelled, "planted")
    assert done == [2, 3]
    assert runs.cost() == {"runs": 4, "devices": [finetune.harness.device_name(torch.device("cpu"))], "seconds": 6.0,
                           "processor_seconds": 4.0}
    assert [(row["case"], row["seed"], len(row["losses"])) for row in rows] == [(str(seed), seed, 50) for seed in range(4)]
    assert sum(rows[0]["losses"]) / 50 == pytest.approx(59.5, abs=0.5)
    entries = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(entries) == 4 and entries[0]["environment"].keys() >= {"device", "torch", "peft", "commit"}


def test_processes_side_by_side_share_the_runs(run, tmp_path, monkeypatch):
    """A run that another process is at is left to it, and waited for where its result is needed."""
    options = argparse.Namespace(full=False, quick=True, output=tmp_path, device="cpu")
    here, there = finetune.Runs(options), finetune.Runs(options)
    order = []

    def execute(asked, device, every):
        order.append(asked.seed)
        if asked.seed == 0:
            there.finish(run, wait=False)  # of seed 0, which is being done
            there.finish(replace(run, seed=1), wait=False)
        return {"seconds": 1.0, "processor_seconds": 1.0, "diverged": True}

    monkeypatch.setattr(finetune, "execute", execute)
    rows = here.all([(str(seed), replace(run, seed=seed)) for seed in range(3)], "planted")
    assert order == [0, 1, 2] and [row["seed"] for row in rows] == [0, 1, 2]


def test_a_shared_case_is_one_run():
    centres = [sweeps.SWEEPS[name].cases(16, False)[case] for name, case in (
        ("rank_split", "8/8"), ("alpha", "16"), ("total_rank", "16"), ("init_strategies", starts.STARTS["narrow"].label))]
    assert len({finetune.Run("abba", 0, **changes).key for changes in centres}) == 1
    assert "float32" in finetune.Run("abba", 0).key and "bfloat16" in finetune.Run("abba", 0, **finetune.FULL).key


@pytest.mark.parametrize("arguments, every, items", [([], 0, 60), (["--quick"], 0, 4), (["--full"], 100, None)])
def test_only_full_runs_write_checkpoints(arguments, every, items, tmp_path, monkeypatch):
    seen = []

    def execute(run, device, every):
        seen.append((run.items, every))
        return {"seconds": 1.0, "processor_seconds": 1.0, "diverged": True}

    monkeypatch.setattr(finetune, "execute", execute)
    parser = finetune.parser("")
    common.add_arguments(parser)
    options = parser.parse_args(["--output", str(tmp_path), *arguments])
    finetune.Runs(options)(finetune.Run("abba", 0, **finetune.settings(options, items=60)))
    assert seen == [(items, every)]


def test_a_store_never_holds_nan(run, tmp_path):
    store = finetune.Store(tmp_path / "runs.jsonl")
    store.add(run, {"loss": 1.0}, {})
    with pytest.raises(ValueError, match="JSON compliant"):
        store.add(replace(run, seed=5), {"loss": math.nan}, {})
    assert list(store.read()) == [run.key] and [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]


# --- starts ---


@pytest.mark.parametrize("name", starts.STARTS)
def test_every_start_leaves_the_model_as_it_was(name):
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 20)
    before = linear.weight.detach().clone()
    model = abba_ext.patch_model(torch.nn.Sequential(linear), abba_ext.AbbaConfig(r1=3, r2=5, alpha=4.0))
    starts.apply_start(model, name, seed=0)
    layer = model[0]
    a1, b1, a2, b2 = (getattr(layer, factor).detach().double() for factor in FACTORS)
    delta = reference.delta_weight(a1, b1, a2, b2, layer.abba_scale)
    if name in ("ours", "narrow", "second_pair"):
        assert torch.count_nonzero(delta) == 0 and torch.equal(layer.weight, before)
    else:
        assert delta.norm() > 0.1 * before.norm()
        torch.testing.assert_close(layer.weight.double() + delta, before.double(), rtol=0, atol=1e-5)
    model(torch.randn(7, 24)).square().sum().backward()
    assert any(getattr(layer, factor).grad.norm() > 0 for factor in FACTORS)


def truncated(matrix, first, last):
    u, sigma, v = torch.linalg.svd(matrix)
    return (u[:, first:last] * sigma[first:last]) @ v[first:last]


def test_starts_are_what_they_are_called():
    torch.manual_seed(0)
    linear = torch.nn.Linear(24, 20)
    weight = linear.weight.detach().clone()
    layer = abba_ext.patch_model(torch.nn.Sequential(linear), abba_ext.AbbaConfig(r1=3, r2=5, alpha=4.0))[0]
    products = {name: [b @ a for a, b in start.factors(weight, layer)]
                for name, start in starts.STARTS.items() if start.factors}
    s, root = layer.abba_scale, weight.abs().sqrt()
    zero = torch.zeros_like(weight)
    expected = {"ones": (truncated(weight, 0, 3), torch.full_like(weight, 1 / s)),
                "roots": (truncated(root, 0, 3) / s**0.5, truncated(weight.sign() * root, 0, 5) / s**0.5),
                "top_and_next": (truncated(weight, 0, 3), truncated(weight, 3, 8)),
                "next_and_top": (truncated(weight, 5, 8), truncated(weight, 0, 5)),
                "second_pair": (zero, truncated(weight, 0, 5)),
                "narrow": (truncated(weight, 0, 3), zero)}
    assert products.keys() == expected.keys()
    for name, pairs in expected.items():
        for found, wanted in zip(products[name], pairs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="start must be one of ones, .* got 'nothing'"):
        starts.apply_start(torch.nn.Sequential(layer), "nothing", 0)


# --- verdicts ---


def planted(losses, diverged=()):
    """Rows of three seeds whose held-out losses are near the given ones; the accuracy is one minus a tenth of the loss."""
    rows = []
    for case, loss in losses.items():
        for seed in range(3):
            value = loss + seed * 0.1 + (seed == 1) * 0.001
            score = {"loss": value, "acc": 1 - value / 10, "acc_norm": 0.5}
            rows.append({"case": case, "seed": seed, "lr": 1e-3, "diverged": False, "trainable": 10, "steps": 4, "seconds": 1.0,
                         "training_loss": value, "losses": [2.0, value], "held_out": {"task": score}} if case not in diverged else
                        {"case": case, "seed": seed, "lr": 1e-3, "diverged": True, "trainable": 10, "steps": 4, "seconds": 1.0})
    return rows


def results_of(rows):
    settings = {"model": None, "batch": 8, "accumulation": 1, "data": ["task"], "max_length": 128, "eval_items": 24, "rank": 32,
                "dtype": "float32"}
    return {"settings": settings, "rows": rows, "runs": 3, "devices": ["a processor"], "seconds": 60.0, "processor_seconds": 50.0}


LABELS = [start.label for start in starts.STARTS.values()]
BETTER = {
    "init_strategies": dict(zip(LABELS, (3.0, 2.8, 2.6, 2.4, 2.0, 2.1, 2.0), strict=True)),
    "rank_split": {"2/14": 3.0, "4/12": 2.5, "6/10": 2.4, "8/8": 2.0},
    "alpha": {"4": 3.0, "8": 2.5, "16": 2.0, "24": 1.9, "32": 2.0, "48": 2.5, "64": 3.0},
    "total_rank": {"8": 3.0, "16": 2.5, "32": 2.0, "64": 2.0},
    "placement": {"q": 3.0, "k": 3.1, "v": 2.5, "o": 2.0, "gate": 2.0, "up": 2.6, "down": 2.1},
}


@pytest.mark.parametrize("name", sweeps.SWEEPS)
def test_a_sweep_holds_only_where_its_numbers_say_so(name):
    losses = BETTER[name]
    assert sweeps.summary(name, results_of(planted(losses))).startswith(common.HOLDS)
    mirrored = planted({case: 5 - loss for case, loss in losses.items()})
    assert not sweeps.summary(name, results_of(mirrored)).startswith(common.HOLDS)
    worst = max(losses, key=losses.get)
    text = sweeps.summary(name, results_of(planted(losses, diverged=[worst])))
    assert text.startswith(common.HOLDS) and "diverged" in text


def test_no_difference_is_no_claim_held():
    text = sweeps.summary("rank_split", results_of(planted(dict.fromkeys(BETTER["rank_split"], 2.0))))
    assert text.startswith(common.FAILS) and text.count(": no") == 3


def test_a_difference_that_is_lost_in_noise_does_not_make_two_ranks_equal():
    rows = planted(dict(BETTER["total_rank"], **{"64": 1.9}))
    for row in rows:
        row["held_out"]["task"]["loss"] += 0.2 * row["seed"] * (row["case"] == "64") - 0.2 * (row["case"] == "64")
    assert not outcomes.below(rows, "64", "32")
    assert "- 64 is not below 32, by the mean: no" in sweeps.summary("total_rank", results_of(rows))


def test_order_over_seeds():
    assert outcomes.order([1.0, 2.0, 3.0], [1.5, 2.6, 3.5]) == -1
    assert outcomes.order([1.5, 2.6, 3.5], [1.0, 2.0, 3.0]) == 1
    assert outcomes.order([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == 0
    assert [outcomes.order([None, 1.0], [1.0, 2.0]), outcomes.order([1.0, 2.0], [None, 1.0]),
            outcomes.order([None, 1.0], [None, 2.0])] == [1, -1, 0]


def comparison_results(losses):
    rows = [{**planted({"base": 3.0})[0]}] + planted(losses)
    return results_of(rows) | {"tuning": {label: [{"lr": 1e-3, "loss": 1.0}] for label in losses}}


def test_the_comparison_holds_only_where_its_numbers_say_so(tmp_path):
    losses = {method.label: 2.0 for method in comparison.METHODS} | {"ABBA, half": 1.8, "ABBA": 1.6}
    assert comparison.summary(comparison_results(losses)).startswith(common.HOLDS)
    text = comparison.summary(comparison_results(losses | {"ABBA, half": 2.2}))
    assert text.startswith(common.PARTLY)
    assert "significantly above: LoRA, rsLoRA, PiSSA, DoRA, HiRA; significantly below: none" in text
    assert comparison.summary(comparison_results(losses | {"ABBA, half": 2.0, "ABBA": 2.0})).startswith(common.FAILS)


@pytest.mark.parametrize("best, tried", [(1e-3, [3e-4, 1e-3, 3e-3]), (3e-3, [3e-4, 1e-3, 3e-3, 1e-2]),
                                         (1e-4, [1e-4, 3e-4, 1e-3, 3e-3]), (3e-2, [3e-4, 1e-3, 3e-3, 1e-2, 3e-2])])
def test_tuning_goes_on_while_the_best_is_at_an_edge(best, tried):
    def train(lr):
        loss = abs(math.log(lr / best))
        return {"diverged": lr > 2 * best, "validation": {"a": {"loss": loss}, "b": {"loss": loss + 1}}}

    found = comparison.tune(train)
    assert list(found) == tried and comparison.best_rate(found) == best
    assert all(found[lr] is None for lr in tried if lr > 2 * best)
    assert comparison.tune(train, [best]) == {best: 0.5}


# --- from the command line to the README ---


@pytest.fixture
def small(run, tmp_path, monkeypatch):
    """Few cases, tiny models."""
    monkeypatch.setitem(sweeps.SWEEPS, "rank_split", replace(sweeps.SWEEPS["rank_split"], cases=lambda rank, full: {
        "2/6": {"ranks": (2, 6)}, "4/4": {"ranks": (4, 4)}}))
    monkeypatch.setattr(comparison, "METHODS", [method for method in comparison.METHODS
                                                if method.label in ("LoRA", *comparison.OWN)])
    monkeypatch.setattr(comparison, "OTHERS", ("LoRA",))
    monkeypatch.setattr(step_memory, "LENGTHS", (256,))
    monkeypatch.setattr(step_memory, "COMPARED", ("lora", "dora", "hira", "abba", "full"))
    monkeypatch.setattr(step_time, "COMPARED", ("lora", "abba_eager", "abba"))
    monkeypatch.setattr(step_time, "QUICK", tmp_path)
    monkeypatch.setitem(SIZES, "135m", {**SIZES["135m"], "hidden_size": 36, "intermediate_size": 48, "vocab_size": 64})
    return ["--model", run.model, "--data", *run.data]


@pytest.mark.parametrize("name, module", [("rank_split", "sweeps"), ("commonsense", "comparison"), ("memory", "step_memory"),
                                          ("time", "step_time")])
def test_an_experiment_runs_through(name, module, small, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text((PAPER / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    arguments = ["--quick", "--seeds", "2", "--output", str(tmp_path), "--readme", str(readme)]
    if name in ("rank_split", "commonsense"):
        arguments += small
    if name == "rank_split":
        assert sweeps.main([name, *arguments]) == 0
    else:
        experiment = importlib.import_module(module)
        parser = finetune.parser("") if name == "commonsense" else experiment.parser()
        assert common.main(experiment.EXPERIMENT, parser, arguments) == 0
    document = json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))
    assert document["results"]["rows"] and document["environment"]["torch"] == torch.__version__
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    section = readme.read_text(encoding="utf-8").split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]
    assert section.startswith((common.HOLDS, common.PARTLY, common.FAILS)) and f"![{name}]({name}.png)" in section


@pytest.mark.parametrize("name", [module.__name__ for module in (comparison, finetune, outcomes, starts, step_memory, step_time,
                                                                 sweeps)])
def test_a_module_alone_finds_what_it_imports(name, monkeypatch):
    """As the command line does: with this folder on the path, and neither benchmarks nor examples."""
    folders = (PAPER, PAPER.parent, PAPER.parents[1] / "examples")
    for loaded, module in list(sys.modules.items()):
        if getattr(module, "__file__", None) and Path(module.__file__).parent in folders:
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "path", [str(PAPER), *(path for path in sys.path if Path(path) not in folders)])
    assert importlib.import_module(name).__doc__


def test_repetitions_of_the_times_are_not_measured_again(tmp_path, monkeypatch):
    made = []

    def run_case(case, methods, rounds, device, progress):
        made.append(case)
        if len(made) == 2:
            raise KeyboardInterrupt
        return [{"method": method, "median_ms": float(len(made))} for method in methods]

    monkeypatch.setattr(step_time, "run_case", run_case)
    monkeypatch.setattr(step_time, "QUICK", tmp_path)
    options = argparse.Namespace(full=False, quick=True, device="cpu", seeds=3)
    with pytest.raises(KeyboardInterrupt):
        step_time.measure(options)
    rows = step_time.measure(options)["rows"]
    assert len(made) == 4 and len(set(made)) == 1 and not any(tmp_path.iterdir())
    lora = [(row["repetition"], row["median_ms"]) for row in rows if row["method"] == "lora"]
    assert lora == [(0, 1.0), (1, 3.0), (2, 4.0)]


def test_another_measurement_leaves_an_interrupted_one_alone(tmp_path, monkeypatch):
    def run_case(case, methods, rounds, device, progress):
        made.append(rounds)
        if len(made) == 2:
            raise KeyboardInterrupt
        return [{"method": method, "median_ms": 1.0} for method in methods]

    made = []
    monkeypatch.setattr(step_time, "run_case", run_case)
    monkeypatch.setattr(step_time, "QUICK", tmp_path)
    options = {"full": False, "device": "cpu", "seeds": 2}
    with pytest.raises(KeyboardInterrupt):
        step_time.measure(argparse.Namespace(quick=False, **options))
    step_time.measure(argparse.Namespace(quick=True, **options))
    assert step_time.measure(argparse.Namespace(quick=False, **options))["seconds"] >= 0
    assert made == [3, 3, 2, 2, 3] and not any(tmp_path.iterdir())


@pytest.mark.parametrize("times, verdict", [({"abba": 101.0, "abba_eager": 103.0}, common.HOLDS),
                                            ({"abba": 101.0, "abba_eager": 130.0}, common.PARTLY),
                                            ({"abba": 120.0, "abba_eager": 130.0}, common.FAILS)])
def test_the_verdict_on_time(times, verdict):
    case = {"size": "135m", "layers": 30, "batch": 6, "length": 256, "rank": 32, "dtype": "bf16", "adapter_dtype": "fp32"}
    rows = [{**case, "method": method, "repetition": i, "median_ms": time + 0.1 * i, "wait_share": 0.0}
            for i in range(3) for method, time in {"lora": 100.0, **times}.items()]
    assert step_time.summary({"rounds": 4, "rows": rows}).startswith(verdict)


def test_noise_does_not_make_a_step_as_fast_as_loras():
    case = {"size": "135m", "layers": 30, "batch": 6, "length": 256, "rank": 32, "dtype": "bf16", "adapter_dtype": "fp32"}
    times = {"lora": (100.0, 100.0, 100.0), "abba": (96.0, 120.0, 144.0), "abba_eager": (112.0, 140.0, 168.0)}
    rows = [{**case, "method": method, "repetition": i, "median_ms": times[method][i], "wait_share": 0.0}
            for i in range(3) for method in times]
    assert step_time.summary({"rounds": 4, "rows": rows}).startswith(common.FAILS)


@pytest.mark.parametrize("abba, verdict", [(101, common.HOLDS), (108, common.PARTLY), (400, common.FAILS)])
def test_the_verdict_on_memory(abba, verdict):
    case = {"size": "135m", "layers": 30, "batch": 1, "length": 256, "checkpointing": False, "rank": 32, "dtype": "bf16",
            "adapter_dtype": "fp32"}
    peaks = {"lora": 100, "dora": 110, "hira": 130, "abba": abba, "full": 300}
    rows = [{**case, "method": method, "peak_bytes": peak * 2**20} for method, peak in peaks.items()]
    assert step_memory.summary({"rows": rows}).startswith(verdict)


def test_an_unknown_sweep_is_named(capsys):
    with pytest.raises(SystemExit):
        sweeps.main(["beta"])
    assert "invalid choice: 'beta'" in capsys.readouterr().err
