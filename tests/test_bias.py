"""Bias rules: literal updates, schedules, the quantile rule's exactness, and their life in a balancer."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trimtab
from tests.toy import batch, task_loss, toy_model
from trimtab.bias import BiasRule, BiasState, CentredSign, Momentum, Proportional, Quantile, Sign, Statistic
from trimtab.scores import scores

COUNTS = torch.tensor([6, 2, 2, 2])  # mean 3


def change(rule: BiasRule.Config, counts_E: Tensor = COUNTS, state: BiasState | None = None) -> list[float]:
    built = rule.build()
    bias_E = torch.zeros(len(counts_E))
    out = built.update(bias_E, counts_E, built.speed(0), state or BiasState(), None, 1)
    assert out.dtype == torch.float32
    return out.tolist()


def test_sign() -> None:
    assert change(Sign.Config(speed=0.5)) == [-0.5, 0.5, 0.5, 0.5]


def test_centred_sign() -> None:
    assert change(CentredSign.Config(speed=0.5)) == [-0.75, 0.25, 0.25, 0.25]


def test_proportional() -> None:
    assert change(Proportional.Config(speed=0.3)) == pytest.approx([-0.3, 0.1, 0.1, 0.1])


def test_momentum() -> None:
    state = BiasState()
    rule = Momentum.Config(speed=1.0, kappa=2.0, beta=0.5)
    raw = [math.tanh(-2), math.tanh(2 / 3), math.tanh(2 / 3), math.tanh(2 / 3)]
    step = [value - sum(raw) / 4 for value in raw]
    assert change(rule, state=state) == pytest.approx([0.5 * s for s in step])
    assert change(rule, state=state) == pytest.approx([0.75 * s for s in step])


@pytest.mark.parametrize(
    "rule", [Sign.Config(), CentredSign.Config(), Proportional.Config(), Momentum.Config()]
)
def test_balance_and_silence_move_nothing(rule: BiasRule.Config) -> None:
    assert change(rule, torch.tensor([3, 3, 3])) == [0, 0, 0]
    assert change(rule, torch.tensor([0, 0, 0])) == [0, 0, 0]


def test_sign_is_decided_in_integers() -> None:
    """A mean of a third rounds in float32; counts beyond 2**24 do too."""
    huge = 2**40
    assert change(Sign.Config(speed=1.0), torch.tensor([huge, huge + 1, huge - 1])) == [0, -1, 1]


def test_schedule() -> None:
    rule = Sign.Config(speed=1e-3, schedule=((0, 1.0), (100, 1.0), (200, 0.0))).build()
    assert [rule.speed(step) for step in (0, 100, 150, 200, 10_000)] == pytest.approx(
        [1e-3, 1e-3, 5e-4, 0, 0]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sign.Config(speed=0), r"speed=0 must be positive; leave the rule out"),
        (lambda: Sign.Config(schedule=()), r"schedule=\(\) must hold points of increasing step"),
        (lambda: Sign.Config(schedule=((5, 1.0), (5, 0.0))), r"must hold points of increasing step"),
        (lambda: Sign.Config(schedule=((0, -1.0),)), r"must not have negative factors"),
        (lambda: Momentum.Config(beta=1.0), r"beta=1.0 must be in \[0, 1\)"),
        (lambda: Momentum.Config(kappa=0.0), r"kappa=0.0 must be positive"),
        (lambda: Quantile.Config(speed=2.0), r"speed=2.0 must be in \(0, 1\]"),
        (lambda: Quantile.Config(num_bins=1), r"num_bins=1 must be at least 2"),
    ],
)
def test_configuration_errors(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- quantile


def gather(
    logits: Tensor, bias: Tensor, top_k: int, parts: int = 1, valid: Tensor | None = None, bins: int = 1000
) -> Statistic:
    statistic = Statistic(bins)
    masks = [None] * parts if valid is None else valid.chunk(parts)
    for chunk, mask in zip(logits.chunk(parts), masks, strict=True):
        statistic.add(chunk, "sigmoid", top_k, bias, mask)
    return statistic


@given(
    num_tokens=st.integers(1, 300),
    num_experts=st.integers(3, 9),
    top_k=st.integers(1, 2),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_quantile_is_exact_to_a_bin(num_tokens: int, num_experts: int, top_k: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, num_experts, generator=generator, dtype=torch.float64)
    bias = 0.3 * torch.randn(num_experts, generator=generator, dtype=torch.float64)
    s = scores(logits, "sigmoid")
    margin = s - (s + bias).topk(top_k + 1, dim=1).values[:, -1:]
    # the smallest margin at or below which a share 1 - K/E of the tokens lies
    place = max(math.ceil(num_tokens * (num_experts - top_k) / num_experts), 1) - 1
    want = margin.sort(dim=0).values[place]
    have = gather(logits, bias, top_k).quantile(top_k)
    width = 2 * (1 + bias.abs().max().item()) / 1000
    assert (have - want).abs().max().item() <= width * (1 + 1e-9)


def test_quantile_does_not_depend_on_the_split_or_on_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, bias = torch.randn(101, 6, generator=generator), torch.randn(6, generator=generator) * 0.1
    whole = gather(logits, bias, 2).quantile(2)
    assert torch.equal(gather(logits, bias, 2, parts=7).quantile(2), whole)
    padded = torch.cat([logits, torch.randn(40, 6, generator=generator)])
    valid = torch.arange(141) < 101
    assert torch.equal(gather(padded, bias, 2, parts=3, valid=valid).quantile(2), whole)


def test_quantile_balances_in_a_few_updates() -> None:
    """A router that prefers some experts strongly is balanced on the same tokens after few steps."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4096, 8, generator=generator) + torch.linspace(-2, 2, 8)
    s, bias, rule = scores(logits, "sigmoid"), torch.zeros(8), Quantile.Config().build()

    def counts() -> Tensor:
        return (s + bias).topk(2, dim=1).indices.flatten().bincount(minlength=8)

    before = counts()
    for _ in range(12):
        bias = bias + rule.update(bias, counts(), 1.0, BiasState(), gather(logits, bias, 2), 2)
    assert before.max() / before.float().mean() > 2
    assert counts().max() / counts().float().mean() < 1.05
    assert bias.mean().abs() < 1e-6


