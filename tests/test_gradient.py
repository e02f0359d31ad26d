"""The closed form in blocks: the same numbers, one block of memory, exact where scores saturate."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from trimtab import blocks, route_ops
from trimtab.blocks import token_blocks, tokens_per_block
from trimtab.gradient import logit_gradient, sum_probs
from trimtab.reference import naive_probs
from trimtab.routing import Routing, choose, weigh
from trimtab.scores import SCORE_NAMES, log_scores
from trimtab.traced_gradient import traced_gradient

DRAW = torch.Generator()


def randn(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=DRAW.manual_seed(seed), dtype=dtype)


def everything(tokens: int, experts: int, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Targets of documents, z-loss and padding."""
    return {
        "target_GE": randn(3, experts, dtype=dtype, seed=1).abs(),
        "z_weight": torch.tensor(0.3, dtype=dtype),
        "group_ids_T": torch.arange(tokens) % 3,
        "valid_mask_T": torch.arange(tokens) % 5 != 2,
    }


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 512)


# ---------------------------------------------------------------- blocks


@pytest.mark.parametrize(
    ("tokens", "experts", "block"),
    [(0, 8, 1), (128, 8, 128), (8192, 64, 4096), (8192, 256, 2048), (8193, 256, 1664), (3, 2**20, 64)],
)
def test_sizes_of_blocks(tokens: int, experts: int, block: int) -> None:
    logits_TE = torch.empty(tokens, 1).expand(tokens, experts)
    assert tokens_per_block(logits_TE) == block
    assert tokens_per_block(torch.empty(tokens, experts, device="meta")) == max(tokens, 1)
    assert tokens_per_block(logits_TE, 2) <= max(block, 64)


@pytest.mark.parametrize("tokens", [0, 1, 6, 7])
def test_blocks_are_views_side_by_side(tokens: int) -> None:
    values_T = torch.arange(tokens)
    pieces = list(token_blocks(3, values_T, None, values_T[:, None]))
    assert torch.cat([piece for piece, _, _ in pieces] or [values_T]).tolist() == values_T.tolist()
    assert all(none is None and len(a) == len(b) for a, none, b in pieces)
    pieces[0][0].add_(1)
    assert values_T.tolist() == [t + (t < 3) for t in range(tokens)]


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("tokens", [128, 200])
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_blocks_change_no_number(score: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    logits_TE, bias_E = randn(tokens, 12, dtype=torch.float32), randn(12, dtype=torch.float32, seed=2)
    routing = Routing(top_k=3, score=score, normalize_top_k=False, num_expert_groups=3, top_k_groups=2)

    def run() -> list[Tensor]:
        ids_TK = choose(logits_TE, routing, bias_E)
        weights_TK = weigh(logits_TE, ids_TK, routing)
        given = everything(tokens, 12, torch.float32)
        found = [ids_TK, weights_TK, logit_gradient(logits_TE, score, **given)]
        if score == "softmax":
            found.append(logit_gradient(logits_TE, score, **given, chosen_TK=(ids_TK, weights_TK)))
        return [*found, logit_gradient(logits_TE, score, None, given["z_weight"], None, None)]

    assert tokens_per_block(logits_TE) < tokens
    have = run()
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 2**19)
    assert tokens_per_block(logits_TE) >= tokens
    for one, other in zip(have, run(), strict=True):
        assert torch.equal(one, other)


