"""trimtab's router with a balancer: one fused node, to the gradients, counts and metrics of the hooked path."""

import contextlib
import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import trimtab
from tests.toy import ToyModel, assert_grads_equal, batch, grads, task_loss, toy_model
from trimtab import Accumulation, GlobalBatch, ImportanceCV, SequenceWise, Sign, ZLoss, route_ops
from trimtab.counts import ExecutedCounts
from trimtab.losses import Objective
from trimtab.router import Router

OBJECTIVES: list[Objective.Config] = [
    SequenceWise.Config(coef=0.3, unit="document", assignments="unbiased"),
    GlobalBatch.Config(coef=0.4, counts="exact"),
    ImportanceCV.Config(coef=0.1),
    ZLoss.Config(coef=0.1),
]
BATCHES = [
    batch(3, 5, seed=1, padded=True, packed="position_ids"),
    batch(2, 7, seed=2, packed="position_ids"),
]
ROUTERS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax over all": {"normalize_top_k": False, "scale": 2.5},
    "softmax after top-k": {"score_after_top_k": True, "linear_bias": True, "expert_bias": True},
    "sigmoid in groups": {
        "score": "sigmoid",
        "expert_bias": True,
        "scale": 2.5,
        "num_groups": 3,
        "top_k_groups": 2,
        "group_score": "top2_sum",
    },
    "sigmoid alone": {"score": "sigmoid", "normalize_top_k": False},
    "sqrt-softplus": {"score": "sqrt_softplus", "expert_bias": True},
    "forced balance": {"forced_balance": True},
    "one expert": {"top_k": 1, "normalize_top_k": False},
    "all experts": {"top_k": 6},
}


def step(model: ToyModel, **settings: Any) -> tuple[dict[str, Tensor], list[Tensor], dict[str, Any]]:
    """Gradients, counts and metrics of one step of two microbatches in flight."""
    order = Accumulation(num_microbatches=2, order="forward_first")
    balancer = trimtab.attach(model, OBJECTIVES, accumulation=order, measure_every=1, **settings)
    for loss in [task_loss(model, one) for one in BATCHES]:
        loss.backward()
    counts = [row.counts_AE for row in balancer.ledger.settle()]
    balancer.step()
    metrics = balancer.metrics()
    balancer.remove()
    return grads(model), counts, metrics


def fused_nodes(model: ToyModel) -> list[str]:
    """Names of the nodes that each router's weights come from, in a forward of the model."""
    names = []
    handles = [
        block.moe.router.register_forward_hook(lambda m, a, out: names.append(out[1].grad_fn.name()))
        for block in model.blocks
    ]
    task_loss(model, BATCHES[0])
    for handle in handles:
        handle.remove()
    return names


@pytest.mark.parametrize("keep", ["input", "logits"])
@pytest.mark.parametrize("name", ROUTERS)
def test_as_the_hooked_path(name: str, keep: str) -> None:
    model = toy_model(**ROUTERS[name])
    for block in model.blocks:
        if block.moe.router.bias is not None:
            torch.nn.init.normal_(block.moe.router.bias)
    want = step(model, keep=keep, fused=False)
    have = step(model, keep=keep)
    assert_grads_equal(have[0], want[0], rtol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(have[1], want[1], strict=True))
    assert have[2] == want[2]


@pytest.mark.parametrize("checkpoint", ["nonreentrant", "reentrant", "selective"])
def test_recomputed(checkpoint: str) -> None:
    settings = ROUTERS["sigmoid in groups"]
    want = step(toy_model(**settings))
    have = step(toy_model(checkpoint=checkpoint, **settings))
    assert_grads_equal(have[0], want[0], rtol=1e-13)
    assert all(torch.equal(a, b) for a, b in zip(have[1], want[1], strict=True))


def test_where_it_runs() -> None:
    """Where something is injected, by the router itself; a subclass that routes by itself keeps the hook."""
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES)
    assert fused_nodes(model) == ["FusedRoutingBackward"] * 2
    assert not any(block.moe.router._forward_hooks for block in model.blocks)
    balancer.remove()
    assert "FusedRoutingBackward" not in fused_nodes(model)
    balancer = trimtab.attach(model, OBJECTIVES, fused=False)
    assert fused_nodes(model) == ["InjectionBackward"] * 2
    balancer.remove()

    class Own(Router):
        def forward(self, x: Tensor, *, replay_ids_TK: Tensor | None = None) -> Any:
            return super().forward(x)

    model.blocks[0].moe.router.__class__ = Own
    trimtab.attach(model, OBJECTIVES)
    assert fused_nodes(model) == ["InjectionBackward", "FusedRoutingBackward"]


