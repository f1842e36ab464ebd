"""Ranks, scales and argument checks of AbbaConfig."""
import json
import math

import pytest
import torch

from abba_ext import AbbaConfig


@pytest.mark.parametrize("kwargs, ranks", [
    ({}, (16, 16)), ({"r": 8}, (4, 4)), ({"r": 7}, (4, 3)), ({"r1": 1, "r2": 5}, (1, 5)), ({"r": 6, "r1": 2, "r2": 4}, (2, 4)),
], ids=str)
def test_ranks(kwargs, ranks):
    assert AbbaConfig(**kwargs).ranks() == ranks


def test_scaling_conventions():
    assert AbbaConfig(r1=4, r2=9, alpha=3).scale() == pytest.approx(9 / 6)  # α²/√(r1 r2)
    assert AbbaConfig(r1=4, r2=9, alpha=3, scaling="official").scale() == 3.0  # √α √α
    assert AbbaConfig(r1=4, r2=4, alpha=3, scaling="peft").scale() == 0.75  # α/r
    assert AbbaConfig(r1=4, r2=9, scaling=0.25).scale() == 0.25
    # the paper's "α = 24" at 16+16: 16√2 gives s = 32
    assert AbbaConfig(alpha=16 * math.sqrt(2)).scale() == pytest.approx(32)


def test_patterns_by_suffix_and_regex():
    config = AbbaConfig(rank_pattern={"q_proj": 8, r".*\.1\.mlp\..*": (3, 5)}, alpha_pattern={"layers.0.q_proj": 2.0})
    assert config.ranks("model.layers.0.q_proj") == (4, 4)
    assert config.ranks("model.layers.1.mlp.up") == (3, 5)
    assert config.ranks("model.layers.0.xq_proj") == (16, 16)  # a suffix begins after a dot
    assert config.scale("model.layers.0.q_proj") == 4 / 4
    assert config.scale("model.layers.10.q_proj") == 256 / 4
    config = AbbaConfig(scaling="peft", rank_pattern={r".*layers\.1": 8, "v_proj": (1, 3)})
    assert config.ranks("model.layers.1") == (4, 4) and config.ranks("model.layers.10") == (16, 16)  # the whole name
    with pytest.raises(ValueError, match="r1 = r2, got r1=1, r2=3 for layer 'v_proj'"):
        config.scale("v_proj")


def test_json_round_trip():
    config = AbbaConfig(r=10, target_modules=("q_proj",), adapter_dtype=torch.bfloat16, layers_to_transform=3,
                        rank_pattern={"k": (1, 2)}, scaling=0.5, modules_to_save=[])
    again = AbbaConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again.to_dict() == config.to_dict()
    assert again.adapter_dtype == "bfloat16" and again.layers_to_transform == [3] and again.ranks("k") == (1, 2)
    with pytest.raises(ValueError, match=r"unknown AbbaConfig fields \['rank'\]"):
        AbbaConfig.from_dict({"rank": 3})


ERRORS = {
    "r too small": ({"r": 1}, ValueError, "r must be at least 2, got 1"),
    "r float": ({"r": 8.0}, TypeError, "r must be an int, got float"),
    "r1 alone": ({"r1": 4}, ValueError, "r1 and r2 must be given together"),
    "r against r1, r2": ({"r": 9, "r1": 4, "r2": 4}, ValueError, r"r must equal r1 \+ r2 = 8"),
    "scaling": ({"scaling": "lora"}, ValueError, "scaling must be one of 'paper', 'official', 'peft' or a number, got 'lora'"),
    "peft unequal": ({"scaling": "peft", "r1": 2, "r2": 3}, ValueError, "scaling 'peft' is s = α/r with r = r1 = r2"),
    "alpha": ({"alpha": "16"}, TypeError, "alpha must be a number"),
    "alpha nan": ({"alpha": float("nan")}, ValueError, "alpha must be finite"),
    "init": ({"init": "zeros"}, ValueError, "init must be one of 'svd', 'random', got 'zeros'"),
    "dropout": ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    "bias": ({"bias": True}, ValueError, "bias must be one of"),
    "dtype": ({"adapter_dtype": torch.int8}, ValueError, "adapter_dtype must be one of .*got 'int8'"),
    "targets": ({"target_modules": [1]}, TypeError, "target_modules must be a list of strings"),
    "regex": ({"target_modules": "(q"}, ValueError, r"target_modules: '\(q' is not a regular expression"),
    "modules_to_save": ({"modules_to_save": "head"}, TypeError, "modules_to_save must be a list of strings, got 'head'"),
    "layers": ({"layers_to_transform": [-1]}, ValueError, "layers_to_transform must be at least 0"),
    "layers float": ({"layers_to_transform": 1.5}, TypeError, "layers_to_transform must be an index or a list of them, got 1.5"),
    "rank_pattern": ({"rank_pattern": {"q": (1, 2, 3)}}, ValueError, r"rank_pattern\['q'\] must be a total rank or \(r1, r2\)"),
    "plan": ({"plan": "fast"}, ValueError, "plan must be one of"),
    "seed": ({"seed": "0"}, TypeError, "seed must be an int"),
}


@pytest.mark.parametrize("kwargs, error, message", ERRORS.values(), ids=ERRORS)
def test_errors_name_the_field(kwargs, error, message):
    with pytest.raises(error, match=message):
        AbbaConfig(**kwargs)
