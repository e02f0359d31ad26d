"""Routers are found and checked, in stock models and inside wrappers; the rest is refused by name."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.hf_models import EXTRA, MODELS, REQUIRED, D, E, K, tiny_config, tiny_model
from trimtab.integrations.discovery import (
    FoundRouter,
    context_module,
    discover,
    stock_aux_loss_active,
    verify,
)
from trimtab.integrations.families import FAMILIES, UNSERVABLE, Family, unpack_dense_scores
from trimtab.integrations.probe import RouterMismatchError

GROUPED = {"deepseek_v2", "deepseek_v3"}
CONTEXT = {
    "llama4": "Llama4TextModel",
    "qwen3_vl_moe": "Qwen3VLMoeTextModel",
    "qwen3_5_moe": "Qwen3_5MoeTextModel",
}


class Recorder:
    """What transformers' OutputRecorder looks like from outside."""

    def __init__(self, target_class, index=0, layer_name=None):
        self.target_class, self.index, self.layer_name = target_class, index, layer_name


class StrangerRouting(nn.Module):
    """A router class that no table has: sigmoid scores, selection bias, renormalised, scaled."""

    def __init__(self, score=torch.sigmoid):
        super().__init__()
        self.num_experts, self.top_k, self.score = E, K, score
        self.weight = nn.Parameter(torch.randn(E, D))
        self.register_buffer("e_score_correction_bias", torch.zeros(E))

    def forward(self, hidden_states):
        logits = F.linear(hidden_states, self.weight)
        scores = self.score(logits)
        ids = (scores + self.e_score_correction_bias).topk(self.top_k, dim=-1).indices
        weights = scores.gather(1, ids)
        return logits, 2.5 * weights / weights.sum(-1, keepdim=True), ids


class Block(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.gate = router

    def forward(self, hidden_states):
        return hidden_states


class StrangerModel(nn.Module):
    def __init__(self, *routers):
        super().__init__()
        self.layers = nn.ModuleList(Block(router) for router in routers)

    def forward(self, input_ids=None, attention_mask=None):
        return input_ids


def stranger_model(*routers, index=0):
    class Recording(StrangerModel):
        _can_record_outputs = {"router_logits": [Recorder(type(routers[0]), index)]}  # noqa: RUF012

    return Recording(*routers)


@pytest.mark.parametrize("family", MODELS)
def test_stock_model_is_found_and_verified(family):
    _, router_class, score, bias_at, _ = MODELS[family]
    model, make_batch = tiny_model(family)
    found = discover(model)

    assert [type(router.module).__name__ for router in found] == [router_class] * 2
    for layer, router in enumerate(found):
        assert model.get_submodule(router.name) is router.module
        assert f"layers.{layer}." in router.name
        assert (router.num_experts, router.top_k, router.score) == (E, K, score)
        assert router.grouped == (family in GROUPED)
        bias = router.expert_bias
        assert (bias is None) == (bias_at is None)
        if bias is not None:
            assert bias.shape == (E,)
            assert bias.abs().max() > 0
    verify(found)

    expected = CONTEXT.get(family, MODELS[family][0].replace("ForCausalLM", "Model"))
    assert type(context_module(model, found)).__name__ == expected

    seen = []
    for router in found:
        router.module.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**make_batch(padding=True)).loss.backward()
    for router, output in zip(found, seen, strict=True):
        logits, weights, ids = router.family.unpack(output, router.top_k)
        assert logits.shape == (32, E)
        assert ids.shape == (32, K)
        assert ids.dtype == torch.int64
        assert len(ids.unique()) > K
        again = router.family.unpack(router.family.repack(output, weights * 2), router.top_k)
        torch.testing.assert_close(again[1], weights * 2)
        torch.testing.assert_close(again[0], logits)


def test_required_families_are_all_there():
    assert len(REQUIRED) == 15
    assert not set(REQUIRED) & set(EXTRA)
    assert not set(FAMILIES) & set(UNSERVABLE)
    assert all(name == family.router_class for name, family in FAMILIES.items())


@pytest.mark.parametrize("family", ["deepseek_v3", "minimax_m2", "ernie4_5_moe", "afmoe"])
def test_expert_bias_is_the_live_tensor(family):
    model, make_batch = tiny_model(family)
    model.eval()
    router = discover(model)[0]
    before = router.expert_bias.clone()
    delta = torch.arange(E) - 2.0
    router.add_to_expert_bias(delta)
    torch.testing.assert_close(router.expert_bias, before + delta)
    router.add_to_expert_bias(100.0 * F.one_hot(torch.tensor(3), E))
    ids = []
    router.module.register_forward_hook(lambda module, args, output: ids.append(output[2]))
    model(**make_batch())
    assert (ids[0] == 3).any(1).all()


