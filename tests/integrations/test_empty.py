"""Models without values: buffers and initial weights are those that transformers would give them."""

import pytest
import torch
from torch import nn

from tests.hf_models import REQUIRED, tiny_config
from trimtab.integrations.empty import allocate, draw, make_buffers, to_device
from trimtab.train.initial_weights import draw_weights

CPU = torch.device("cpu")


def empty_model(family, **overrides):
    model_class, config = tiny_config(family, **overrides)
    with torch.device("meta"):
        model = model_class(config)
    make_buffers(model)
    return model


def drawn_model(family, seed=0, **overrides):
    model = empty_model(family, **overrides)
    allocate(model, CPU)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    draw_weights([model], seed=seed)
    return model


@pytest.mark.parametrize("family", sorted(REQUIRED))
def test_buffers_are_those_of_a_model_built_with_values(family):
    model_class, config = tiny_config(family)
    stock = dict(model_class(config).named_buffers())
    model = empty_model(family)
    assert all(parameter.is_meta for parameter in model.parameters())
    found = dict(model.named_buffers())
    assert found.keys() == stock.keys()
    for name, buffer in found.items():
        assert torch.equal(buffer, stock[name]), name


@pytest.mark.parametrize("family", sorted(REQUIRED))
def test_every_parameter_has_the_initial_distribution_of_the_stock_model(family):
    model_class, config = tiny_config(family)
    torch.manual_seed(0)
    stock = dict(model_class(config).named_parameters())
    model = drawn_model(family)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        # Constants are the same; what is drawn has the same spread, up to that of a small sample.
        if stock[name].unique().numel() == 1:
            assert torch.equal(parameter, stock[name]), name
        else:
            ratio = float((parameter.std() / stock[name].std()).detach())
            assert parameter.numel() < 8 or abs(ratio - 1) < 6 / parameter.numel() ** 0.5, (name, ratio)


def test_values_depend_on_seed_and_name_alone():
    first, again, other = (drawn_model("qwen3_moe", seed=seed) for seed in (0, 0, 1))
    deeper = drawn_model("qwen3_moe", num_layers=3)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, deeper.get_parameter(name)), name
        assert "norm" in name or not torch.equal(parameter, other.get_parameter(name)), name
    weights = [p for n, p in first.named_parameters() if n.endswith("q_proj.weight")]
    assert not torch.equal(*weights)
    experts = first.model.layers[0].mlp.experts.down_proj
    assert len({expert.sum().item() for expert in experts}) == len(experts)


def test_the_global_random_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    drawn_model("mixtral")
    assert torch.equal(torch.get_rng_state(), before)


def test_experts_are_drawn_one_at_a_time_and_only_those_wanted():
    model = empty_model("deepseek_v3")
    experts = model.model.layers[0].mlp.experts
    shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
    found = list(
        draw(model, "x", experts, None, shapes, seed=0, wants_expert=lambda expert: expert in (1, 5))
    )
    assert [drawn.expert for drawn in found] == [1, 5]
    assert all(value.shape[0] == 1 for drawn in found for value in drawn.values.values())


def test_tied_parameters_stay_one():
    model = drawn_model("qwen3_moe", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.lm_head.weight.isfinite().all()


def test_what_has_values_keeps_them():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    kept = module[0].weight.detach().clone()
    to_device(module, CPU)
    assert module[1].weight.is_meta
    allocate(module, CPU)
    assert torch.equal(module[0].weight, kept)
    assert not module[1].weight.is_meta


class _Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.ones(3))


def test_what_transformers_does_not_initialise_is_named():
    model = empty_model("mixtral")
    with torch.device("meta"):
        model.model.strange = _Strange()
    with pytest.raises(
        ValueError, match=r"_Strange at 'model.strange' does not initialise its buffer 'table'"
    ):
        make_buffers(model)
    model.model.strange.table = torch.ones(3)
    allocate(model, CPU)
    with pytest.raises(
        ValueError, match=r"does not say how to initialise 'scale' of _Strange at 'model.strange'"
    ):
        draw_weights([model], seed=0)


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "qwen3_5_moe", "gpt_oss"])
def test_what_is_not_wanted_is_neither_changed_nor_missed(family):
    whole, model = drawn_model(family), empty_model(family)
    allocate(model, CPU)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
    draw_weights(
        [model], seed=0, wanted=lambda name: name.endswith(("down_proj", "gate.weight", "router.weight"))
    )
    named = dict(whole.named_parameters())
    for name, parameter in model.named_parameters():
        if name.endswith(("down_proj", "gate.weight", "router.weight")):
            assert torch.equal(parameter, named[name]), name
        else:
            assert (parameter == 7).all(), name
    assert all((buffer == 7).all() for buffer in model.buffers())
