"""patch_model and its relatives: which layers, what is frozen, what comes back."""
import copy
import gc
import io
import weakref

import architectures
import pytest
import torch
from torch import nn

import abba_ext
from abba_ext import AbbaConfig, patch_model
from abba_ext.layers import FACTORS


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(8, 8), nn.Linear(8, 8, bias=False)
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return x + self.k_proj(torch.relu(self.q_proj(self.norm(x))))


class Toy(nn.Module):
    def __init__(self, blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(8, 10)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


IDS = torch.arange(10)[None]


def adapted(config=None, model=None):
    return list(abba_ext.abba_layers(patch_model(model or Toy(), config)))


def test_default_is_every_linear_of_the_repeated_blocks():
    assert adapted() == [f"layers.{i}.{p}" for i in range(3) for p in ("q_proj", "k_proj")]
    assert adapted(model=nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))) == ["0", "2"]


def test_all_linear_leaves_the_output_head_out():
    model = architectures.build("llama")
    by_default = adapted(model=architectures.build("llama"))
    assert set(adapted(AbbaConfig(r=4, target_modules="all-linear"), model)) == set(by_default)


@pytest.mark.parametrize("kwargs, expected", [
    ({"target_modules": ["q_proj"]}, ["layers.0.q_proj", "layers.1.q_proj", "layers.2.q_proj"]),
    ({"target_modules": ["layers.1.q_proj", "head"]}, ["layers.1.q_proj", "head"]),
    ({"target_modules": ["1.q_proj"]}, ["layers.1.q_proj"]),
    ({"target_modules": r"layers\.[02]\.k_proj"}, ["layers.0.k_proj", "layers.2.k_proj"]),
    ({"target_modules": "all-linear"}, [f"layers.{i}.{p}" for i in range(3) for p in ("q_proj", "k_proj")] + ["head"]),
    ({"target_modules": "all-linear", "exclude_modules": ["head", "k_proj"]}, [f"layers.{i}.q_proj" for i in range(3)]),
    ({"exclude_modules": r".*\.0\..*", "layers_to_transform": [0, 2]}, ["layers.2.q_proj", "layers.2.k_proj"]),
    ({"layers_to_transform": 1, "target_modules": ["k_proj"]}, ["layers.1.k_proj"]),
], ids=str)
def test_selection(kwargs, expected):
    assert adapted(AbbaConfig(**kwargs)) == expected


ERRORS = {
    "near miss": ({"target_modules": ["q_prj"]}, r"target_modules: 'q_prj' matches no layer that can be adapted; near misses: q_proj"),
    "one of two": ({"target_modules": ["q_proj", "v_proj"]}, r"target_modules: 'v_proj' matches no layer that can be adapted"),
    "no substring match": ({"target_modules": ["proj"]}, "matches no layer that can be adapted"),
    "regex": ({"target_modules": "query.*"}, "target_modules: 'query.*' matches no layer .* are named embed, q_proj, k_proj, head"),
    "not a layer": ({"target_modules": ["layers"]}, r"\('layers' is a ModuleList; linear layers \(torch.nn.Linear, transformers'"),
    "nothing left": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "no layer is left to adapt"),
    "excluded": ({"exclude_modules": ["heads"]}, "exclude_modules: 'heads' matches no module"),
    "excluded regex": ({"exclude_modules": r"heads\..*"}, r"exclude_modules: 'heads\\\\..\*' matches no module"),
    "a suffix for a regex": ({"target_modules": "q_proj"}, r"for the full name: give a list, \['q_proj'\]"),
    "layers": ({"layers_to_transform": [7]}, r"layers_to_transform \[7\]: the targets lie in blocks \[0, 1, 2\]"),
    "rank_pattern": ({"rank_pattern": {"v_proj": 4}}, "rank_pattern: 'v_proj' fits no adapted layer"),
    "alpha_pattern": ({"alpha_pattern": {"v_proj": 4}}, "alpha_pattern: 'v_proj' fits no adapted layer"),
    "modules_to_save": ({"modules_to_save": ["heads"]}, "modules_to_save: no module is named 'heads'; near misses: head"),
    "both": ({"modules_to_save": ["q_proj"], "target_modules": ["q_proj"]}, "'layers.0.q_proj' cannot be both adapted and trained in full"),
}


