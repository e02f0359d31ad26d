"""Discovery through what stands around a model: adapters, compile, checkpointing, data parallelism."""

import dataclasses
import warnings

import pytest
import torch
from torch import nn

from tests.hf_models import D, E, K, tiny_model
from tests.integrations.test_discovery import StrangerModel
from trimtab.integrations.discovery import (
    context_module,
    discover,
    verify,
)
from trimtab.integrations.probe import RouterMismatchError
from trimtab.router import Router


class TestWrappers:
    def test_lora_on_attention(self):
        model = _lora(tiny_model("qwen3_moe")[0], target_modules=["q_proj"])
        found = discover(model)
        assert found[0].name == "base_model.model.model.layers.0.mlp.gate"
        assert [r.canonical_name for r in found] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
        assert type(context_module(model, found)).__name__ == "Qwen3MoeModel"
        assert found[0].linear_logits
        verify(found)

    def test_lora_on_the_router_parameter(self):
        model, make_batch = tiny_model("deepseek_v3")
        gate = model.model.layers[0].mlp.gate
        model = _lora(model, target_parameters=["gate.weight"])
        found = discover(model)
        assert found[0].module is gate
        assert found[0].name.endswith("mlp.gate.base_layer")
        assert found[0].canonical_name == "model.layers.0.mlp.gate"
        assert type(found[0].block).__name__ == "DeepseekV3MoE"
        # The adapter adds to the weight during the forward only.
        assert not found[0].linear_logits
        verify(found)
        hits = []
        found[0].module.register_forward_hook(lambda *_: hits.append(1))
        model(**make_batch())
        assert hits == [1]

    @pytest.mark.parametrize("family", ["qwen3_moe", "minimax_m2"])
    def test_modules_to_save(self, family):
        model, make_batch = tiny_model(family)
        model = _lora(model, target_modules=["q_proj"], modules_to_save=["gate"])
        found = discover(model)
        assert [r.canonical_name for r in found] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
        assert all(r.name.endswith("gate.modules_to_save.default") for r in found)
        assert all(p.requires_grad for p in found[0].module.parameters())
        assert "SparseMoeBlock" in type(found[0].block).__name__
        assert (found[0].expert_bias is None) == (family == "qwen3_moe")
        verify(found)
        hits = []
        for router in found:
            router.module.register_forward_hook(lambda *_: hits.append(1))
        model(**make_batch())
        assert hits == [1, 1]
        with model.disable_adapter():
            assert [r.name.rpartition(".")[2] for r in discover(model)] == ["original_module"] * 2

    def test_lora_on_a_linear_inside_the_router(self):
        model = _lora(tiny_model("afmoe")[0], target_modules=["router.gate"])
        found = discover(model)
        assert len(found) == 2
        assert not found[0].linear_logits
        verify(found)

    def test_compiled_model_and_layers(self):
        model, _ = tiny_model("qwen3_moe")
        plain = [router.module for router in discover(model)]
        whole = discover(torch.compile(model, backend="eager"))
        assert [r.module for r in whole] == plain
        assert whole[0].name == "_orig_mod.model.layers.0.mlp.gate"
        gate = model.model.layers[0].mlp.gate
        model.model.layers[1] = torch.compile(model.model.layers[1], backend="eager")
        model.model.layers[0].mlp.gate = torch.compile(gate, backend="eager")
        found = discover(model)
        assert [r.module for r in found] == plain
        assert [r.canonical_name for r in found] == ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
        assert type(found[0].block).__name__ == "Qwen3MoeSparseMoeBlock"
        verify(found)

    def test_data_parallel_names(self):
        class DistributedDataParallel(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

        model, _ = tiny_model("mixtral")
        wrapped = DistributedDataParallel(model)
        assert [r.canonical_name for r in discover(wrapped)] == [r.name for r in discover(model)]
        assert type(context_module(wrapped, discover(wrapped))).__name__ == "MixtralModel"

    def test_parametrized_router(self):
        class Double(nn.Module):
            def forward(self, weight):
                return 2 * weight

        model, _ = tiny_model("qwen3_moe")
        gate = model.model.layers[0].mlp.gate
        torch.nn.utils.parametrize.register_parametrization(gate, "weight", Double())
        found = discover(model)
        assert [router.linear_logits for router in found] == [False, True]
        verify(found)

    def test_fully_sharded_router(self):
        # fully_shard puts a class of its own on top, and its modules refuse deepcopy.
        model, _ = tiny_model("deepseek_v3")
        router = model.model.layers[0].mlp.gate

        class FSDPModule:
            def __deepcopy__(self, memo):
                raise AssertionError("sharded modules cannot be copied")

        router.__class__ = type("FSDPDeepseekV3TopkRouter", (FSDPModule, type(router)), {})
        found = discover(model)
        assert found[0].module is router
        verify(found)

    def test_own_layer(self):
        shared = {"dim": D, "num_experts": E, "top_k": K, "normalize_top_k": True}
        configs = [
            Router.Config(score="softmax", **shared),
            Router.Config(score="sigmoid", expert_bias=True, **shared),
            Router.Config(score="softmax", score_after_top_k=True, expert_bias=True, **shared),
            Router.Config(score="sigmoid", num_groups=4, top_k_groups=2, **shared),
        ]
        model = StrangerModel(*[config.build() for config in configs])
        found = discover(model)
        assert [router.score for router in found] == ["softmax", "sigmoid", "softmax", "sigmoid"]
        assert [router.grouped for router in found] == [False, False, False, True]
        assert found[0].expert_bias is None
        assert found[1].expert_bias is found[1].module.expert_bias_E
        verify(found)
        wrong = dataclasses.replace(found[1].family, score="softmax")
        with pytest.raises(RouterMismatchError, match="follow 'sigmoid'"):
            verify(dataclasses.replace(found[1], family=wrong))


def _lora(model, **settings):
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        # peft 0.21 reads a property that transformers 5.23 has renamed.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated")
        return get_peft_model(model, LoraConfig(r=2, lora_alpha=4, **settings))