def test_expert_bias_update_is_validated():
    router = discover(tiny_model("mixtral")[0])[0]
    with pytest.raises(ValueError, match=r"MixtralTopKRouter at .* has no selection bias to update"):
        router.add_to_expert_bias(torch.zeros(E))
    router = discover(tiny_model("glm4_moe")[0])[0]
    with pytest.raises(ValueError, match=r"delta_E has shape \(3,\), expected \(8,\)"):
        router.add_to_expert_bias(torch.zeros(3))


@pytest.mark.parametrize("family", MODELS)
def test_input_is_kept_exactly_where_the_table_says(family):
    overrides = [{}]
    if family == "ernie4_5_moe":
        overrides.append({"moe_num_shared_experts": 0})
    for override in overrides:
        model, make_batch = tiny_model(family, dtype=torch.bfloat16, **override)
        router = discover(model)[0]
        assert router.keeps_input == (override == {})
        assert router.keeps_input == _input_is_saved(model, router, make_batch())
    # A frozen gate saves no input. What the table does not see (a shared expert beside the block) may.
    router.module.requires_grad_(False)
    assert router.keeps_input <= _input_is_saved(model, router, make_batch())


def _input_is_saved(model, router: FoundRouter, batch) -> bool:
    inputs, saved = [], []
    handle = router.module.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    def pack(tensor):
        saved.append((tensor.untyped_storage().data_ptr(), tensor.dtype))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**batch)
    handle.remove()
    return (inputs[0].untyped_storage().data_ptr(), torch.bfloat16) in saved


@pytest.mark.parametrize("family", MODELS)
def test_meta_model(family):
    model_class, config = tiny_config(family)
    with torch.device("meta"):
        model = model_class(config)
        found = discover(model)
        verify(found)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert len(found) == 2


@pytest.mark.parametrize("family", REQUIRED)
def test_verify_leaves_no_trace(family):
    model, _ = tiny_model(family, dtype=torch.bfloat16)
    found = discover(model)
    calls = []
    for router in found:
        router.module.register_forward_hook(lambda *_: calls.append(1))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes = [copy.copy(vars(router.module)) for router in found]
    state = torch.get_rng_state()
    verify(found)
    assert torch.equal(state, torch.get_rng_state())
    assert [vars(router.module) for router in found] == attributes
    assert not calls
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.dtype == before[name].dtype
    assert all(parameter.grad is None for parameter in model.parameters())


def test_one_probe_per_kind_of_router(monkeypatch):
    probed = []
    monkeypatch.setattr(
        "trimtab.integrations.discovery.verify_router", lambda module, *rest: probed.append(module)
    )
    found = discover(tiny_model("qwen3_moe", num_layers=4)[0])
    verify(found)
    assert probed == [found[0].module]
    found[2].module.norm_topk_prob = False
    verify(found)
    assert probed == [found[0].module, found[0].module, found[2].module]


def test_probe_of_a_large_router_is_small():
    class Gate(StrangerRouting):
        def __init__(self):
            nn.Module.__init__(self)
            self.num_experts, self.top_k, self.score = 512, 8, torch.sigmoid
            self.weight = nn.Parameter(torch.empty(512, 7168, device="meta"))
            self.register_buffer("e_score_correction_bias", torch.empty(512, device="meta"))

    found = discover(stranger_model(Gate()))
    assert (found[0].num_experts, found[0].top_k, found[0].score) == (512, 8, "sigmoid")
    verify(found)


WRONG_ROWS = [
    (
        "qwen3_moe",
        {"score": "sigmoid"},
        r"Qwen3MoeTopKRouter at .*declares score='sigmoid'.*follow 'softmax'",
    ),
    ("gpt_oss", {"score": "sqrt_softplus"}, r"declares score='sqrt_softplus'.*follow 'softmax'"),
    ("deepseek_v3", {"score": "softmax"}, r"declares score='softmax'.*follow 'sigmoid'; set score='sigmoid'"),
    ("deepseek_v4", {"score": "sigmoid"}, r"declares score='sigmoid'.*follow 'sqrt_softplus'"),
    ("llama4", {"score": "softmax"}, r"declares score='softmax'.*follow 'sigmoid'"),
    ("glm4_moe", {"expert_bias": None}, r"not the top 2 of sigmoid scores; check expert_bias=None"),
    ("glm4_moe", {"bias_on_logits": True}, r"not the top 2 of sigmoid scores plus the bias"),
    ("deepseek_v3", {"grouped": lambda router: False}, r"not the top 2 of sigmoid scores"),
    ("gpt_oss", {"bias": None}, r"logits are not F.linear\(x, weight, None\).*linear_logits=False"),
    ("afmoe", {"weight": "gate.bias"}, r"weight='gate.bias', which gives None; expected an \(8, D\) tensor"),
    (
        "afmoe",
        {"input_ndim": 2},
        r"probe's call failed with ValueError.*Expected forward\(hidden_states, exp",
    ),
    ("llama4", {"unpack": FAMILIES["OlmoeTopKRouter"].unpack}, r"probe's call failed with IndexError"),
    (
        "olmoe",
        {"unpack": unpack_dense_scores},
        r"the output gives logits \(32, 2\).*expected logits \(32, 8\)",
    ),
    ("qwen3_moe", {"repack": lambda output, weights: output}, r"unpack\(repack\(output, weights\)\)"),
]