@pytest.mark.parametrize("kwargs, message", ERRORS.values(), ids=ERRORS)
def test_errors_leave_the_model_alone(kwargs, message):
    model = Toy()
    with pytest.raises(ValueError, match=message):
        patch_model(model, AbbaConfig(**kwargs))
    assert not abba_ext.is_patched(model) and all(p.requires_grad for p in model.parameters())


def test_failing_initialisation_leaves_the_model_alone():
    model = Toy()
    model.layers[2].k_proj.weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="finite"):
        patch_model(model)
    assert not abba_ext.is_patched(model) and all(p.requires_grad for p in model.parameters())


def test_wrong_arguments():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        patch_model("gpt2")
    with pytest.raises(TypeError, match="config must be an AbbaConfig, got dict"):
        patch_model(Toy(), {"r": 4})
    model = patch_model(Toy())
    with pytest.raises(ValueError, match="already has ABBA layers"):
        patch_model(model)
    for call in (abba_ext.unpatch_model, abba_ext.merge_and_unload, abba_ext.merge, abba_ext.adapter_state_dict):
        with pytest.raises(ValueError, match="model is not patched"):
            call(Toy())


def test_ranks_and_scales_follow_patterns():
    model = patch_model(Toy(), AbbaConfig(r=4, alpha=2.0, rank_pattern={"layers.1.q_proj": (1, 3)}, alpha_pattern={"k_proj": 4.0}))
    layers = abba_ext.abba_layers(model)
    assert layers["layers.1.q_proj"].abba_A2.shape == (3, 8) and layers["layers.0.q_proj"].abba_A2.shape == (2, 8)
    assert layers["layers.0.q_proj"].abba_scale == 2.0 and layers["layers.0.k_proj"].abba_scale == 8.0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_adapter_dtype(dtype):
    model = patch_model(Toy(), AbbaConfig(adapter_dtype=dtype))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {getattr(torch, dtype)}
    model(IDS).sum().backward()


@pytest.mark.parametrize("bias, expected", [
    ("none", set()), ("abba_only", {f"layers.{i}.q_proj.bias" for i in range(3)}),
    ("all", {f"layers.{i}.{m}.bias" for i in range(3) for m in ("q_proj", "norm")} | {"head.bias"}),
])
def test_bias(bias, expected, tmp_path):
    model = patch_model(Toy(), AbbaConfig(bias=bias))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "abba_" not in n} == expected
    check_trained_parts(model, Toy(), tmp_path)


def test_modules_to_save(tmp_path):
    model = patch_model(Toy(), AbbaConfig(modules_to_save=["head", "0.norm"]))
    assert {n for n, p in model.named_parameters() if p.requires_grad and "abba_" not in n} == {
        "head.weight", "head.bias", "layers.0.norm.weight", "layers.0.norm.bias"}
    check_trained_parts(model, Toy(), tmp_path)


def check_trained_parts(model, fresh, tmp_path):
    """Training moves them; disabling, unpatching, saving and loading treat them as part of the adapter."""
    base = fresh(IDS)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        model(IDS).square().mean().backward()
        optimizer.step()
    trained = model(IDS)
    with abba_ext.disable_adapter(model):
        torch.testing.assert_close(model(IDS), base)
    assert torch.equal(model(IDS), trained)
    abba_ext.save_adapter(model, tmp_path)
    assert torch.equal(abba_ext.load_adapter(fresh, tmp_path)(IDS), trained)
    torch.testing.assert_close(abba_ext.merge_and_unload(fresh)(IDS), trained)
    torch.testing.assert_close(abba_ext.unpatch_model(model)(IDS), base)


def test_disable_adapter_restores_after_an_error_and_while_merged():
    model = patch_model(Toy())
    for layer in abba_ext.abba_layers(model).values():
        layer.abba_B2.data.normal_()
    base, ours = Toy()(IDS), model(IDS)
    with pytest.raises(KeyError), abba_ext.disable_adapter(model):
        raise KeyError
    assert torch.equal(model(IDS), ours)
    abba_ext.merge(model)
    with pytest.raises(ValueError, match="'layers.0.q_proj' is merged; unmerge it first"):
        abba_ext.initialize_adapter(model)
    merged = model(IDS)
    torch.testing.assert_close(merged, ours, atol=1e-4, rtol=1e-4)
    with abba_ext.disable_adapter(model):
        torch.testing.assert_close(model(IDS), base)
    assert torch.equal(model(IDS), merged)
    abba_ext.unmerge(model)
    assert torch.equal(model(IDS), ours)
    abba_ext.merge(model)
    torch.testing.assert_close(abba_ext.unpatch_model(model)(IDS), base)
    assert all(torch.equal(p, fresh) for p, fresh in zip(model.parameters(), Toy().parameters(), strict=True))


