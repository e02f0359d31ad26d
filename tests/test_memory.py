"""What balancing holds, when it lets go of it, and that none of it grows where it must not.

Sizes are in units of one (T, E) float32 tensor of one layer. A census counts every storage that is alive between
two operators, whoever holds it; parameters and inputs were there before it.

T tokens, E experts, K top-k, L layers, M microbatches, G sequences.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.census import Census
from tests.hf_models import tiny_model
from tests.toy import VOCAB, ToyModel, toy_model
from trimtab import (
    Accumulation,
    Balancer,
    BatchWise,
    CommunicationLevel,
    GlobalBatch,
    ImportanceCV,
    SequenceWise,
    ZLoss,
)
from trimtab.scores import ScoreName

E, K, B, S = 64, 8, 4, 256
T = B * S
UNIT = T * E * 4
LOSSES = [
    SequenceWise.Config(coef=0.1),
    BatchWise.Config(coef=0.1, average_microbatches=True),
    GlobalBatch.Config(coef=0.1),
    ImportanceCV.Config(coef=0.1),
    CommunicationLevel.Config(coef=0.1, num_devices=4, max_devices_per_token=2),
    ZLoss.Config(coef=0.1),
]
# Where counts are to be told apart from what has a value for each token.
FEW: dict[str, Any] = {"num_experts": 16, "top_k": 4}
IDS = torch.randint(VOCAB, (B, S), generator=torch.Generator().manual_seed(0))
MASK = (torch.arange(S) < torch.tensor([S, S - 3, S, 5])[:, None]).long()
# What may be held of each layer beside what routing holds without losses.
BUDGET = {"input": 0.1, "logits": 1.1}
WAYS = [
    pytest.param(fused, keep, id=f"{'fused' if fused else 'hooks'}, {keep}")
    for fused in (True, False)
    for keep in ("input", "logits")
]


def model_of(num_layers: int, score: ScoreName = "softmax", **settings: Any) -> ToyModel:
    settings = {"num_experts": E, "top_k": K, "dtype": torch.float32, "score": score, **settings}
    return toy_model(num_layers=num_layers, **settings).float()


def attach(model: nn.Module, **settings: Any) -> Balancer:
    return trimtab.attach(model, LOSSES, **{"measure_every": 0, **settings})


def held(run: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """What a forward leaves for its backward."""
    with Census() as census:
        output = run(*args, **kwargs)
        # As a caller does, who has no use for logits, ids and hidden states.
        output = getattr(output, "loss", output)
        output = output.sum()
        return census.num_bytes / UNIT


def held_by_router(model: ToyModel) -> float:
    """What one router leaves, beside its input and its weights."""
    x_BSD = torch.randn(B, S, 8, requires_grad=True)
    return held(lambda: model.blocks[0].moe.router(x_BSD)[1])


def budget(fused: bool, keep: str) -> float:
    """What each layer of a model of trimtab's routers may hold beside routing.

    The fused router holds it in place of what routing holds; of hooks, routing holds the logits itself.
    """
    return BUDGET[keep] - held_by_router(model_of(1)) if fused else BUDGET["input"]


# -------------------------------------------------------------------- between forward and backward


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize(("fused", "keep"), WAYS)
def test_one_router(fused: bool, keep: Any, score: ScoreName) -> None:
    """The fused router holds its ids, and the logits if it is to keep them, and nothing else of size T."""
    model = model_of(1, score)
    alone = held_by_router(model)
    if score == "softmax":
        assert alone == pytest.approx(1 + (3 * K + 1) / E, abs=0.01)  # logits; ids, weights and their sums
    attach(model, fused=fused, keep=keep)
    balanced = held_by_router(model)
    assert balanced <= (BUDGET[keep] if fused else alone + BUDGET["input"])
    if fused:
        assert balanced == pytest.approx((keep == "logits") + K / (2 * E), abs=0.02)


@pytest.mark.parametrize(("fused", "keep"), WAYS)
def test_layers(fused: bool, keep: Any) -> None:
    """Of a whole model, with padding: beside routing itself there is no (T, E) tensor of any layer."""
    for num_layers in (1, 2, 4, 8):
        model = model_of(num_layers)
        routing = held(model, IDS, MASK)
        attach(model, fused=fused, keep=keep)
        beside = held(model, IDS, MASK) - routing
        assert beside <= budget(fused, keep) * num_layers


@pytest.mark.parametrize("keep", ["input", "logits"])
@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_stock_models(family: str, keep: Any) -> None:
    groups = {"n_group": 4, "topk_group": 2} if family == "deepseek_v3" else {}
    sizes = {name: E for name in ("num_experts", "n_routed_experts", "num_local_experts")}
    for num_layers in (2, 4):
        model, make_batch = tiny_model(
            family, num_layers=num_layers, num_experts_per_tok=K, **sizes, **groups
        )
        given = make_batch(16, 64)
        routing = held(model, **given, use_cache=False)
        attach(model, keep=keep)
        assert held(model, **given, use_cache=False) - routing <= BUDGET[keep] * num_layers


# -------------------------------------------------------------------- during backward


@contextmanager
def layers_labelled(model: ToyModel, census: Census, after: Callable[[int], None]) -> Iterator[None]:
    """Label what is made in forward by its layer, and call ``after(layer)`` when its backward is over."""

    def before_forward(layer: int, args: tuple[Tensor]) -> None:
        census.label = layer
        args[0].register_hook(lambda grad: after(layer))

    handles = []
    for layer, block in enumerate(model.blocks):
        handles += [
            block.register_forward_pre_hook(lambda _, args, layer=layer: before_forward(layer, args)),
            block.register_forward_hook(lambda *_: setattr(census, "label", "model")),
        ]
    yield
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize(("fused", "keep"), WAYS)
def test_each_layer_is_released_with_its_backward(fused: bool, keep: Any) -> None:
    """When a layer's backward is over, nothing of its logits, probabilities, ids, targets or masks is alive."""
    model = model_of(4)
    attach(model, fused=fused, keep=keep)
    census, seen = Census(), []

    def after(layer: int) -> None:
        seen.append(layer)
        mine = [piece for piece in census.alive if isinstance(piece.label, int) and piece.label >= layer]
        # A byte for each token is less than any of them.
        assert [(piece.operator, piece.shape) for piece in mine if piece.num_bytes >= T] == []
        # In backward itself, gradients on their way are as wide as the model, which is less than E.
        made = [piece for piece in census.alive if piece.label == "backward"]
        assert [(piece.operator, piece.shape) for piece in made if piece.num_bytes >= UNIT // 2] == []

    with census, layers_labelled(model, census, after):
        loss = model(IDS, MASK).sum()
        assert all(
            any(piece.label == layer and piece.num_bytes >= T for piece in census.alive) for layer in range(4)
        )
        census.label = "backward"
        loss.backward()
    assert seen == [3, 2, 1, 0]


def peak_of_backward(model: nn.Module) -> float:
    """Most bytes that are alive between two operators of a backward."""
    peak = [0]
    census = Census()
    with census:
        loss = model(IDS, MASK).sum()
        census.samples = lambda num_bytes: peak.append(max(peak.pop(), num_bytes))
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return peak[0] / UNIT


@pytest.mark.parametrize(("fused", "keep"), WAYS)
def test_peak_of_backward(fused: bool, keep: Any) -> None:
    """What losses add to it does not grow with layers beyond what they hold of each."""
    beside = []
    for num_layers in (1, 2, 4, 8):
        model = model_of(num_layers)
        routing = peak_of_backward(model)
        attach(model, fused=fused, keep=keep)
        beside.append(peak_of_backward(model) - routing)
    # One layer's backward forms (T, E) tensors: probabilities, gradients.
    assert beside[0] <= 4
    for num_layers, more in zip((2, 4, 8), beside[1:], strict=True):
        assert more - beside[0] <= budget(fused, keep) * (num_layers - 1)


# -------------------------------------------------------------------- over a step


def run_backwards(model: ToyModel, num_microbatches: int, order: str) -> None:
    if order == "alternating":
        for _ in range(num_microbatches):
            model(IDS, MASK).sum().backward()
    else:
        torch.stack([model(IDS, MASK).sum() for _ in range(num_microbatches)]).sum().backward()


@pytest.mark.parametrize("order", ["alternating", "forward_first"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "hooks"])
def test_a_step_of_many_microbatches(fused: bool, order: Any) -> None:
    """Of a microbatch whose backward is over, what it has read of the step is left: (A, E) of a layer, no more."""
    num_layers, num_maps = 2, 2
    sizes = {}
    for num_microbatches in (2, 32):
        model = model_of(num_layers, **FEW)
        plan = Accumulation(num_microbatches=num_microbatches, order=order)
        balancer = attach(model, fused=fused, accumulation=plan)
        run_backwards(model, num_microbatches, order)  # gradients are there, and a step to look back to
        balancer.step()
        with Census() as census:
            run_backwards(model, num_microbatches, order)
            # Which tokens the last forward had is known until the next one, or until the step ends.
            assert [words for words in census.at_least(T) if " of ne, " not in words] == []
            sizes[num_microbatches] = census.num_bytes
    per_microbatch = (sizes[32] - sizes[2]) / 30
    assert per_microbatch <= num_layers * num_maps * FEW["num_experts"] * 4 + 64
    assert sizes[2] <= T + 16 * num_layers * num_maps * FEW["num_experts"] * 8


@pytest.mark.parametrize("end", ["step", "discard_step", "evaluation"])
@pytest.mark.parametrize("measure_every", [0, 1])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "hooks"])
def test_nothing_is_left_of_a_step(fused: bool, measure_every: int, end: str) -> None:
    """No logits, ids or masks; counts of the step and its numbers alone."""
    model = model_of(2, score="sigmoid", expert_bias=True, **FEW)
    balancer = attach(
        model,
        fused=fused,
        accumulation=2,
        measure_every=measure_every,
        bias=trimtab.Quantile.Config(num_bins=8),
    )
    for _ in range(2):
        model(IDS, MASK).sum().backward()
    balancer.step()
    with Census() as census:
        if end == "evaluation":
            model.eval()(IDS, MASK)
        else:
            losses = [model(IDS, MASK).sum() for _ in range(2)]
            assert len(census.at_least(T)) > 4
            if end == "step":
                torch.stack(losses).sum().backward()
            del losses
            getattr(balancer, end)()
        assert census.at_least(T) == []


@pytest.mark.parametrize("num_steps", [2, 6])
def test_steps_do_not_pile_up(num_steps: int) -> None:
    model = model_of(2, score="sigmoid", expert_bias=True, **FEW)
    balancer = attach(model, measure_every=1, bias=trimtab.Momentum.Config())
    sizes = []
    with Census() as census:
        for _ in range(num_steps):
            model(IDS, MASK).sum().backward()
            balancer.step()
            balancer.metrics()
            sizes.append(census.num_bytes)
    assert len(set(sizes[1:])) == 1
