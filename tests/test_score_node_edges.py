"""Gradients added at a router's scores, where something is out of the ordinary."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab
from tests.census import Census
from tests.test_exactness import RAGGED
from tests.test_score_node import SCORES, Sigmoids, StockRouter, injections, model_of, one_step
from tests.toy import ToyModel, assert_grads_equal, batch, reference_grads, task_loss
from trimtab import GlobalBatch, SequenceWise, ZLoss
from trimtab.microbatch import Microbatch
from trimtab.objective import Objective
from trimtab.score_node import ScoreGradient, add_targets, find_score_node
from trimtab.scores import compute_dtype, log_scores

__all__ = ["injections"]  # a fixture

BALANCE: list[Objective.Config] = [SequenceWise.Config(coef=0.3)]
LOSSES: list[Objective.Config] = [
    *BALANCE,
    GlobalBatch.Config(coef=0.4, counts="exact"),
    ZLoss.Config(coef=0.05),
]
BOTH = pytest.mark.parametrize("router", [StockRouter, Sigmoids])


def reference(
    model: ToyModel, router: type, configs: Sequence[Objective.Config] = LOSSES
) -> dict[str, Tensor]:
    score = SCORES.get(router, "softmax")
    return reference_grads(model, [config.build() for config in configs], RAGGED[:1], score)


# ---------------------------------------------------------------- values


def added_at_sigmoids(
    monkeypatch: pytest.MonkeyPatch, logits_TE: Tensor, targets: tuple[Tensor, Tensor], valid_T: Tensor | None
) -> Tensor:
    """(T, E) gradient of logits whose targets and z-loss's weight are these."""
    logits_TE = logits_TE.clone().requires_grad_()
    top = logits_TE.to(compute_dtype(logits_TE.dtype)).sigmoid().topk(2, dim=-1)
    found = find_score_node(top.values, logits_TE, "sigmoid")
    assert found is not None
    microbatch = Microbatch(True, torch.tensor([len(logits_TE)]), len(logits_TE), 1, valid_mask_T=valid_T)
    settings: dict[str, Any] = dict(needs_prob_sums=False, in_place=found[1], logits_dtype=logits_TE.dtype)
    gradient = ScoreGradient("router", torch.zeros(2), "sigmoid", microbatch, 0, torch.zeros(1), **settings)
    gradient.keep_for_z(found[0], logits_TE, top.indices, (None, None, None))
    gradient.attach(found[0])
    monkeypatch.setattr("trimtab.ops.bind", lambda *args: targets)
    top.values.backward(torch.zeros_like(top.values))
    assert logits_TE.grad is not None
    return logits_TE.grad


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("offset", [-1e4, -200.0, -95.0, -80.0, -76.0, -60.0, -37.0, 0.0, 12.0, 40.0, 1e4])
def test_rows_far_from_zero(monkeypatch: pytest.MonkeyPatch, offset: float, masked: bool) -> None:
    """In float32 against autograd in float64; where sigmoids have vanished there is no balance gradient left."""
    logits_TE = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)) + offset
    target_1E = torch.randn(1, 7, generator=torch.Generator().manual_seed(1))
    valid_T = torch.arange(6) % 4 != 1 if masked else None
    z_weight = torch.tensor(0.01)
    wide_TE = logits_TE.double().requires_grad_()
    p_TE = log_scores(wide_TE, "sigmoid").softmax(dim=-1)
    factor_T = torch.ones(6, dtype=torch.float64) if valid_T is None else valid_T.double()
    lse_T = wide_TE.logsumexp(dim=-1)
    balance = (p_TE * target_1E).sum(dim=-1) if offset > -70 else 0.0
    ((balance + 0.01 * lse_T**2) * factor_T).sum().backward()
    want_TE = wide_TE.grad
    have_TE = added_at_sigmoids(monkeypatch, logits_TE, (target_1E, z_weight), valid_T)
    limit_TE = p_TE.detach() * target_1E.abs().max() + want_TE.abs()
    assert ((have_TE - want_TE).abs() <= 1e-6 * limit_TE.amax(dim=-1, keepdim=True)).all()


def test_a_logit_that_is_not_a_number_stays_in_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TE = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    targets = torch.linspace(-1, 1, 7)[None], torch.tensor(0.1)
    want_TE = added_at_sigmoids(monkeypatch, logits_TE, targets, None)
    logits_TE[1, 3], logits_TE[2, 4] = torch.nan, -torch.inf
    have_TE = added_at_sigmoids(monkeypatch, logits_TE, targets, None)
    assert have_TE[1].isnan().all()
    assert have_TE[2].isfinite().all()
    assert have_TE[2, 4] == 0
    assert torch.equal(have_TE[[0, 3, 4]], want_TE[[0, 3, 4]])