def test_shared_module_is_adapted_once():
    model = Toy()
    model.layers[2].q_proj = model.layers[0].q_proj
    assert adapted(model=model).count("layers.0.q_proj") == 1
    assert "layers.2.q_proj" not in abba_ext.abba_layers(model)
    assert type(model.layers[2].q_proj) is abba_ext.AbbaLinear and model.layers[2].q_proj is model.layers[0].q_proj
    other = Toy()
    other.layers[2].q_proj = other.layers[0].q_proj
    assert adapted(AbbaConfig(target_modules=["layers.2.q_proj"]), other) == ["layers.0.q_proj"]  # by its other name
    abba_ext.unpatch_model(model)
    assert type(model.layers[2].q_proj) is nn.Linear


def test_tied_weight_can_be_trained_but_not_merged():
    model = architectures.build("gemma")
    assert model.lm_head.weight is model.get_input_embeddings().weight
    patch_model(model, AbbaConfig(target_modules=["lm_head", "q_proj"]))
    model.lm_head.abba_B2.data.normal_()
    embedding = model.get_input_embeddings().weight.detach().clone()
    with pytest.raises(ValueError, match=r"cannot merge into lm_head.weight: it is tied to model.embed_tokens.weight"):
        abba_ext.merge_and_unload(model)
    assert abba_ext.is_patched(model) and torch.equal(model.get_input_embeddings().weight, embedding)
    abba_ext.unpatch_model(model)


def test_merge_is_all_or_nothing():
    model = patch_model(Toy())
    for layer in abba_ext.abba_layers(model).values():
        layer.abba_B2.data.normal_()
    state = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.layers[2].k_proj.abba_A1.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the merged weight of 'layers.2.k_proj' holds NaN or infinity; no weight was changed"):
        abba_ext.merge_and_unload(model, safe=True)
    assert all(torch.equal(p, state[n]) for n, p in model.named_parameters() if "abba_A1" not in n)


def test_merge_refuses_integer_weights_before_any_is_written():
    model = Toy()
    model.layers[2].k_proj.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    patch_model(model, AbbaConfig(init="random"))
    for layer in abba_ext.abba_layers(model).values():
        layer.abba_B2.data.normal_()
    before = model.layers[0].q_proj.weight.detach().clone()
    with pytest.raises(TypeError, match="cannot merge into a weight that is Parameter torch.int8"):
        abba_ext.merge_and_unload(model)
    assert torch.equal(model.layers[0].q_proj.weight, before) and abba_ext.is_patched(model)


def test_unmerge_without_copy_is_refused():
    model = patch_model(Toy())
    abba_ext.merge(model, keep_base=False)
    for call in (abba_ext.unmerge, abba_ext.unpatch_model):
        with pytest.raises(RuntimeError, match="keep_base=False"):
            call(model)
    with pytest.raises(RuntimeError, match="keep_base=False"), abba_ext.disable_adapter(model):
        pass


def test_trainable_parameter_line(capsys):
    model = patch_model(Toy(), AbbaConfig(r=4), verbose=True)
    expected = 6 * 4 * 16  # layers x (r1 + r2) x (m + n)
    assert abba_ext.get_nb_trainable_parameters(model)[0] == expected
    total = sum(p.numel() for p in model.parameters())
    assert capsys.readouterr().out == (f"trainable params: {expected:,d} || all params: {total:,d} || "
                                       f"trainable%: {100 * expected / total:.4f}\n")


def test_multihead_attention_projection_is_not_adapted_silently():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "mlp": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="output projection of torch.nn.MultiheadAttention, which reads its weight"):
        patch_model(model, AbbaConfig(target_modules=["out_proj"]))
    assert adapted(model=model) == ["mlp"]