@pytest.mark.parametrize(("family", "wrong", "message"), WRONG_ROWS)
def test_a_wrong_row_is_caught(family, wrong, message):
    model, _ = tiny_model(family)
    router_class = MODELS[family][1]
    row = dataclasses.replace(FAMILIES[router_class], **wrong)
    with pytest.raises(RouterMismatchError, match=f"(?s){message}"):
        verify(discover(model, extra={router_class: row}))


@pytest.mark.parametrize("top_k", [1, 2, E])
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "llama4", "glm4_moe", "gpt_oss", "minimax_m2"])
def test_top_1_and_top_all_are_verified(family, top_k):
    model, _ = tiny_model(family, num_experts_per_tok=top_k)
    found = discover(model)
    assert {router.top_k for router in found} == {top_k}
    verify(found)
    wrong = "softmax" if found[0].score == "sigmoid" else "sigmoid"
    row = dataclasses.replace(found[0].family, score=wrong)
    with pytest.raises(RouterMismatchError, match=f"declares score='{wrong}'"):
        verify(discover(model, extra={row.router_class: row}))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"score": "tanh"}, r"Family\(X\): score='tanh' is unknown; choose one of 'softmax'"),
        ({"expert_bias": "my_bias"}, r"must start with 'router.' or 'block.'; write 'router.my_bias'"),
        ({"input_ndim": 1}, r"input_ndim=1 must be 2 or 3"),
    ],
)
def test_family_validates(wrong, message):
    with pytest.raises(ValueError, match=message):
        Family(**({"router_class": "X", "model_types": (), "score": "softmax", "source": "test"} | wrong))


def test_wrong_size_path_is_named():
    row = dataclasses.replace(FAMILIES["OlmoeTopKRouter"], top_k="config.k")
    with pytest.raises(ValueError, match=r"OlmoeTopKRouter at .*Family.top_k='config.k' gives None"):
        discover(tiny_model("olmoe")[0], extra={"OlmoeTopKRouter": row})


@pytest.mark.parametrize(
    ("score", "name"),
    [
        (torch.sigmoid, "sigmoid"),
        (lambda z: z.softmax(-1), "softmax"),
        (lambda z: F.softplus(z).sqrt(), "sqrt_softplus"),
    ],
)
def test_unknown_class_is_served_through_the_recorders(score, name):
    model = stranger_model(StrangerRouting(score), StrangerRouting(score))
    found = discover(model)
    assert [router.name for router in found] == ["layers.0.gate", "layers.1.gate"]
    assert {router.score for router in found} == {name}
    assert (found[0].num_experts, found[0].top_k) == (E, K)
    assert found[0].expert_bias is found[0].module.e_score_correction_bias
    assert found[0].block is model.layers[0]
    assert found[0].linear_logits
    verify(found)
    assert context_module(model, found) is model
    assert context_module(model, found[:1]) is model


def test_unknown_class_with_an_unknown_score_is_refused():
    model = stranger_model(StrangerRouting(lambda z: z.sigmoid() ** 2))
    message = (
        r"cannot serve router StrangerRouting at 'layers.0.gate'.*none fits.*families=\{'StrangerRouting'"
    )
    with pytest.raises(ValueError, match=message):
        discover(model)


def test_unknown_class_with_an_unseen_bias_is_caught():
    class Hidden(StrangerRouting):
        def forward(self, hidden_states):
            logits, weights, ids = super().forward(hidden_states)
            return logits, weights, (ids + 1) % E

    with pytest.raises(ValueError, match=r"cannot serve router Hidden.*none fits"):
        discover(stranger_model(Hidden()))