@pytest.mark.parametrize("router", [StockRouter, Sigmoids])
def test_second_derivatives_of_the_task_may_be_asked_for(router: type[StockRouter]) -> None:
    """The losses' own are refused, and the first ones are exact."""
    model = model_of(router)
    want = reference(model, router)
    balancer = trimtab.attach(model, LOSSES)
    parameters = dict(model.named_parameters())
    found = torch.autograd.grad(task_loss(model, RAGGED[0]), list(parameters.values()), create_graph=True)
    assert any(grad.requires_grad for grad in found)
    with pytest.raises(RuntimeError, match="second derivatives"):
        sum(grad.square().sum() for grad in found).backward()
    balancer.step()
    assert_grads_equal(dict(zip(parameters, (grad.detach() for grad in found), strict=True)), want)


@BOTH
@pytest.mark.parametrize("groups", [0, 1, 3])
def test_no_tokens(router: type[StockRouter], groups: int) -> None:
    sigmoid = router is Sigmoids
    for ids_T in (None, torch.zeros(0, dtype=torch.int64)):
        for valid_T in (None, torch.zeros(0, dtype=torch.bool)):
            if groups == 0 and (ids_T is not None or valid_T is not None):
                continue
            grad_TE = torch.zeros(0, 5)
            add_targets(
                grad_TE, torch.ones(groups, 5), ids_T, valid_T, torch.zeros(0, 5) if sigmoid else None
            )