@pytest.mark.parametrize("head, model_name", [("classifier", "bert"), ("classifier", "vit")])
def test_fresh_heads_are_trained_by_default(head, model_name):
    model = patch_model(architectures.build(model_name))
    assert getattr(model, head).weight.requires_grad
    model = patch_model(architectures.build(model_name), AbbaConfig(modules_to_save=[]))
    assert not getattr(model, head).weight.requires_grad


def test_requires_grad_flags_come_back():
    model = Toy()
    model.embed.weight.requires_grad_(False)
    for undo in (abba_ext.unpatch_model, abba_ext.merge_and_unload):
        undo(patch_model(model))
        assert {n for n, p in model.named_parameters() if not p.requires_grad} == {"embed.weight"}
        assert not model.embed._forward_hooks


@pytest.mark.parametrize("init", ["svd", "random"])
def test_patching_on_the_meta_device(init):
    config = AbbaConfig(r1=2, r2=3, init=init)
    real = Toy()
    expected = patch_model(copy.deepcopy(real), config)
    with torch.device("meta"):
        model = patch_model(Toy(), config)
    assert all(layer.abba_A1.is_meta for layer in abba_ext.abba_layers(model).values())
    with pytest.raises(ValueError, match="on the meta device; load the weights first"):
        abba_ext.initialize_adapter(model)
    model.to_empty(device="cpu")
    model.load_state_dict(real.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="initialize_adapter"):
        model(torch.arange(4))
    abba_ext.initialize_adapter(model)
    assert torch.equal(model(torch.arange(4)), expected(torch.arange(4)))
    for name, layer in abba_ext.abba_layers(model).items():
        assert all(torch.equal(getattr(layer, key), getattr(expected.get_submodule(name), key)) for key in FACTORS)


def test_an_adapter_loads_into_a_model_patched_on_the_meta_device(tmp_path):
    real = Toy()
    saved = patch_model(copy.deepcopy(real), AbbaConfig(r=4))
    abba_ext.save_adapter(saved, tmp_path)
    with torch.device("meta"):
        model = patch_model(Toy(), AbbaConfig(r=4))
    with pytest.raises(ValueError, match="the weight of 'layers.0.q_proj' has no values: it is on the meta device"):
        abba_ext.load_adapter(model, tmp_path)
    model.to_empty(device="cpu").load_state_dict(real.state_dict(), strict=False)
    assert torch.equal(abba_ext.load_adapter(model, tmp_path)(torch.arange(4)), saved(torch.arange(4)))


@pytest.mark.parametrize("assign", [True, False])
def test_a_state_dict_gives_factors_their_values(assign):
    source = patch_model(Toy(), AbbaConfig(r=4))
    with torch.device("meta"):
        model = patch_model(Toy(), AbbaConfig(r=4))
    if not assign:
        model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(model(IDS), source(IDS))


# --- modules that do not call their layers ---


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("target", [{}, {"target_parameters": ["self_attn.in_proj_weight"], "target_modules": []}], ids=["mlp", "attention"])
def test_torch_encoders_call_their_layers_in_eval_mode(target, padding):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 2)
    x, mask = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None

    def run():
        with torch.no_grad():
            return encoder(x, src_key_padding_mask=mask)[:, :3]

    base = run() if not padding else encoder.eval()(x, src_key_padding_mask=mask)[:, :3].detach()
    patch_model(encoder, AbbaConfig(r=4, **target))
    for layer in abba_ext.abba_layers(encoder).values():
        layer.abba_B2.data.normal_(std=0.05)
    expected = encoder.train()(x, src_key_padding_mask=mask)[:, :3]
    assert (expected - base).abs().max() > 0.1
    encoder.eval()
    torch.testing.assert_close(run(), expected)
    with abba_ext.disable_adapter(encoder):
        torch.testing.assert_close(run(), base)
    abba_ext.merge_and_unload(encoder)
    torch.testing.assert_close(run(), expected)
    assert encoder.use_nested_tensor and not any(module._forward_pre_hooks for module in encoder.modules())