def test_without_objectives_nothing_of_the_logits_size_is_held() -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    balancer = trimtab.attach(model, [], bias=Sign.Config())
    assert "FusedRoutingBackward" not in fused_nodes(model)
    assert int(balancer.ledger.settle()[0].counts_AE.sum()) == 2 * BATCHES[0].num_tokens


@pytest.mark.parametrize("mode", ["eval", "no_grad", "frozen"])
def test_what_is_not_trained_is_not_fused(mode: str) -> None:
    """A frozen router has no logits to give a gradient to, but its tokens count."""
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES)
    if mode == "eval":
        model.eval()
    if mode == "frozen":
        for parameter in (*model.embed.parameters(), model.blocks[0].moe.router.weight):
            parameter.requires_grad_(False)
        model.blocks[0].norm.requires_grad_(False)
    with torch.set_grad_enabled(mode != "no_grad"):
        model(**BATCHES[0].call)
    assert balancer.ledger.rows[0].num_forwards == (1 if mode == "frozen" else 0)


@pytest.mark.parametrize(
    "mode",
    [
        "fused",
        "no balancer",
        "eval",
        "no_grad",
        "bias only",
        "frozen",
        "concatenated",
        "counting",
        "reentrant",
    ],
)
def test_every_forward_has_one_chooser(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where kernels run, ties and last bits may fall otherwise than with torch: no forward may ask another."""
    forward, calls = route_ops.forward, []

    def worst(logits_TE: Tensor, bias_E: Any, replay_TK: Any, *rest: Any, **named: Any) -> Any:
        """The chooser of a device on which the smallest logits are taken for the largest."""
        calls.append(len(logits_TE))
        ids_TK = (-logits_TE).topk(2).indices
        return forward(logits_TE, None, ids_TK, *rest, **named)

    model = toy_model(checkpoint="reentrant" if mode == "reentrant" else None, expert_bias=True)
    several = 2 if mode == "concatenated" else 1
    order = Accumulation(
        num_microbatches=several, order="counting_pass" if mode == "counting" else "forward_first"
    )
    balancer = None
    if mode != "no balancer":
        balancer = trimtab.attach(
            model,
            [] if mode == "bias only" else [GlobalBatch.Config(coef=0.1)],
            bias=Sign.Config(),
            accumulation=order,
        )
    monkeypatch.setattr(route_ops, "forward", worst)
    if mode == "eval":
        model.eval()
    if mode == "frozen":
        model.requires_grad_(False)
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.moe.router.register_forward_hook(lambda m, a, out: seen.append((out[0], out[2])))
    described: Any = contextlib.nullcontext()
    if mode == "concatenated":
        assert balancer is not None
        described = balancer.concatenated([balancer.microbatch(batch_shape=(1, 7)) for _ in range(2)])
    if mode == "counting":
        assert balancer is not None
        described = balancer.counting_pass()
    with torch.set_grad_enabled(mode not in ("no_grad", "counting")), described:
        logits = model(BATCHES[1].input_ids)
    if mode == "reentrant":
        logits.sum().backward()
    assert len(seen) == (4 if mode == "reentrant" else 2)
    assert len(calls) >= len(seen)
    for logits_TE, ids_TK in seen:
        assert torch.equal(ids_TK, (-logits_TE.detach()).topk(2).indices)


@pytest.mark.parametrize("objectives", [OBJECTIVES, []], ids=["losses", "none"])
def test_concatenated_microbatches_are_fused(
    objectives: list[Objective.Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each its own node, to the numbers of the hooked path."""
    monkeypatch.setattr(ExecutedCounts, "__call__", None if objectives else ExecutedCounts.__call__)
    results = []
    for fused in (True, False):
        if not fused:
            monkeypatch.undo()
        model = toy_model(score="sigmoid", expert_bias=True)
        order = Accumulation(num_microbatches=2, order="forward_first")
        balancer = trimtab.attach(model, objectives, bias=Sign.Config(), accumulation=order, fused=fused)
        parts = [
            balancer.microbatch(batch_shape=(1, 7)),
            balancer.microbatch(valid_mask=torch.arange(7)[None] < 4),
        ]
        with balancer.concatenated(parts):
            model(BATCHES[1].input_ids).square().sum().backward()
        results.append((grads(model), [row.counts_AE for row in balancer.ledger.settle()]))
    assert_grads_equal(results[0][0], results[1][0], rtol=1e-13)
    for have, want in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(have, want)


def test_dealt_experts_are_what_is_counted() -> None:
    model = toy_model(forced_balance=True)
    balancer = trimtab.attach(model, OBJECTIVES[1:])
    task_loss(model, BATCHES[1]).backward()
    counts_E = balancer.ledger.settle()[0].counts_AE[0]
    assert counts_E.max() - counts_E.min() <= 1


def test_counts_are_not_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> Tensor:
        raise AssertionError("counted a second time")

    model = toy_model()
    balancer = trimtab.attach(model, [ZLoss.Config(coef=0.1)])
    monkeypatch.setattr(ExecutedCounts, "__call__", never)
    task_loss(model, BATCHES[0]).backward()
    assert int(balancer.ledger.settle()[0].counts_AE.sum()) == 2 * BATCHES[0].num_tokens


def test_replayed_ids_are_weighed_counted_and_balanced() -> None:
    def run(fused: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        moe = trimtab.MoE(toy_model().blocks[0].moe.config).double()
        with torch.no_grad():
            draw = torch.Generator().manual_seed(1)
            for parameter in moe.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=draw, dtype=torch.float64))
        x_BSD = torch.randn(2, 4, 8, generator=draw, dtype=torch.float64, requires_grad=True)
        ids_TK = torch.rand(8, 6, generator=draw).topk(2).indices
        balancer = trimtab.attach(moe, OBJECTIVES[1:], fused=fused)
        moe(x_BSD, replay_ids_TK=ids_TK).sum().backward()
        counts_E = balancer.ledger.settle()[0].counts_AE[0]
        assert torch.equal(counts_E, ids_TK.flatten().bincount(minlength=6))
        return counts_E, moe.router.weight.grad, x_BSD.grad, moe.experts.gate_up_proj.grad

    for have, want in zip(run(True), run(False), strict=True):
        torch.testing.assert_close(have, want, rtol=1e-12, atol=1e-13)


