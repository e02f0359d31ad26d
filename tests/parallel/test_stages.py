"""Stages of stock models: one after the other they are the model, or the model is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.hf_models import MODELS, make_batch, tiny_model
from trimtab.integrations.discovery import discover
from trimtab.integrations.stages import divide_layers, run_stage, split_into_stages

NUM_LAYERS = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 1},
    "gpt_oss": {"sliding_window": 5},
    "llama4": {"attention_chunk_size": 6, "interleave_moe_layer_step": 2, "no_rope_layers": [1, 0] * 2},
    "ernie4_5_moe": {"tie_word_embeddings": False},
    "lfm2_moe": {"tie_word_embeddings": False},
    "cohere2_moe": {"tie_word_embeddings": False, "logit_scale": 1.0},
}
# Hidden states in several streams, which layers share.
REFUSED = {"deepseek_v4": "it changes hidden states before layer 0"}


def model_of(family: str, **settings: Any) -> Any:
    settings = {"experts_implementation": "eager", **SETTINGS.get(family, {}), **settings}
    model: Any = tiny_model(family, num_layers=NUM_LAYERS, **settings)[0]
    model.set_experts_implementation("eager")
    return model


def stages_of(model: nn.Module, num_stages: int) -> list[Any]:
    return [
        split_into_stages(copy.deepcopy(model), num_stages=num_stages, stage=stage)
        for stage in range(num_stages)
    ]


@pytest.mark.filterwarnings("ignore:.*is falling back to its reference PyTorch implementation")
@pytest.mark.parametrize("family", sorted(set(MODELS) - set(REFUSED)))
def test_stages_in_a_row_are_the_model(family: str) -> None:
    model = model_of(family).eval()
    batch = make_batch(2, 12)
    positions_BS = torch.arange(12).expand(2, 12)
    whole = run_stage(model, batch["input_ids"], position_ids=positions_BS)
    before = {name: p.clone() for name, p in model.named_parameters()}
    x: Tensor = batch["input_ids"]
    found: dict[str, Tensor] = {}
    for stage in stages_of(model, 3):
        assert all(not module.training for module in stage.modules())
        x = run_stage(stage, x, position_ids=positions_BS)
        for name, parameter in stage.named_parameters():
            assert name not in found
            found[name] = parameter
    torch.testing.assert_close(x, whole, rtol=0, atol=0)
    assert found.keys() == before.keys()
    assert all(torch.equal(found[name], before[name]) for name in before)


def test_routers_keep_their_names() -> None:
    model = model_of("deepseek_v3")
    names = [router.name for router in discover(model)]
    stages = stages_of(model, 4)
    with pytest.raises(ValueError, match="router"):
        discover(stages[0])  # a dense layer alone
    assert [router.name for stage in stages[1:] for router in discover(stage)] == names


def test_inner_stages_have_no_view_as_output() -> None:
    """Schedules detach it in place."""
    stages = stages_of(model_of("qwen3_moe"), 2)
    assert not run_stage(stages[0], make_batch()["input_ids"])._is_view()


def test_attributes_that_loops_read_stay() -> None:
    model = model_of("mixtral")
    model.model.layers[3].attention_type = "sliding_attention"
    model.model.layers[3].self_attn.is_sliding = True
    layer = split_into_stages(model, num_stages=2, stage=0).get_submodule("model.layers.3")
    assert layer.attention_type == "sliding_attention"
    assert layer.self_attn.is_sliding is True
    assert not list(layer.parameters())


def test_examination_leaves_no_trace() -> None:
    model = model_of("deepseek_v3")
    model.model.norm.eval()
    modules = dict(model.named_modules())
    modes = {name: module.training for name, module in modules.items()}
    state = torch.get_rng_state()
    split_into_stages(model, num_stages=1, stage=0)
    assert dict(model.named_modules()) == modules
    assert {name: module.training for name, module in modules.items()} == modes
    assert not any(module._forward_hooks for module in modules.values())
    assert torch.equal(torch.get_rng_state(), state)


# -------------------------------------------------------------------- refused


@pytest.mark.parametrize(("family", "message"), REFUSED.items())
def test_families_that_cannot_be_divided(family: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot be divided into pipeline stages: .*{message}"):
        split_into_stages(model_of(family), num_stages=2, stage=0)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("granitemoe", {"embedding_multiplier": 12}, "it changes hidden states before layer 0"),
        ("granitemoe", {"logits_scaling": 8}, "it changes hidden states between its last layer and its head"),
    ],
)
def test_models_that_do_more_than_layers(family: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(
        ValueError, match=rf"ForCausalLM cannot be divided into pipeline stages: .*{message}.*pp=1"
    ):
        split_into_stages(model_of(family, **settings), num_stages=2, stage=1)


class OwnLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return x + self.linear(x)


class OwnModel(nn.Module):
    """A model that calls its layers as ``run`` says."""

    def __init__(self, run: Any) -> None:
        super().__init__()
        self.config = type("Config", (), {"num_hidden_layers": 2})()
        self.embed, self.head = nn.Embedding(10, 8), nn.Linear(8, 10)
        self.layers = nn.ModuleList(OwnLayer() for _ in range(2))
        self.run = run

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, use_cache: bool = False) -> Any:
        x = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return type("Output", (), {"logits": self.head(self.run(self.layers, x, input_ids))})()


def plainly(layers: Any, x: Tensor, ids: Any) -> Tensor:
    for layer in layers:
        x = layer(x, scale=2.0, mask={"full": None})
    return x


def with_a_dictionary(layers: Any, x: Tensor, ids: Any) -> Tensor:
    shared: dict[str, Any] = {}
    for layer in layers:
        x = layer(x, shared=shared)
    return x


def with_the_embedding(layers: Any, x: Tensor, ids: Any) -> Tensor:
    first = x
    for layer in layers:
        x = layer(x, first=first * 1)
    return x


def with_token_ids(layers: Any, x: Tensor, ids: Any) -> Tensor:
    for layer in layers:
        x = layer(x, input_ids=ids)
    return x


def backwards(layers: Any, x: Tensor, ids: Any) -> Tensor:
    return layers[0](layers[1](x))


def as_a_pair(layers: Any, x: Tensor, ids: Any) -> Tensor:
    for layer in layers:
        x, _ = layer(x)
    return x


def by_weight(layers: Any, x: Tensor, ids: Any) -> Tensor:
    return plainly(layers, x, ids) + layers[0].linear.weight.sum()


def test_own_models_are_divided_too() -> None:
    model = OwnModel(plainly)
    stages = stages_of(model, 2)
    ids = torch.arange(6).view(2, 3)
    torch.testing.assert_close(run_stage(stages[1], run_stage(stages[0], ids)), model(ids).logits)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (with_a_dictionary, "its layers share more than hidden states, in 'shared'"),
        (with_the_embedding, "its layers share more than hidden states, in 'first'"),
        (with_token_ids, "its layers read 'input_ids', which only the first stage would have"),
        (backwards, "its layers do not run once each, in order"),
        (as_a_pair, r"its forward fails without them \(ValueError: too many values to unpack"),
        (by_weight, r"its forward fails without them \(AttributeError: .*weight"),
    ],
)
def test_layers_that_share_more_are_refused(run: Any, message: str) -> None:
    with pytest.raises(ValueError, match=rf"OwnModel cannot be divided into pipeline stages: {message}"):
        split_into_stages(OwnModel(run), num_stages=2, stage=0)


def test_models_without_known_parts_are_refused() -> None:
    model = OwnModel(plainly)
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="it does not say where it has one list of its 3 decoder layers"):
        split_into_stages(model, num_stages=2, stage=0)
    with pytest.raises(ValueError, match="it does not say where it has"):
        split_into_stages(nn.Linear(2, 2), num_stages=2, stage=0)
    model = OwnModel(plainly)
    model.head = None
    with pytest.raises(ValueError, match="it does not say where it has an embedding and a head"):
        split_into_stages(model, num_stages=2, stage=0)


def test_meta_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match="MixtralForCausalLM has buffers on the meta device"):
        split_into_stages(model_of("mixtral").to("meta"), num_stages=2, stage=0)


@pytest.mark.parametrize(
    ("num_layers", "num_stages", "counts"),
    [
        (4, 2, [2, 2]),
        (4, 4, [1, 1, 1, 1]),
        (5, 2, [3, 2]),
        (8, 4, [1, 3, 3, 1]),
        (10, 4, [2, 3, 3, 2]),
        (7, 1, [7]),
        (61, 8, [7, 8, 8, 8, 8, 8, 8, 6]),
    ],
)
def test_layers_are_divided_evenly(num_layers: int, num_stages: int, counts: list[int]) -> None:
    ranges = divide_layers(num_layers, num_stages)
    assert [len(one) for one in ranges] == counts
    assert [layer for one in ranges for layer in one] == list(range(num_layers))


def test_division_errors() -> None:
    with pytest.raises(ValueError, match=r"num_layers=2 cannot be divided into num_stages=3"):
        divide_layers(2, 3)
    with pytest.raises(ValueError, match=r"stage=2 must be in \[0, num_stages=2\)"):
        split_into_stages(OwnModel(plainly), num_stages=2, stage=2)