def test_layers_that_transformers_bypasses():
    """Every layer that is adapted by default learns; the others are refused by name."""
    import transformers as tf

    wavlm = tf.WavLMModel(tf.WavLMConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, conv_dim=(16, 16),
                                         conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16, layerdrop=0.0,
                                         num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, apply_spec_augment=False))
    mamba = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=32, num_hidden_layers=1, state_size=4, vocab_size=64))
    for model, batch, output, refused in ((wavlm, torch.randn(1, 800), "last_hidden_state", "v_proj"), (mamba, IDS, "logits", "dt_proj")):
        with pytest.raises(ValueError, match=f"{refused}' is computed by .* itself, which reads its weight without calling it"):
            patch_model(model, AbbaConfig(target_modules=[refused]))
        patch_model(model.train(), AbbaConfig(r=4))
        getattr(model(batch), output).square().sum().backward()
        assert all(layer.abba_B2.grad.any() for layer in abba_ext.abba_layers(model).values())


def test_gates_of_one_output_are_left_out():
    model = Toy()
    for block in model.layers:
        block.gate = nn.Linear(8, 1)
    assert adapted(model=model) == adapted()


# --- what else is in the model ---


def test_adapters_of_peft_are_refused(tmp_path):
    import peft

    model = peft.get_peft_model(Toy(), peft.LoraConfig(target_modules=["q_proj"]))
    abba_ext.save_adapter(patch_model(Toy()), tmp_path)
    for call in (patch_model, lambda model: abba_ext.load_adapter(model.base_model.model, tmp_path)):
        with pytest.raises(ValueError, match=r"adapter of PEFT \('.*q_proj' is a Linear\); give it ABBA with peft.get_peft_model"):
            call(model)
    assert not abba_ext.is_patched(model) and model.get_nb_trainable_parameters()[0] > 0


def test_offloaded_weights_are_refused():
    from accelerate import cpu_offload

    model = cpu_offload(architectures.build("llama"), execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="0 layers that can be adapted .*q_proj' is offloaded by accelerate"):
        patch_model(model)


def test_a_single_layer_is_pointed_to_its_constructor():
    with pytest.raises(ValueError, match="it is one itself; AbbaLinear.from_linear adapts a single layer"):
        patch_model(nn.Linear(4, 4))


@pytest.mark.parametrize("wanted", ["lm_head", "embed_tokens"])
def test_a_tied_weight_is_trained_by_either_name(wanted, tmp_path):
    model = patch_model(architectures.build("gemma"), AbbaConfig(modules_to_save=[wanted]))
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.lm_head.weight.requires_grad
    assert [name for name in abba_ext.adapter_state_dict(model) if "abba_" not in name] == ["model.embed_tokens.weight"]
    with torch.no_grad():
        model.lm_head.weight.add_(1.0)
    abba_ext.save_adapter(model, tmp_path)
    again = abba_ext.load_adapter(architectures.build("gemma"), tmp_path)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


def test_a_module_without_parameters_cannot_be_trained():
    model = Toy()
    model.act = nn.ReLU()
    model.layers[1].norm = nn.Identity()
    assert patch_model(copy.deepcopy(model), AbbaConfig(modules_to_save=["norm"])).layers[0].norm.weight.requires_grad
    with pytest.raises(ValueError, match="modules_to_save: 'act' holds no floating-point parameter to train"):
        patch_model(model, AbbaConfig(modules_to_save=["act"]))


def test_contexts_of_disabled_adapters_nest():
    model = patch_model(Toy(), AbbaConfig(modules_to_save=["head"]))
    base = model.head.weight.detach().clone()
    model.head.weight.data.add_(1.0)
    with abba_ext.disable_adapter(model):
        with abba_ext.disable_adapter(model):
            assert torch.equal(model.head.weight, base)
        assert torch.equal(model.head.weight, base)
    assert torch.equal(model.head.weight, base + 1.0)


def test_disabling_after_a_change_of_dtype():
    model = patch_model(Toy(), AbbaConfig(modules_to_save=["head"])).bfloat16()
    with abba_ext.disable_adapter(model):
        assert model(IDS).dtype == torch.bfloat16