class OneRouter(torch.nn.Module):
    def __init__(self, router: Router) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.router(x_BSD)[1]


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("keep", ["input", "logits"])
def test_what_is_held_for_backward(keep: str, score: str) -> None:
    """keep="input" holds narrow ids alone; keep="logits" the logits too. More is of groups, not of tokens."""

    def held_by(keep: str | None) -> int:
        """Bytes that a forward of a router and a sum of its weights hold, without what the gate holds anyway."""
        router = Router.Config(dim=8, num_experts=64, top_k=8, score=score, normalize_top_k=True).build()
        moe = OneRouter(router)
        if keep is not None:
            losses = [config for config in OBJECTIVES[1:] if not isinstance(config, ImportanceCV.Config)]
            trimtab.attach(moe, losses, keep=keep)
        x_BSD = torch.randn(4, 128, 8, requires_grad=True)
        held: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            held[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            moe(x_BSD).sum().backward()
        for anyway in (x_BSD, router.weight):
            held.pop(anyway.untyped_storage().data_ptr(), None)
        return sum(held.values())

    logits = 512 * 64 * 4
    assert held_by(keep) <= {"input": 0.1, "logits": 1.1}[keep] * logits
    assert held_by(keep) > {"input": 0.05, "logits": 1.05}[keep] * logits


def test_under_autocast() -> None:
    results = []
    for fused in (True, False):
        model = toy_model(dtype=torch.float32).float()
        trimtab.attach(model, OBJECTIVES[1:], fused=fused)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = task_loss(model, BATCHES[1])
        loss.backward()
        results.append(grads(model))
    assert_grads_equal(*results, rtol=1e-6)


def test_a_copy_counts_in_its_own_ledger() -> None:
    model = toy_model()
    balancer = trimtab.attach(model, OBJECTIVES[1:])
    other = copy.deepcopy(model)
    task_loss(other, BATCHES[0]).backward()
    assert balancer.ledger.rows[0].num_forwards == 0
    assert trimtab.balancer_of(other).ledger.rows[0].num_forwards == 1


def test_double_backward_is_refused() -> None:
    model = toy_model()
    trimtab.attach(model, OBJECTIVES[1:])
    weight = model.blocks[0].moe.router.weight
    (grad,) = torch.autograd.grad(task_loss(model, BATCHES[1]), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
