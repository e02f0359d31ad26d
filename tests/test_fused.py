"""Fused routing: equal to the definition and to the composable path, for every option."""

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab import route_ops
from trimtab.counts import count_ids
from trimtab.fused import Routed, route
from trimtab.gradient import logit_gradient
from trimtab.reference import naive_probs
from trimtab.routing import Routing, choose, weigh
from trimtab.scores import SCORE_NAMES

# Dynamo looks at .grad of every graph input, and a layer's input is not a leaf.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def routing(**options: Any) -> Routing:
    return Routing(**({"top_k": 2, "score": "softmax", "normalize_top_k": True} | options))


class Case:
    """Everything `route` can be given, drawn at random."""

    def __init__(
        self,
        settings: Routing,
        tokens: int,
        experts: int,
        *,
        groups: str = "one",
        masked: bool = False,
        biased: bool = False,
        replayed: bool = False,
        dtype: torch.dtype = torch.float64,
        seed: int = 0,
    ) -> None:
        draw = torch.Generator().manual_seed(seed)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        self.routing, self.tokens = settings, tokens
        self.num_groups = {"one": 1, "sequences": max(tokens // 3, 1), "documents": 4}[groups]
        self.logits_TE = (3 * torch.randn(tokens, experts, generator=draw, dtype=wide)).to(dtype)
        self.grad_TK = torch.randn(tokens, settings.top_k, generator=draw, dtype=wide)
        self.target_GE = torch.rand(self.num_groups, experts, generator=draw, dtype=wide)
        self.z_weight = torch.rand((), generator=draw, dtype=wide)
        self.group_ids_T = self.bias_E = self.replay_ids_TK = self.valid_T = None
        if groups == "documents":
            self.group_ids_T = torch.randint(4, (tokens,), generator=draw)
        if masked:
            self.valid_T = torch.rand(tokens, generator=draw) > 0.3
        if biased:
            self.bias_E = torch.randn(experts, generator=draw)
        if replayed:
            self.replay_ids_TK = torch.rand(tokens, experts, generator=draw).topk(settings.top_k).indices

    @property
    def groups_T(self) -> Tensor:
        if self.group_ids_T is not None:
            return self.group_ids_T
        return torch.arange(self.num_groups).repeat_interleave(self.tokens // self.num_groups)

    def run(self, logits_TE: Tensor, *, balanced: bool = True, with_sums: bool = False) -> Routed:
        return route(
            logits_TE,
            self.routing,
            expert_bias_E=self.bias_E,
            replay_ids_TK=self.replay_ids_TK,
            valid_mask_T=self.valid_T,
            group_ids_T=self.group_ids_T,
            num_groups=self.num_groups,
            target_GE=self.target_GE if balanced else None,
            z_weight=self.z_weight if balanced else None,
            with_sums=with_sums,
        )

    def grad(self, *, balanced: bool = True) -> tuple[Routed, Tensor]:
        logits_TE = self.logits_TE.clone().requires_grad_()
        routed = self.run(logits_TE, balanced=balanced)
        routed.weights_TK.backward(self.grad_TK)
        assert logits_TE.grad is not None
        return routed, logits_TE.grad

    def composable(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, ids and gradient from differentiable routing and the composable path's gradient added."""
        logits_TE = self.logits_TE.clone().requires_grad_()
        ids_TK = self.replay_ids_TK
        if ids_TK is None:
            ids_TK = choose(logits_TE.detach(), self.routing, self.bias_E)
        wide_TE = logits_TE.to(self.grad_TK.dtype)
        weights_TK = weigh(wide_TE, ids_TK, self.routing)
        (grad_TE,) = torch.autograd.grad(weights_TK, wide_TE, self.grad_TK)
        grad_TE = grad_TE + logit_gradient(
            wide_TE.detach(),
            self.routing.score,
            self.target_GE,
            self.z_weight,
            self.group_ids_T,
            self.valid_T,
        )
        return weights_TK.detach(), ids_TK, grad_TE.to(self.logits_TE.dtype)

    def naive_grad(self) -> Tensor:
        """The gradient by autograd from the definitions."""
        logits_TE = self.logits_TE.clone().requires_grad_()
        ids_TK = self.composable()[1]
        p_TE = naive_probs(logits_TE, self.routing.score)
        chosen_TK = {
            "softmax": logits_TE.exp(),
            "sigmoid": logits_TE.sigmoid(),
            "sqrt_softplus": torch.nn.functional.softplus(logits_TE, threshold=100).sqrt(),
        }[self.routing.score].gather(1, ids_TK)
        if self.routing.normalizes:
            weights_TK = chosen_TK / chosen_TK.sum(dim=1, keepdim=True)
        elif self.routing.score == "softmax":
            weights_TK = p_TE.gather(1, ids_TK)
        else:
            weights_TK = chosen_TK
        valid_T = torch.ones(self.tokens, dtype=torch.bool) if self.valid_T is None else self.valid_T
        loss = (self.routing.scale * weights_TK * self.grad_TK).sum()
        loss = loss + (p_TE * self.target_GE[self.groups_T])[valid_T].sum()
        loss = loss + self.z_weight * (logits_TE.logsumexp(dim=1) ** 2)[valid_T].sum()
        (grad_TE,) = torch.autograd.grad(loss, logits_TE)
        return grad_TE


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype | None = None) -> Case:
    """Any shape and option."""
    num_expert_groups = draw(st.sampled_from([1, 1, 2, 3, 5]))
    experts = num_expert_groups * draw(st.integers(2, 9))
    top_k_groups = draw(st.integers(1, num_expert_groups))
    top_k = draw(st.integers(1, min(experts // num_expert_groups * top_k_groups, 9)))
    score = draw(st.sampled_from(SCORE_NAMES))
    groups = draw(st.sampled_from(["one", "sequences", "documents"]))
    tokens = draw(st.integers(0, 5)) * 3 if groups == "sequences" else draw(st.integers(0, 14))
    return Case(
        routing(
            top_k=top_k,
            score=score,
            normalize_top_k=draw(st.booleans()),
            scale=draw(st.sampled_from([1.0, 2.5])),
            score_after_top_k=score == "softmax" and draw(st.booleans()),
            num_expert_groups=num_expert_groups,
            top_k_groups=top_k_groups,
            group_score=draw(st.sampled_from(["max", "top2_sum"])),
        ),
        tokens,
        experts,
        groups=groups,
        masked=draw(st.booleans()),
        biased=draw(st.booleans()),
        replayed=draw(st.booleans()),
        dtype=dtype or draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 10**6)),
    )


# ---------------------------------------------------------------- equality


@settings(max_examples=250, deadline=None)
@given(cases())
def test_equal_to_the_composable_path_to_the_last_ulps(case: Case) -> None:
    routed, grad_TE = case.grad()
    weights_TK, ids_TK, want_TE = case.composable()
    assert torch.equal(routed.ids_TK, ids_TK)
    assert torch.equal(routed.weights_TK.detach(), weights_TK)
    counts_GE = count_ids(ids_TK, case.logits_TE.shape[1], case.group_ids_T, case.valid_T, case.num_groups)
    assert torch.equal(routed.counts_GE, counts_GE)
    valid = case.tokens if case.valid_T is None else int(case.valid_T.sum())
    assert int(routed.counts_GE.sum()) == valid * case.routing.top_k
    assert grad_TE.dtype == case.logits_TE.dtype
    if grad_TE.numel():
        ulps = 8 * torch.finfo(case.grad_TK.dtype).eps
        # Both sum the same terms in the wide dtype, then round once: at most to neighbouring numbers.
        ulps = max(ulps, torch.finfo(grad_TE.dtype).eps if grad_TE.dtype != case.grad_TK.dtype else 0.0)
        error = (grad_TE.double() - want_TE.double()).abs().max().item()
        assert error <= ulps * max(want_TE.double().abs().max().item(), case.grad_TK.abs().max().item())


@settings(max_examples=150, deadline=None)
@given(cases(dtype=torch.float64))
def test_equal_to_autograd_of_the_definitions(case: Case) -> None:
    _, grad_TE = case.grad()
    torch.testing.assert_close(grad_TE, case.naive_grad(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_gradcheck(score: str, normalize: bool) -> None:
    """Of the weights alone: balance gradients are no derivatives of what `route` returns."""
    case = Case(routing(score=score, normalize_top_k=normalize, scale=1.5), 5, 7)
    logits_TE = case.logits_TE.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: case.run(z, balanced=False).weights_TK, (logits_TE,))


def test_values_by_hand() -> None:
    """p = (1, 2, 3, 4) / 10; group 0 is the first token, whose target sum is 0.4; the second is padding."""
    logits_TE = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2).log().requires_grad_()
    routed = route(
        logits_TE,
        routing(normalize_top_k=False),
        num_groups=2,
        valid_mask_T=torch.tensor([True, False]),
        target_GE=torch.tensor([[0.0, 0.0, 0.0, 1.0], [5.0, 6.0, 7.0, 8.0]]),
        z_weight=torch.tensor(0.5),
    )
    assert routed.ids_TK.tolist() == [[3, 2]] * 2
    torch.testing.assert_close(routed.weights_TK, torch.tensor([[0.4, 0.3]] * 2))
    assert routed.counts_GE.tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]
    routed.weights_TK.backward(torch.zeros(2, 2))
    z = math.log(10)  # 2 * 0.5 * lse
    want = [
        0.1 * (0 - 0.4) + 0.1 * z,
        0.2 * (0 - 0.4) + 0.2 * z,
        0.3 * (0 - 0.4) + 0.3 * z,
        0.4 * 0.6 + 0.4 * z,
    ]
    torch.testing.assert_close(logits_TE.grad, torch.tensor([want, [0.0] * 4]))


def test_sums_for_logging() -> None:
    case = Case(routing(score="sigmoid"), 12, 5, groups="sequences", masked=True)
    sums = case.run(case.logits_TE, with_sums=True).sums
    assert sums is not None
    p_TE = naive_probs(case.logits_TE, "sigmoid")
    want_GE = torch.zeros(4, 5, dtype=torch.float64).index_add_(
        0, case.groups_T, p_TE * case.valid_T[:, None]
    )
    torch.testing.assert_close(sums.prob_sums_GE, want_GE)
    torch.testing.assert_close(sums.lse_T, case.logits_TE.logsumexp(dim=1))
    torch.testing.assert_close(sums.entropy_T, -(p_TE * p_TE.log()).sum(dim=1))
    assert case.run(case.logits_TE).sums is None


def test_targets_may_be_filled_after_forward() -> None:
    case = Case(routing(), 6, 5)
    _, want_TE = case.grad()
    target_GE = torch.zeros_like(case.target_GE)
    logits_TE = case.logits_TE.clone().requires_grad_()
    routed = route(logits_TE, case.routing, target_GE=target_GE, z_weight=case.z_weight)
    target_GE.copy_(case.target_GE)
    routed.weights_TK.backward(case.grad_TK)
    assert torch.equal(logits_TE.grad, want_TE)


def test_one_target_serves_all_groups() -> None:
    case = Case(routing(), 12, 5, groups="sequences")
    case.target_GE = case.target_GE[:1]
    _, one_TE = case.grad()
    case.target_GE = case.target_GE.repeat(4, 1)
    assert torch.equal(one_TE, case.grad()[1])


# ---------------------------------------------------------------- edges


@pytest.mark.parametrize("score", SCORE_NAMES)
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
def test_what_is_not_finite_stays_in_its_row(value: float, normalize: bool, score: str) -> None:
    case = Case(routing(top_k=3, score=score, normalize_top_k=normalize), 4, 6, dtype=torch.float32)
    clean, clean_TE = case.grad()
    case.logits_TE[1, 2] = value
    routed, grad_TE = case.grad()
    assert ((routed.ids_TK >= 0) & (routed.ids_TK < 6)).all()
    assert all(len(set(row)) == 3 for row in routed.ids_TK.tolist())
    assert (2 in routed.ids_TK[1]) == (value != -math.inf)
    others = torch.tensor([0, 2, 3])
    assert torch.equal(grad_TE[others], clean_TE[others])
    assert torch.equal(routed.weights_TK[others], clean.weights_TK[others])
    assert int(routed.counts_GE.sum()) == 12
    if math.isnan(value):
        assert grad_TE[1].isnan().all()
    if value == -math.inf and 2 not in clean.ids_TK[1]:
        assert grad_TE[1].isfinite().all()


def test_padding_that_is_not_finite_leaves_counts_and_gradients_alone() -> None:
    case = Case(routing(), 4, 6, dtype=torch.float32)
    case.valid_T = torch.tensor([True, True, False, True])
    want, want_TE = case.grad()
    case.logits_TE[2] = math.nan
    case.grad_TK[2] = 0
    have, have_TE = case.grad()
    assert torch.equal(have.counts_GE, want.counts_GE)
    assert torch.equal(have_TE[case.valid_T], want_TE[case.valid_T])


def test_ties_go_to_the_lowest_ids() -> None:
    logits_TE = torch.randint(0, 3, (64, 12)).float()
    want_TK = logits_TE.sort(dim=1, descending=True, stable=True).indices[:, :4]
    assert torch.equal(route(logits_TE, routing(top_k=4)).ids_TK, want_TK)
    assert torch.equal(route(logits_TE.double(), routing(top_k=4)).ids_TK, want_TK)
    assert torch.equal(route(logits_TE[3:4], routing(top_k=4)).ids_TK, want_TK[3:4])


@pytest.mark.parametrize("top_k", [1, 6])
def test_one_expert_and_all_experts(top_k: int) -> None:
    case = Case(routing(top_k=top_k, normalize_top_k=False), 5, 6)
    torch.testing.assert_close(case.grad()[1], case.naive_grad(), rtol=1e-10, atol=1e-12)


def test_the_largest_logit_may_be_in_a_group_that_is_dropped() -> None:
    options = {"num_expert_groups": 2, "top_k_groups": 1, "group_score": "top2_sum"}
    case = Case(routing(score="sigmoid", **options), 2, 4)
    case.logits_TE[:] = torch.tensor([1000.0, -1000.0, 5.0, 5.5])
    routed, grad_TE = case.grad()
    assert routed.ids_TK.tolist() == [[3, 2]] * 2
    torch.testing.assert_close(grad_TE, case.naive_grad(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("experts", [300, 40_000])
def test_many_experts(experts: int) -> None:
    """Ids are kept for backward in as few bits as hold them."""
    case = Case(routing(top_k=9), 6, experts)
    assert int(case.grad()[0].ids_TK.max()) > {300: 127, 40_000: 2**15}[experts]
    torch.testing.assert_close(case.grad()[1], case.naive_grad(), rtol=1e-10, atol=1e-12)


def test_nothing_to_route() -> None:
    routed, grad_TE = Case(routing(), 0, 6).grad()
    assert routed.counts_GE.tolist() == [[0] * 6]
    assert grad_TE.shape == (0, 6)


def test_double_backward_is_refused() -> None:
    case = Case(routing(), 4, 6)
    logits_TE = case.logits_TE.clone().requires_grad_()
    grad_TK = case.grad_TK.clone().requires_grad_()
    (grad_TE,) = torch.autograd.grad(case.run(logits_TE).weights_TK, logits_TE, grad_TK, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad_TE.sum().backward()


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("top_k=9 must be in [1, num_experts=6]", {"routing": routing(top_k=9)}),
        ("num_expert_groups=4 must divide num_experts=6", {"routing": routing(num_expert_groups=4)}),
        ("expected floating (T, E)", {"logits_TE": torch.zeros(2, 2, 6)}),
        ("num_groups=3 must divide the T=4 tokens", {"num_groups": 3}),
        ("expert_bias_E has shape (5,), expected (6,)", {"expert_bias_E": torch.zeros(5)}),
        ("replay_ids_TK has shape (4, 3), expected (4, 2)", {"replay_ids_TK": torch.zeros(4, 3).long()}),
        ("replay_ids_TK is torch.float32, expected torch.int64", {"replay_ids_TK": torch.zeros(4, 2)}),
        ("valid_mask_T is torch.int64, expected torch.bool", {"valid_mask_T": torch.ones(4).long()}),
        ("group_ids_T has shape (3,), expected (4,)", {"group_ids_T": torch.zeros(3).long()}),
        ("target_GE has shape (3, 6), expected (2, 6)", {"num_groups": 2, "target_GE": torch.zeros(3, 6)}),
    ],
)
def test_errors(message: str, change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"logits_TE": torch.zeros(4, 6), "routing": routing()} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        route(**given)


# ---------------------------------------------------------------- the operators


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_operators_are_what_torch_expects(score: str) -> None:
    case = Case(routing(score=score), 6, 5, groups="sequences", masked=True, biased=True, dtype=torch.float32)
    options = route_ops._options(case.routing)
    for with_sums in (False, True):
        given = (case.logits_TE, case.bias_E, None, case.valid_T, None, case.num_groups, with_sums, *options)
        torch.library.opcheck(torch.ops.trimtab.route_forward.default, given)
    for replay in (case.composable()[1], case.composable()[1].int()):
        given = (case.logits_TE, None, replay, None, None, 1, False, *options)
        torch.library.opcheck(torch.ops.trimtab.route_forward.default, given)
    ids_TK = case.composable()[1]
    for targets in ((case.target_GE, case.z_weight), (None, None)):
        given = (case.grad_TK, case.logits_TE, ids_TK, *targets, None, case.valid_T, *options)
        torch.library.opcheck(torch.ops.trimtab.route_backward.default, given)


def test_operators_return_what_the_torch_functions_return() -> None:
    case = Case(routing(), 6, 5, groups="documents", masked=True)
    given = (case.logits_TE, None, None, case.valid_T, case.group_ids_T, case.num_groups, True)
    have = torch.ops.trimtab.route_forward(*given, *route_ops._options(case.routing))
    for one, other in zip(have, route_ops.plain_forward(*given, case.routing), strict=True):
        assert torch.equal(one, other)


def test_compiled() -> None:
    torch._dynamo.reset()
    options = {"score": "sigmoid", "num_expert_groups": 2, "top_k_groups": 1}
    case = Case(routing(**options), 12, 6, groups="sequences", masked=True, biased=True)
    routed, want_TE = case.grad()
    logits_TE = case.logits_TE.clone().requires_grad_()
    have = torch.compile(case.run, fullgraph=True, backend="aot_eager")(logits_TE)
    assert torch.equal(have.ids_TK, routed.ids_TK)
    assert torch.equal(have.counts_GE, routed.counts_GE)
    have.weights_TK.backward(case.grad_TK)
    torch.testing.assert_close(have.weights_TK, routed.weights_TK, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logits_TE.grad, want_TE, rtol=1e-12, atol=1e-12)
    torch._dynamo.reset()


class Operators(TorchDispatchMode):
    """Names of all operators but views and allocations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if not func.is_view and not name.endswith(("empty", "empty_like")):
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def test_traced_for_cuda_without_one() -> None:
    """On CUDA each direction is one operator, of which a tracer knows all shapes and dtypes."""
    with FakeTensorMode(), Operators() as counted:
        logits_TE = torch.empty(12, 6, device="cuda", dtype=torch.bfloat16)
        valid_T = torch.empty(12, device="cuda", dtype=torch.bool)
        routed = route(logits_TE, routing(), num_groups=4, valid_mask_T=valid_T, with_sums=True)
        target_GE = torch.empty(4, 6, device="cuda")
        grad_TE = route_ops.backward(
            routed.weights_TK, logits_TE, routed.ids_TK, target_GE, None, None, valid_T, routing()
        )
    assert (routed.weights_TK.shape, routed.weights_TK.dtype) == ((12, 2), torch.float32)
    assert (routed.ids_TK.shape, routed.ids_TK.dtype) == ((12, 2), torch.int64)
    assert routed.counts_GE.shape == (4, 6)
    assert routed.sums is not None
    assert [tensor.shape for tensor in routed.sums] == [(4, 6), (12,), (12,)]
    assert (grad_TE.shape, grad_TE.dtype) == ((12, 6), torch.bfloat16)
    assert counted.names == ["route_forward", "route_backward"]