@pytest.mark.parametrize("undo", [abba_ext.unpatch_model, abba_ext.merge_and_unload])
def test_parameters_that_came_later_stay(undo):
    model = patch_model(Toy())
    model.value_head = nn.Linear(8, 1)
    undo(model)
    assert not abba_ext.is_patched(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_a_trained_parameter_that_was_resized_cannot_be_undone():
    model = patch_model(architectures.build("llama"), AbbaConfig(modules_to_save=["embed_tokens", "lm_head"]))
    model.resize_token_embeddings(80)
    for call in (abba_ext.unpatch_model, lambda model: abba_ext.disable_adapter(model).__enter__()):
        with pytest.raises(RuntimeError, match=r"was \[64, 32\] when the model was patched and is \[80, 32\] now"):
            call(model)
    assert abba_ext.is_patched(model) and all(layer.abba_enabled for layer in abba_ext.abba_layers(model).values())


# --- copies, and hooks of checkpointing ---


def test_a_model_of_transformers_can_be_pickled():
    model = patch_model(architectures.build("llama"), AbbaConfig(r=4)).eval()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    batch = architectures.inputs("llama")
    assert torch.equal(torch.load(buffer, weights_only=False)(**batch).logits, model(**batch).logits)


def test_a_copy_of_a_model_stands_alone():
    model = patch_model(architectures.build("llama"), AbbaConfig(r=4))
    alive, twin = weakref.ref(model), copy.deepcopy(model)
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    twin.disable_input_require_grads()  # transformers' own hook; ours is left
    assert not model.model.embed_tokens(IDS).requires_grad and twin.model.embed_tokens(IDS).requires_grad
    del model
    gc.collect()
    assert alive() is None
    abba_ext.unpatch_model(twin)
    assert not twin.model.embed_tokens._forward_hooks


def test_inference_pays_nothing_for_checkpointing():
    """Without gradients no module is asked whether it checkpoints."""
    model = patch_model(architectures.build("llama"), AbbaConfig(r=4))

    class Asked:
        @property
        def gradient_checkpointing(self):
            raise AssertionError

    [hook] = model.model.embed_tokens._forward_hooks.values()
    hook.checkpointing[:] = [Asked()]
    with torch.no_grad():
        model(IDS)
    with pytest.raises(AssertionError):
        model.requires_grad_(False)(IDS)


def images():
    return {"pixel_values": torch.randn(2, 3, 16, 16), "labels": torch.tensor([0, 1])}


def build_swin():
    import transformers as tf

    config = tf.SwinConfig(image_size=16, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=2,
                           drop_path_rate=0.0)
    return tf.SwinForImageClassification(config), images()


def build_segformer():
    import transformers as tf

    config = tf.SegformerConfig(num_encoder_blocks=1, depths=[2], sr_ratios=[2], hidden_sizes=[16], patch_sizes=[3],
                                strides=[2], mlp_ratios=[2], num_attention_heads=[2], drop_path_rate=0.0, hidden_dropout_prob=0.0)
    return tf.SegformerForImageClassification(config), images()


def build_speech():
    import transformers as tf

    config = tf.Wav2Vec2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
                               conv_dim=(16, 16), conv_stride=(5, 2), conv_kernel=(10, 3), num_conv_pos_embeddings=16,
                               num_conv_pos_embedding_groups=2, num_feat_extract_layers=2, layerdrop=0.0, feat_proj_dropout=0.0,
                               apply_spec_augment=False, hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0)
    model = tf.Wav2Vec2ForSequenceClassification(config)
    model.freeze_feature_encoder()
    return model, {"input_values": torch.randn(2, 400), "labels": torch.tensor([0, 1])}


def build_embedded():
    return architectures.build("llama"), {"inputs_embeds": torch.randn(1, 5, 32), "labels": torch.arange(1, 6)[None]}


@pytest.mark.parametrize("build", [build_swin, build_segformer, build_speech, build_embedded])
def test_reentrant_checkpointing_keeps_gradients_of_other_inputs_than_tokens(build):
    """Where a head is trained too, the loss has gradients all the same, and only the head would learn."""
    torch.manual_seed(0)
    model, batch = build()
    patch_model(model.train(), AbbaConfig(r=4))
    for layer in abba_ext.abba_layers(model).values():
        nn.init.normal_(layer.abba_B2, std=0.1)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        model.zero_grad()
        model(**batch).loss.backward()
        grads.append({name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad})
    assert not any(isinstance(value, torch.Tensor) and value.requires_grad for value in batch.values())
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-7, rtol=1e-4, msg=name)
    abba_ext.unpatch_model(model)
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    assert not any(hasattr(hook, "__self__") for hook in hooks)
