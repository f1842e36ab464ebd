"""What PEFT's own tests run instead of their tables of methods: ABBA on every kind of layer, with every kind of setting."""
import itertools

from abba_ext.peft import AbbaPeftConfig

_CUSTOM = {
    "MLP": [
        {"target_modules": "lin0"},
        {"target_modules": ["lin0"]},
        {"target_modules": ["lin1"]},
        {"target_modules": ["lin0", "lin1"]},
        {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
        {"target_modules": ["lin0"], "r1": 3, "r2": 5, "scaling": "official", "alpha": 2.0},
        {"target_modules": ["lin0", "lin1"], "r": 6, "rank_pattern": {"lin1": 4}, "alpha_pattern": {"lin0": 4.0}},
        {"target_modules": ["lin0", "lin1"], "init_weights": "random", "recompute_u": True},
        {"target_modules": ["lin0"], "abba_dropout": 0.1},
        {"target_modules": "all-linear", "exclude_modules": ["lin1"], "r": 4, "scaling": "peft"},
        {"target_parameters": ["lin0.weight"]},
        {"target_modules": ["lin0"], "target_parameters": ["lin1.weight"]},
    ],
    "EmbConv1D": [
        {"target_modules": ["conv1d"]},
        {"target_modules": ["emb"]},
        {"target_modules": ["emb", "conv1d"], "r": 7},
        {"target_modules": ["conv1d"], "trainable_token_indices": {"emb": [0, 10]}},
    ],
    "Conv1d": [{"target_modules": ["conv1d"]}, {"target_modules": ["conv1d", "lin0"]}],
    "Conv1dBigger": [{"target_modules": ["conv1d"]}],
    "Conv1dGroups": [{"target_modules": ["conv1d"]}],
    "Conv2d": [{"target_modules": ["conv2d"]}, {"target_modules": ["conv2d", "lin0"]}],
    "Conv2d2": [{"target_modules": ["conv2d"]}],
    "Conv2d1x1": [{"target_modules": ["conv2d"]}],
    "Conv2dGroups": [{"target_modules": ["conv2d"]}],
    "Conv2dGroups2": [{"target_modules": ["conv2d"]}],
    "Conv3d": [{"target_modules": ["conv3d"]}, {"target_modules": ["conv3d", "lin0"]}],
    "MlpUsingParameters": [
        {"target_parameters": ["lin0.weight"]},
        {"target_modules": [], "target_parameters": ["lin0.weight", "lin1.weight"], "r": 4},
    ],
}
_STRENGTH = {"EmbConv1D": {}, "MlpUsingParameters": {"alpha": 0.5}}  # the tests train with learning rates from 0.01 to 1
CUSTOM = [(f"{model} {number} ABBA", model, AbbaPeftConfig, {**_STRENGTH.get(model, {"alpha": 1.0}), **kwargs})
          for model, settings in _CUSTOM.items() for number, kwargs in enumerate(settings, 1)]
FAST_CUSTOM = [case for case in CUSTOM if case[0] in ("MLP 7 ABBA", "EmbConv1D 3 ABBA")]

_LAYER = {"target_modules": ["lin0"], "init_weights": False}
_OTHER = {"target_modules": ["lin1"], "init_weights": False}
_TOKENS = {"target_modules": ["lin0"], "init_weights": False, "trainable_token_indices": {"emb": [0, 1, 2]}}
_OTHER_TOKENS = {"target_modules": ["conv1d"], "init_weights": False, "trainable_token_indices": {"emb": [3, 4, 5, 6]}}
_PARAMETER = {"target_parameters": ["lin0.weight"], "init_weights": False}
MULTIPLE_ACTIVE = [
    ("ABBA Same", "abba", AbbaPeftConfig, _LAYER, _LAYER),
    ("ABBA Different", "abba", AbbaPeftConfig, _LAYER, _OTHER),
    ("ABBA + trainable tokens Same", "lora+trainable_tokens", AbbaPeftConfig, _TOKENS,
     {**_TOKENS, "trainable_token_indices": {"emb": [3, 4, 5, 6]}}),
    ("ABBA + trainable tokens Different", "lora+trainable_tokens", AbbaPeftConfig, _TOKENS, _OTHER_TOKENS),
    ("ABBA targeting nn.Parameter Same", "abba", AbbaPeftConfig, _PARAMETER, _PARAMETER),
]


def _mixed(first: dict, second: dict) -> tuple:
    return AbbaPeftConfig(init_weights=False, **first), AbbaPeftConfig(init_weights=False, **second)


MIXED = [("ABBA mixed adapter", *_mixed({"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "r": 16}))]
MIXED_PER_TEST = {  # tests with a table of their own
    "test_mixed_adapter_batches_different_target_layers": _mixed({"target_modules": ["lin0"]}, {"target_modules": ["lin1"]}),
    "test_mixed_adapter_batches_multiple_modules_to_save": _mixed(
        *itertools.repeat({"target_modules": ["lin0"], "modules_to_save": ["lin1"]}, 2)),
    "test_mixed_adapter_batches_unsupported_layer_raises": _mixed(
        *itertools.repeat({"target_modules": ["lin0"], "modules_to_save": ["gru"]}, 2)),
    "test_mixed_adapter_batches_partly_overlapping_target_layers": _mixed(
        {"target_modules": ["lin0"]}, {"target_modules": ["lin0", "lin1"]}),
    "test_mixed_adapter_batches_lora_conv1d_emb": _mixed(
        {"target_modules": ["emb", "conv1d"]}, {"target_modules": ["emb", "conv1d"], "r": 16}),
    "test_mixed_adapter_batches_lora_conv1d_emb_multiple_modules_to_save": _mixed(
        *itertools.repeat({"target_modules": ["emb", "conv1d"], "modules_to_save": ["lin0"]}, 2)),
    "test_mixed_adapter_batches_lora_conv2d": _mixed({"target_modules": ["conv2d"]}, {"target_modules": ["conv2d"], "r": 16}),
    "test_mixed_adapter_batches_lora_wrong_adapter_name_raises": _mixed({"target_modules": ["lin0"]}, {})[:1],
}

_SETTINGS = [{"r": 4, "alpha": 4.0}, {"r1": 3, "r2": 2, "alpha": 4.0, "abba_dropout": 0.05, "bias": "none"},
             {"target_modules": "all-linear", "scaling": "official", "alpha": 1.0}]
DECODER = [(AbbaPeftConfig, {"task_type": "CAUSAL_LM", **kwargs}) for kwargs in (
    *_SETTINGS, {"r": 8, "trainable_token_indices": [0, 1, 3]})]
ENCODER_DECODER = [(AbbaPeftConfig, {"task_type": "SEQ_2_SEQ_LM", **kwargs}) for kwargs in _SETTINGS]
CONFIG = ((AbbaPeftConfig, {}),)
COMPILE = {
    "abba": (AbbaPeftConfig(task_type="CAUSAL_LM"), {}),
    "abba-q-v": (AbbaPeftConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"], recompute_u=True), {}),
}
CONVERTED = {"r": 4, "alpha": 4.0, "target_modules": ["q_proj", "v_proj"]}
