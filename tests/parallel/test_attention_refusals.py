"""Attention that cannot be divided over tp and cp is refused, by name, and left as it was."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.parallel.pool import Ranks, mesh_of
from tests.parallel.test_attention import ONLY_CP, PLANS, S, make_batch, make_model
from trimtab.integrations.attention import attention_masks, parallelize_attention
from trimtab.parallel.mesh import Degrees
from trimtab.parallel.tokens import TokenShard


def refuse(model: nn.Module, message: str, **degrees: int) -> None:
    """The model is refused with this message, and nothing of it has changed."""
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    implementation = model.config._attn_implementation
    mesh: Any = SimpleNamespace(degrees=Degrees(**degrees))
    with pytest.raises(ValueError, match=message):
        parallelize_attention(model, mesh)
    assert model.config._attn_implementation == implementation
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("qwen3_moe", {}, r"num_key_value_heads=2 of \w+ must be a multiple of tensor_parallel_degree=4"),
        ("deepseek_v3", {"num_attention_heads": 2}, r"num_attention_heads=2 of .*tensor_parallel_degree=4"),
    ],
)
def test_heads_must_divide(name: str, settings: dict[str, Any], message: str) -> None:
    overrides = {"num_attention_heads": 4, "num_key_value_heads": 2, **settings}
    refuse(make_model(name, **overrides), message, tp=4)


@pytest.mark.parametrize("name", ONLY_CP)
def test_norms_over_all_heads_are_refused_under_tp(name: str) -> None:
    refuse(make_model(name), r"q_norm normalises 32 features, not the 8 of one head.*context_parallel", tp=2)


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"cp": 2}])
@pytest.mark.parametrize("name", ["qwen3_next", "qwen3_5_moe"])
def test_other_mixing_of_tokens_is_refused(name: str, degrees: dict[str, int]) -> None:
    refuse(make_model(name), "layers of type 'linear_attention'", **degrees)


@pytest.mark.parametrize("degrees", [{"tp": 2}, {"cp": 2}])
def test_unknown_parts_of_attention_are_refused(degrees: dict[str, int]) -> None:
    model = make_model("mixtral")
    model.model.layers[1].self_attn.indexer = nn.Linear(32, 8)
    refuse(model, r"MixtralAttention has \['indexer'\].*LAYOUTS.*add a row", **degrees)


def test_what_is_no_plain_linear_is_refused_under_tp() -> None:
    class Adapted(nn.Linear):
        pass

    model = make_model("mixtral")
    model.model.layers[0].self_attn.k_proj.__class__ = Adapted
    refuse(model, "has a Adapted where tensor parallelism divides an nn.Linear", tp=2)


def test_projections_with_other_shapes_are_refused_under_tp() -> None:
    model = make_model("mixtral")
    for layer in model.model.layers:
        layer.self_attn.q_proj = nn.Linear(32, 128, bias=False)
    refuse(model, r"q_proj has 128 features, expected 8 heads of 8:", tp=2)


def test_rotary_angles_of_the_longest_position_are_refused_under_cp() -> None:
    model = make_model("mixtral", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    refuse(model, "rope_type='dynamic' depends on the longest position", cp=2)


def test_attention_without_masks_from_outside_is_refused() -> None:
    model = make_model("qwen3_moe")
    model.config._attn_implementation = "flex_attention"
    refuse(model, "'flex_attention' must be 'eager' or 'sdpa'", cp=2)


def test_masks_of_an_undivided_model_are_refused() -> None:
    _, positions_BS = make_batch(packed=False)
    with pytest.raises(ValueError, match="is not divided over ranks, but this rank has 8 of 16 tokens"):
        attention_masks(make_model("qwen3_moe"), positions_BS, TokenShard.make(S, tp=2))


def run_without_masks() -> None:
    model = make_model("qwen3_moe")
    parallelize_attention(model, mesh_of(PLANS["tp2"]))
    ids_BS, positions_BS = make_batch(packed=False)
    with pytest.raises(ValueError, match="needs its masks from outside"):
        model(input_ids=ids_BS, position_ids=positions_BS)


def test_a_divided_model_is_not_called_without_masks(ranks: Ranks) -> None:
    ranks.run(run_without_masks, 2)