def peak_bytes(run: Any) -> int:
    """Most bytes that the CPU allocator gave out at a time, hidden temporaries of operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    assert isinstance(result, Tensor)  # held to the end
    return max(itertools.accumulate(nbytes for _, nbytes in changes))


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize(
    ("score", "normalize"),
    [("softmax", True), ("softmax", False), ("sigmoid", True), ("sqrt_softplus", True)],
)
def test_memory_of_a_backward(score: str, normalize: bool) -> None:
    """The gradient itself and one block, with every balance loss, z-loss and padding."""
    tokens, experts = 16384, 256
    routing = Routing(top_k=8, score=score, normalize_top_k=normalize)
    logits_TE, grad_TK = randn(tokens, experts, dtype=torch.float32), randn(tokens, 8, dtype=torch.float32)
    given = everything(tokens, experts, torch.float32)
    ids_TK = choose(logits_TE, routing, None).to(torch.int16)
    peak = peak_bytes(lambda: route_ops.plain_backward(grad_TK, logits_TE, ids_TK, **given, routing=routing))
    assert peak <= 1.3 * logits_TE.nbytes


@pytest.mark.filterwarnings("ignore:.*Profiler clears events:UserWarning")
@pytest.mark.parametrize("biased", [False, True])
def test_memory_of_a_forward(biased: bool) -> None:
    """Ranks are formed block by block too."""
    logits_TE = randn(8192, 256, dtype=torch.float32)
    bias_E = randn(256, dtype=torch.float32, seed=1) if biased else None
    routing = Routing(top_k=8, score="sigmoid", normalize_top_k=True)
    peak = peak_bytes(
        lambda: route_ops.plain_forward(logits_TE, bias_E, None, None, None, 1, False, routing)[0]
    )
    assert peak <= 0.7 * logits_TE.nbytes


# ---------------------------------------------------------------- numbers


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_largest_logits_need_not_be_looked_for(score: str) -> None:
    logits_TE = 5 * randn(20, 9)
    given = everything(20, 9)
    largest_T1 = logits_TE.argmax(dim=1, keepdim=True)
    want_TE = logit_gradient(logits_TE, score, **given)
    assert torch.equal(logit_gradient(logits_TE, score, **given, likely_ids_T1=largest_T1), want_TE)


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_any_expert_tells_the_log_sum_exp_but_one_that_has_vanished(score: str) -> None:
    logits_TE = 5 * randn(20, 9)
    logits_TE[3, 2], logits_TE[4, 2], logits_TE[5, 2] = -900.0, -torch.inf, torch.nan
    given = everything(20, 9)
    likely_T1 = torch.full((20, 1), 2)
    want_TE = logit_gradient(logits_TE, score, **given)
    have_TE = logit_gradient(logits_TE, score, **given, likely_ids_T1=likely_T1)
    assert want_TE[[3, 4]].isfinite().all()
    torch.testing.assert_close(have_TE, want_TE, rtol=1e-12, atol=1e-14, equal_nan=True)


def test_rows_of_vanishing_sigmoids_change_no_other_row() -> None:
    logits_TE = randn(8, 9).float()
    given = dict(target_GE=randn(1, 9, seed=1).float(), z_weight=None, group_ids_T=None, valid_mask_T=None)
    want_TE = logit_gradient(logits_TE, "sigmoid", **given)
    logits_TE[2] -= 300.0
    logits_TE[3, 1] = torch.nan
    have_TE = logit_gradient(logits_TE, "sigmoid", **given)
    others = [0, 1, 4, 5, 6, 7]
    assert torch.equal(have_TE[others], want_TE[others])
    assert have_TE[2].abs().max() > 1e-3
    assert have_TE[3].isnan().all()


@pytest.mark.parametrize("offset", [-1e4, -200.0, -37.0, 0.0, 12.0, 40.0, 1e4])
@pytest.mark.parametrize(
    ("gradient", "score"),
    [
        *((logit_gradient, score) for score in SCORE_NAMES),
        (traced_gradient, "softmax"),
        (traced_gradient, "sigmoid"),
    ],
)
def test_rows_far_from_zero(gradient: Callable[..., Tensor], score: str, offset: float) -> None:
    """In float32 against autograd in float64, off by some ulps of p times the largest target."""
    logits_TE = (randn(6, 7) + offset).float()
    target_GE, z_weight = randn(1, 7, seed=1), torch.tensor(0.01, dtype=torch.float64)
    wide_TE = logits_TE.double().requires_grad_()
    p_TE = log_scores(wide_TE, score).softmax(dim=-1)
    loss = (p_TE * target_GE).sum() + z_weight * (wide_TE.logsumexp(dim=-1) ** 2).sum()
    (want_TE,) = torch.autograd.grad(loss, wide_TE)
    have_TE = gradient(logits_TE, score, target_GE.float(), z_weight.float(), None, None)
    limit_TE = p_TE.detach() * target_GE.abs().max() + want_TE.abs()
    assert ((have_TE - want_TE).abs() <= 1e-6 * limit_TE.amax(dim=-1, keepdim=True)).all()


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_sums_of_probabilities(score: str) -> None:
    logits_TE, valid_T = randn(12, 5), torch.arange(12) % 4 != 1
    want_TE = naive_probs(logits_TE, score) * valid_T[:, None]
    have_GE = sum_probs(logits_TE, score, None, valid_T, 3)
    torch.testing.assert_close(have_GE, want_TE.view(3, 4, 5).sum(dim=1), rtol=1e-12, atol=1e-14)
    group_ids_T = torch.arange(12) % 2
    want_GE = torch.stack([want_TE[::2].sum(dim=0), want_TE[1::2].sum(dim=0)])
    have_GE = sum_probs(logits_TE, score, group_ids_T, valid_T, 2)
    torch.testing.assert_close(have_GE, want_GE, rtol=1e-12, atol=1e-14)


def test_no_objective_no_gradient() -> None:
    assert not logit_gradient(randn(4, 5), "sigmoid", None, None, None, None).any()


# ---------------------------------------------------------------- under a compiler


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_a_compiler_sees_one_block(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 16)
    logits_TE, given = randn(300, 6), everything(300, 6)
    seen: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.append(sum(node.op.startswith("call") for node in graph.graph.nodes))
        return graph

    def run() -> Tensor:
        return logit_gradient(logits_TE, score, **given)

    have_TE = torch.compile(run, backend=backend, fullgraph=True)()
    torch._dynamo.reset()
    torch.testing.assert_close(have_TE, run(), rtol=1e-13, atol=1e-15)
    assert len(seen) == 1
    assert seen[0] <= 45