def test_unknown_class_with_other_logits_index_is_refused():
    with pytest.raises(ValueError, match="its logits are output 1; expected \\(logits, weights, ids"):
        discover(stranger_model(StrangerRouting(), index=1))


def test_model_without_routers():
    with pytest.raises(
        ValueError, match=r"Sequential has no Mixture-of-Experts routers: looked for.*dense model"
    ):
        discover(nn.Sequential(nn.Linear(2, 2)))


def test_model_with_an_unrecorded_stranger():
    model = StrangerModel(StrangerRouting())
    type(model.layers[0].gate).__name__ = "MoEGate"
    try:
        with pytest.raises(
            ValueError, match=r"no router that trimtab knows.*MoEGate at 'layers.0.gate' looks"
        ):
            discover(model)
    finally:
        StrangerRouting.__name__ = "StrangerRouting"


UNSERVED = {
    "jetmoe": ("JetMoeModel", "JetMoeTopKGating", {}),
    "doge": ("DogeModel", "DogeCDMoE", {"is_moe": True, "num_experts": 16}),
    "switch_transformers": ("SwitchTransformersEncoderModel", "SwitchTransformersTop1Router", {}),
    "deepseek_v4": ("DeepseekV4Model", "DeepseekV4HashRouter", {"q_lora_rank": 8}),
}


@pytest.mark.parametrize("family", UNSERVED)
def test_unservable_router_is_named(family):
    import importlib

    name, router_class, settings = UNSERVED[family]
    model_class = getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
    sizes = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 16, "num_local_experts": E, "head_dim": 8}
    with torch.device("meta"):
        model = model_class(model_class.config_class(**(sizes | settings)))
    reason = UNSERVABLE[router_class][:30]
    with pytest.raises(
        ValueError, match=rf"cannot serve router {router_class} at '.*\.0\..*': {reason}|{reason}"
    ):
        discover(model)


def test_dbrx_router_is_named():
    from types import SimpleNamespace

    from transformers.models.dbrx.modeling_dbrx import DbrxRouter

    config = SimpleNamespace(hidden_size=D, moe_jitter_eps=None, moe_num_experts=E)
    with pytest.raises(
        ValueError, match=r"cannot serve router DbrxRouter at 'layers.0.gate': it returns logits only"
    ):
        discover(StrangerModel(DbrxRouter(config)))


def test_unservable_class_can_be_left_alone_or_adapted():
    settings = {"mlp_layer_types": ["hash_moe", "moe"]}
    model, _ = tiny_model("deepseek_v4", **settings)
    with pytest.raises(ValueError, match=r"families=\{'DeepseekV4HashRouter': None\}"):
        discover(model)
    found = discover(model, extra={"DeepseekV4HashRouter": None})
    assert [type(router.module).__name__ for router in found] == ["DeepseekV4TopKRouter"]
    verify(found)
    # Its block takes input_ids as well; the context is the model all the same.
    assert type(context_module(model, found)).__name__ == "DeepseekV4Model"


def test_extra_row_wins_over_the_table():
    row = dataclasses.replace(FAMILIES["OlmoeTopKRouter"], source="mine")
    found = discover(tiny_model("olmoe")[0], extra={"OlmoeTopKRouter": row})
    assert found[0].family is row


def test_subclass_is_found_by_its_base():
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    model, _ = tiny_model("olmoe")
    mine = type("Mine", (OlmoeTopKRouter,), {})
    for router in discover(model):
        router.module.__class__ = mine
    found = discover(model)
    assert len(found) == 2
    verify(found)


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3_vl_moe", "mixtral", "gpt_oss"])
def test_stock_auxiliary_loss_is_reported(family):
    model, _ = tiny_model(family)
    assert stock_aux_loss_active(model) is None
    nested = family == "qwen3_vl_moe"
    config = model.config.text_config if nested else model.config
    config.output_router_logits = True
    path = "model.config.text_config" if nested else "model.config"
    told = stock_aux_loss_active(model)
    assert told is not None
    assert type(model).__name__ in told
    assert f"set {path}.output_router_logits = False" in told
    assert "router_aux_loss_coef=" in told
    assert stock_aux_loss_active(nn.ModuleDict({"wrapped": model})) == told
    # The base model computes no loss.
    assert stock_aux_loss_active(model.model) is None
    for holder in (model, config):
        if hasattr(holder, "router_aux_loss_coef"):
            holder.router_aux_loss_coef = 0.0
    assert stock_aux_loss_active(model) is None


def test_stock_auxiliary_loss_of_a_model_that_never_computes_it():
    model, _ = tiny_model("llama4")
    model.config.output_router_logits = True
    assert stock_aux_loss_active(model) is None