def test_quantile_without_tokens_moves_nothing() -> None:
    bias = torch.ones(4)
    moved = Quantile.Config().build().update(bias, torch.zeros(4), 1.0, BiasState(), Statistic(10), 1)
    assert moved.tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top_k": 6}, r"needs top_k=6 < num_experts=6"),
        ({"num_groups": 3, "top_k_groups": 2}, r"this router limits groups; use Sign"),
    ],
)
def test_quantile_refuses_what_it_cannot_do(settings: dict[str, int], message: str) -> None:
    model = toy_model(score="sigmoid", expert_bias=True, **settings)
    with pytest.raises(ValueError, match=message):
        trimtab.attach(model, [], bias=Quantile.Config())


# ---------------------------------------------------------------- in a balancer


def biases(model: Any) -> list[Tensor]:
    return [block.moe.router.expert_bias_E.clone() for block in model.blocks]


@pytest.mark.parametrize("rule", [Sign, CentredSign, Proportional, Momentum, Quantile])
def test_one_update_per_step_from_the_steps_counts(rule: type[BiasRule]) -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    balancer = trimtab.attach(model, [], bias=rule.Config(), accumulation=3)
    before = biases(model)
    for seed in range(3):
        task_loss(model, batch(2, 9, seed=seed, padded=True)).backward()
        assert all(torch.equal(a, b) for a, b in zip(biases(model), before, strict=True))
    statistics = [row.statistic for row in balancer.ledger.rows]
    counts = [row.counts_AE[0] for row in balancer.ledger.settle()]
    built = rule.Config().build()
    want = []
    for old, count, statistic in zip(before, counts, statistics, strict=True):
        copy = None
        if statistic is not None:
            copy = Statistic(statistic.num_bins)
            copy.histogram_EN, copy.reach = statistic.histogram_EN.clone(), statistic.reach
        step = built.update(old.float(), count, built.speed(0), BiasState(), copy, 2)
        want.append(old + step.to(old.dtype))
    balancer.step()
    assert all(torch.equal(a, b) for a, b in zip(biases(model), want, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(biases(model), before, strict=True))


def test_bias_updates_balance_a_layer() -> None:
    """On one MoE layer by itself, with inputs whose mean makes the router prefer some experts."""
    layer = toy_model(score="sigmoid", expert_bias=True).blocks[0].moe
    balancer = trimtab.attach(layer, [], bias=Sign.Config(speed=0.02, schedule=((0, 1.0), (60, 0.1))))
    generator = torch.Generator().manual_seed(0)
    maxvio = []
    for _ in range(80):
        layer(torch.randn(4, 256, 8, dtype=torch.float64, generator=generator) + 0.5)
        balancer.step()
        maxvio.append(balancer.metrics()["maxvio"][0])
    assert sum(maxvio[:4]) / 4 > 0.4
    assert sum(maxvio[-8:]) / 8 < 0.1


def test_freeze_and_layers() -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    balancer = trimtab.attach(model, [], bias=Sign.Config(layers=("blocks.1.*",)))
    before = biases(model)

    def step() -> None:
        model(batch(2, 9, seed=0).input_ids)
        balancer.step()

    balancer.freeze_bias()
    step()
    assert all(torch.equal(a, b) for a, b in zip(biases(model), before, strict=True))
    balancer.freeze_bias(False)
    step()
    assert torch.equal(biases(model)[0], before[0])
    assert not torch.equal(biases(model)[1], before[1])


def test_layers_that_match_nothing() -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    with pytest.raises(ValueError, match=r"no router matches layers=\('nope',\); the first is 'blocks\.0"):
        trimtab.attach(model, [], bias=Sign.Config(layers=("nope",)))


def test_a_router_without_bias() -> None:
    with pytest.raises(
        ValueError, match=r"Sign bias balancing needs an expert bias, but blocks\.0.* has none"
    ):
        trimtab.attach(toy_model(), [], bias=Sign.Config())


def test_a_low_precision_bias() -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    router = model.blocks[0].moe.router
    router.expert_bias_E = router.expert_bias_E.bfloat16()
    with pytest.raises(ValueError, match=r"is torch.bfloat16, in which updates of 0.001 are lost"):
        trimtab.attach(model, [], bias=Sign.Config())