class Transposing(StockRouter):
    """What reaches its scores is dense and lies in another order."""

    def shaped(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.view(1, *logits_TE.shape).softmax(dim=-1)

    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        scores_1TE = self.shaped(logits_TE)
        ids_TK = scores_1TE[0].detach().topk(self.top_k, dim=-1).indices
        turned_ET1 = scores_1TE.permute(2, 1, 0).contiguous()
        return turned_ET1[:, :, 0].t().gather(1, ids_TK), ids_TK


class TransposingSigmoids(Transposing):
    def shaped(self, logits_TE: Tensor) -> Tensor:
        return logits_TE.view(1, *logits_TE.shape).sigmoid()


@pytest.mark.parametrize("configs", [BALANCE, LOSSES, LOSSES[-1:]], ids=["balance", "all", "z"])
@pytest.mark.parametrize("router", [Transposing, TransposingSigmoids])
def test_a_gradient_in_another_order(
    injections: list[int], router: type[StockRouter], configs: list[Objective.Config]
) -> None:
    SCORES[TransposingSigmoids] = "sigmoid"
    model = model_of(router)
    want = reference(model, router, configs)
    assert_grads_equal(one_step(model, configs, RAGGED[:1], "alternating"), want)
    assert not injections


class Summing(StockRouter):
    """The gradient of its probabilities is one tensor with that of something else that is given out."""

    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        probs_TE = logits_TE.softmax(dim=-1)
        other_TE = torch.zeros_like(probs_TE).requires_grad_()
        self.other_TE = other_TE
        weights_TK, ids_TK = (probs_TE + other_TE).topk(self.top_k, dim=-1)
        return weights_TK, ids_TK


def test_what_somebody_else_holds_is_not_written_to(injections: list[int]) -> None:
    found = []
    for configs in ([], BALANCE):
        model = model_of(Summing, num_layers=1)
        balancer = trimtab.attach(model, configs)
        task_loss(model, RAGGED[0]).backward()
        balancer.step()
        found.append(model.blocks[0].moe.router.other_TE.grad)
    assert torch.equal(*found)
    assert not injections


class Halved(StockRouter):
    """Its scores have fewer digits than its logits."""

    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        weights_TK, ids_TK = logits_TE.float().softmax(dim=-1).topk(self.top_k, dim=-1)
        return weights_TK.to(logits_TE.dtype), ids_TK


class Partial(StockRouter):
    """Half of the experts have a softmax of their own."""

    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        halves = logits_TE.split(logits_TE.shape[1] // 2, dim=1)
        return torch.cat([half.softmax(dim=-1) for half in halves], dim=1).topk(self.top_k, dim=-1)


class AcrossTokens(StockRouter):
    def formed(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        return logits_TE.softmax(dim=0).topk(self.top_k, dim=-1)


@pytest.mark.parametrize("router", [Halved, Partial, AcrossTokens])
def test_scores_that_are_not_those_of_the_losses_are_not_taken(router: type[StockRouter]) -> None:
    logits_TE = torch.randn(6, 6, dtype=torch.float64, requires_grad=True) * 1.0
    weights_TK, _ = router.formed(model_of(StockRouter).blocks[0].moe.router, logits_TE)
    assert find_score_node(weights_TK, logits_TE, "softmax") is None


def test_the_second_output_of_a_node_is_not_its_first() -> None:
    both = torch.randn(6, 12, dtype=torch.float64, requires_grad=True) * 1.0
    one_TE, other_TE = both.split(6, dim=1)
    weights_TK = one_TE.softmax(dim=-1).topk(2, dim=-1).values
    assert find_score_node(weights_TK, one_TE, "softmax") is not None
    assert find_score_node(weights_TK, other_TE, "softmax") is None


def test_sixteen_bit_logits_with_float32_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    wide_TE = torch.randn(6, 7, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = torch.linspace(-1, 1, 7)[None], torch.tensor(0.1)
    want_TE = added_at_sigmoids(monkeypatch, wide_TE.float(), targets, None)
    have_TE = added_at_sigmoids(monkeypatch, wide_TE, targets, None)
    assert have_TE.dtype == torch.bfloat16
    torch.testing.assert_close(have_TE.float(), want_TE, rtol=2**-7, atol=1e-4)
    narrow_TE = wide_TE.requires_grad_()
    assert find_score_node(narrow_TE.sigmoid().topk(2).values, narrow_TE, "sigmoid") is None


# ---------------------------------------------------------------- what is kept


def test_a_z_loss_at_sigmoids_has_the_gate_compute_again(injections: list[int]) -> None:
    """With the gate's bias; no logits are kept."""
    model = model_of(Sigmoids, linear_bias=True)
    for block in model.blocks:
        nn.init.normal_(block.moe.router.bias)
    want = reference(model, Sigmoids)
    assert_grads_equal(one_step(model, LOSSES, RAGGED[:1], "alternating"), want)
    assert not injections


@BOTH
def test_nothing_is_kept_after_backward(router: type[StockRouter]) -> None:
    """Though the loss, and its graph, live on."""
    found = []
    for configs in ([], LOSSES):
        model = model_of(router)
        balancer = trimtab.attach(model, configs, measure_every=0)
        with Census() as census:
            loss = task_loss(model, batch(4, 64, seed=0))
            loss.backward()
            balancer.step()
            found.append(census.num_bytes)
        assert loss.grad_fn is not None
    # Two inputs of gates are 2 * 256 * 8 * 8 bytes.
    assert found[1] - found[0] <= 4000


@BOTH
def test_logits_are_not_kept_for_a_z_loss(router: type[StockRouter]) -> None:
    found = []
    for configs in ([], LOSSES):
        model = model_of(router, num_experts=32)
        balancer = trimtab.attach(model, configs, measure_every=0)
        with Census() as census:
            loss = task_loss(model, batch(4, 64, seed=0))
            found.append(census.num_bytes)
        loss.backward()
        balancer.step()
    # The logits of two layers are 2 * 256 * 32 * 8 bytes.
    assert found[1] - found[0] <= 30_000


@pytest.mark.parametrize("kept", ["input", "logits"])
def test_what_is_computed_with_again_must_not_change(kept: str) -> None:
    model = model_of(Sigmoids, num_layers=1)
    router = model.blocks[0].moe.router
    if kept == "logits":
        router.weight.requires_grad_(False)  # a frozen gate does not hold its input
    balancer = trimtab.attach(model, LOSSES)
    seen: list[Tensor] = []
    router.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    loss = task_loss(model, RAGGED[0])
    with torch.no_grad():
        (seen[0] if kept == "logits" else router.weight).mul_(2)
    with pytest.raises(RuntimeError, match=r"changed in place|modified by an inplace"):
        loss.backward()
    balancer.discard_step()


# ---------------------------------------------------------------- where it says that it cannot


class Forgetful(torch.autograd.Function):
    """Experts that give their weights no gradient."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
        return x_TD * weights_TK.sum(dim=-1, keepdim=True)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD, None


class ForgetfulMoE(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router

    def forward(self, x_BSD: Tensor) -> Tensor:
        weights_TK = self.router(x_BSD)[1]
        return Forgetful.apply(x_BSD.flatten(0, 1), weights_TK).view(x_BSD.shape)


@BOTH
def test_weights_without_a_gradient_are_named(router: type[StockRouter]) -> None:
    model = model_of(router)
    model.blocks[0].moe = ForgetfulMoE(model.blocks[0].moe.router)
    balancer = trimtab.attach(model, BALANCE)
    with pytest.raises(RuntimeError, match=r"blocks\.0\.moe\.router.*keep='logits'"):
        task_loss(model, RAGGED[0]).backward()
    balancer.remove()
    balancer = trimtab.attach(model, BALANCE, keep="logits")
    task_loss(model, RAGGED[0]).backward()
    assert model.blocks[0].moe.router.weight.grad.abs().sum() > 0
    balancer.step()
