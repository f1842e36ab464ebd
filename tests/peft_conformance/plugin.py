"""A pytest plugin under which PEFT's own tests run on ABBA: it swaps their tables of methods before they are collected, drops
the tests that are about one other method, and writes what became of each test to $ABBA_PEFT_REPORT."""
import importlib.util
import json
import os
import sys
import types
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from unittest import mock

import cases
import pytest

from abba_ext.peft import AbbaPeftConfig

FAST = os.environ.get("ABBA_PEFT_CONFORMANCE") != "full"

if importlib.util.find_spec("diffusers") is None:  # the tests' helpers import one class of it, which no test here uses
    sys.modules["diffusers"] = types.ModuleType("diffusers")
    sys.modules["diffusers"].StableDiffusionPipeline = type("StableDiffusionPipeline", (), {})

CUSTOM = cases.FAST_CUSTOM if FAST else cases.CUSTOM
TABLES = {
    "test_custom_models": {
        "TEST_CASES": CUSTOM,
        "ALL_PEFT_CONFIG_CLASSES": [AbbaPeftConfig],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES": cases.MULTIPLE_ACTIVE,
        "MIXED_ADAPTER_TEST_CASES": cases.MIXED,
    },
    "test_decoder_models": {"ALL_CONFIGS": cases.DECODER[:1] if FAST else cases.DECODER},
    "test_encoder_decoder_models": {"ALL_CONFIGS": cases.ENCODER_DECODER[:1] if FAST else cases.ENCODER_DECODER},
    "test_config": {"ALL_CONFIG_CLASSES": cases.CONFIG, "LAYER_INDEXING_CONFIG_CLASSES": list(cases.CONFIG)},
    "test_torch_compile": {},
    "test_lora_conversion": {},
}
FAST_MODELS = ("trl-internal-testing/tiny-random-LlamaForCausalLM", "peft-internal-testing/tiny-random-GPT2LMHeadModel",
               "peft-internal-testing/tiny-random-BartForConditionalGeneration")
OWN_TABLES = {
    **{test: [("ABBA", *configs)] for test, configs in cases.MIXED_PER_TEST.items()},
    "test_multiple_adapters_mixed_modules_to_save": [AbbaPeftConfig],
    "test_multiple_adapters_mixed_modules_to_save_order_switched": [AbbaPeftConfig],
}
SKIPPING_HELPERS = ("_skip_if_conv1d_not_supported", "_skip_if_not_conv1d_supported",  # by method; ABBA supports it
                    "check_beft_config")  # meant for a method that trains biases, it skips Llama and Gemma for all methods
FOR_LORA_ALONE = ("test_mixed_adapter_batches", "test_generate_with_mixed_adapter_batches")  # by the class of the config
results = {}


def pytest_collectstart(collector):
    if isinstance(collector, pytest.Module):
        module, name = collector.obj, collector.path.stem
        _swap(module, {id(getattr(module, table)): rows for table, rows in TABLES[name].items()})
        for helper in SKIPPING_HELPERS:
            for owner in (module, _common(module)):
                if hasattr(owner, helper):
                    setattr(owner, helper, lambda *args: None)
        if name == "test_torch_compile":
            module.SETTINGS.clear()
            module.SETTINGS.update(cases.COMPILE)
        if name == "test_lora_conversion":  # its example of a method that is not LoRA
            module.LoKrConfig = partial(AbbaPeftConfig, **cases.CONVERTED)


def pytest_collection_modifyitems(config, items):
    about_abba, others = [], []
    for item in items:
        (about_abba if _is_about_abba(item) else others).append(item)
    config.hook.pytest_deselected(items=others)
    items[:] = about_abba


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    if item.originalname not in FOR_LORA_ALONE:
        return (yield)
    if "OPT" in item.callspec.params.get("model_id", ""):
        pytest.skip("OPT flattens the batch before fc1 and fc2; PEFT's LoRA, which refuses that too, targets q_proj and v_proj only")
    with ExitStack() as patches:
        for owner in (item.module, _common(item.module)):
            if hasattr(owner, "LoraConfig"):
                patches.enter_context(mock.patch.object(owner, "LoraConfig", AbbaPeftConfig))
        return (yield)


def pytest_runtest_logreport(report):
    path, _, name = report.nodeid.partition("::")
    test = f"{Path(path).name}::{name}"
    if report.when == "call" or report.outcome != "passed":
        reason = "" if report.passed else str(report.longrepr[2] if report.skipped else report.longrepr).strip()
        if results.get(test, ("passed",))[0] == "passed":
            results[test] = (report.outcome, reason.splitlines()[-1] if reason else "")


def pytest_sessionfinish():
    Path(os.environ["ABBA_PEFT_REPORT"]).write_text(json.dumps(results, indent=1), encoding="utf-8")


def _common(module):
    """The tests' module of what they share."""
    return sys.modules.get(module.__name__.rpartition(".")[0] + ".testing_common")


def _swap(module, tables):
    """Replaces the rows of the parametrize marks that hold one of the tables, or belong to a test with a table of its own."""
    owners = [module, *(member for member in vars(module).values() if isinstance(member, type))]
    for function in {member for owner in owners for name, member in vars(owner).items() if name.startswith("test_")}:
        marks = getattr(function, "pytestmark", [])
        for index, mark in enumerate(marks):
            if mark.name == "parametrize":
                names, rows, *rest = mark.args
                rows = OWN_TABLES.get(function.__name__, tables.get(id(rows), rows))
                if FAST and names == "model_id":
                    rows = [row for row in rows if row in FAST_MODELS]
                if rows is not mark.args[1]:
                    marks[index] = pytest.mark.parametrize(names, rows, *rest, **mark.kwargs).mark


def _is_about_abba(item) -> bool:
    values = getattr(item, "callspec", None) and item.callspec.params.values() or ()
    in_parameters = any(value is AbbaPeftConfig or isinstance(value, AbbaPeftConfig)
                        or isinstance(value, tuple) and isinstance(value[0], AbbaPeftConfig) for value in values)
    return in_parameters or "lokr_model" in item.fixturenames or item.originalname == "test_from_peft_type"
