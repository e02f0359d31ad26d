"""Router: values by hand, every option, numerics at the edges, messages."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.router import Router

SCORES = {
    "softmax": lambda z: z.softmax(-1),
    "sigmoid": torch.sigmoid,
    "sqrt_softplus": lambda z: torch.nn.functional.softplus(z).sqrt(),
}


def config(**options) -> Router.Config:
    defaults = {"dim": 6, "num_experts": 8, "top_k": 3, "score": "softmax", "normalize_top_k": True}
    return Router.Config(**(defaults | options))


def identity_router(logits: list[list[float]], **options) -> tuple[Router, torch.Tensor]:
    """Return a router whose logits are its input, and that input."""
    x_TD = torch.tensor(logits)
    num_experts = x_TD.shape[1]
    router = config(dim=num_experts, num_experts=num_experts, **options).build()
    with torch.no_grad():
        router.weight.copy_(torch.eye(num_experts))
    return router, x_TD


def random_router(dtype=torch.float32, seed=0, tokens=7, **options) -> tuple[Router, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    router = config(**options).build(dtype=dtype)
    with torch.no_grad():
        for tensor in (router.weight, router.bias, router.expert_bias_E):
            if tensor is not None:
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return router, torch.randn(tokens, 6, generator=generator, dtype=torch.float64).to(dtype)


def naive_route(router: Router, x_TD: torch.Tensor) -> tuple[list[set[int]], torch.Tensor]:
    """Return the definition, token by token in float64: chosen sets and dense (T, E) weights."""
    c = router.config
    bias = router.bias.double() if c.linear_bias else 0.0
    logits_TE = x_TD.double() @ router.weight.double().T + bias
    dense_TE = torch.zeros_like(logits_TE)
    chosen = []
    for t, logits in enumerate(logits_TE):
        s = SCORES[c.score](logits)
        ranks = (logits if c.score_after_top_k else s).tolist()
        if c.expert_bias:
            ranks = [r + b for r, b in zip(ranks, router.expert_bias_E.tolist(), strict=True)]
        size = c.num_experts // c.num_groups
        groups = [ranks[g * size : (g + 1) * size] for g in range(c.num_groups)]
        best = 1 if c.group_score == "max" else 2
        values = [sum(sorted(group, reverse=True)[:best]) for group in groups]
        kept = sorted(range(c.num_groups), key=lambda g: -values[g])[: c.top_k_groups]
        allowed = [e for e in range(c.num_experts) if e // size in kept]
        ids = sorted(allowed, key=lambda e: -ranks[e])[: c.top_k]
        chosen.append(set(ids))
        weights = logits[ids].softmax(-1) if c.score_after_top_k else s[ids]
        dense_TE[t, ids] = c.scale * (weights / weights.sum() if c.normalize_top_k else weights)
    return chosen, dense_TE


def dense(weights_TK: torch.Tensor, ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
    return weights_TK.new_zeros(ids_TK.shape[0], num_experts).scatter(1, ids_TK, weights_TK)


# --- values by hand -----------------------------------------------------------------------

LOG2, LOG3 = math.log(2), math.log(3)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # softmax of (0, log 2, log 3, -inf-like) over e^z = (1, 2, 3): the two best are 3/6 and 2/6.
        ({"normalize_top_k": False}, [3 / 6, 2 / 6]),
        ({"normalize_top_k": True}, [3 / 5, 2 / 5]),
        ({"normalize_top_k": False, "score_after_top_k": True}, [3 / 5, 2 / 5]),
        ({"normalize_top_k": True, "scale": 2.5}, [1.5, 1.0]),
        # sigmoid(log a) = a / (1 + a): 3/4 and 2/3, whose sum is 17/12.
        ({"score": "sigmoid", "normalize_top_k": False}, [3 / 4, 2 / 3]),
        ({"score": "sigmoid", "normalize_top_k": True}, [9 / 17, 8 / 17]),
        # softplus(log a) = log(1 + a).
        ({"score": "sqrt_softplus", "normalize_top_k": False}, [math.log(4) ** 0.5, math.log(3) ** 0.5]),
    ],
)
def test_weights_by_hand(options, expected):
    router, x_TD = identity_router([[0.0, LOG2, LOG3]], top_k=2, **options)
    logits_TE, weights_TK, ids_TK = router(x_TD)
    assert ids_TK.tolist() == [[2, 1]]
    torch.testing.assert_close(weights_TK, torch.tensor([expected]))
    torch.testing.assert_close(logits_TE, x_TD)


def test_expert_bias_moves_the_choice_and_not_the_weights():
    router, x_TD = identity_router([[0.0, LOG2, LOG3]], top_k=2, score="sigmoid", expert_bias=True)
    router.expert_bias_E.copy_(torch.tensor([1.0, 0.0, 0.0]))
    _, weights_TK, ids_TK = router(x_TD)
    # Scores 1/2, 2/3, 3/4 rank as 3/2, 2/3, 3/4; the weights are 1/2 and 3/4 over their sum.
    assert ids_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(weights_TK, torch.tensor([[0.4, 0.6]]))
    weights_TK.sum().backward()
    assert router.expert_bias_E.grad is None
    assert "expert_bias_E" in router.state_dict()


def test_expert_bias_is_added_to_the_logits_when_the_score_comes_after_top_k():
    # In probabilities expert 0 leads by 0.9; in logits a bias of 3 is enough to put expert 2 first.
    router, x_TD = identity_router([[3.0, 0.0, 0.5]], top_k=1 + 1, score_after_top_k=True, expert_bias=True)
    router.expert_bias_E.copy_(torch.tensor([0.0, 0.0, 3.0]))
    assert router(x_TD)[2].tolist() == [[2, 0]]


def test_linear_bias_is_part_of_the_logits():
    router, x_TD = identity_router([[0.0, LOG2, LOG3]], top_k=2, linear_bias=True)
    with torch.no_grad():
        router.bias.copy_(torch.tensor([LOG3 + LOG2, 0.0, 0.0]))
    logits_TE, weights_TK, ids_TK = router(x_TD)
    assert ids_TK.tolist() == [[0, 2]]
    torch.testing.assert_close(weights_TK, torch.tensor([[6 / 9, 3 / 9]]))
    torch.testing.assert_close(logits_TE, torch.tensor([[LOG3 + LOG2, LOG2, LOG3]]))


@pytest.mark.parametrize(("group_score", "expected"), [("max", [0, 1]), ("top2_sum", [2, 3])])
def test_group_limit_by_hand(group_score, expected):
    # Groups {0, 1} and {2, 3}: the first has the best expert, the second the best pair.
    router, x_TD = identity_router(
        [[2.0, -4.0, 1.5, 1.4]],
        top_k=2,
        score="sigmoid",
        num_groups=2,
        top_k_groups=1,
        group_score=group_score,
    )
    assert router(x_TD)[2].tolist() == [expected]


def test_groups_see_the_expert_bias():
    options = {"top_k": 2, "score": "sigmoid", "num_groups": 2, "top_k_groups": 1, "expert_bias": True}
    router, x_TD = identity_router([[2.0, -4.0, 1.5, 1.4]], **options)
    router.expert_bias_E.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert router(x_TD)[2].tolist() == [[3, 2]]


def test_experts_outside_the_kept_groups_are_never_chosen():
    # All ranks are negative: masking with 0 instead of -inf would choose the dropped group.
    options = {"top_k": 2, "score": "sigmoid", "num_groups": 2, "top_k_groups": 1, "expert_bias": True}
    router, x_TD = identity_router([[2.0, -4.0, 1.5, 1.4]], **options)
    router.expert_bias_E.fill_(-5.0)
    assert router(x_TD)[2].tolist() == [[0, 1]]


# --- every option against the definition --------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("expert_bias", [True, False])
@pytest.mark.parametrize(
    "groups", [{}, {"num_groups": 4, "top_k_groups": 2}, {"num_groups": 4, "top_k_groups": 4}]
)
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
def test_equals_the_definition(score, normalize, expert_bias, groups, group_score):
    router, x_TD = random_router(
        dtype=torch.float64,
        tokens=40,
        score=score,
        normalize_top_k=normalize,
        expert_bias=expert_bias,
        linear_bias=True,
        scale=1.7,
        group_score=group_score,
        **groups,
    )
    logits_TE, weights_TK, ids_TK = router(x_TD)
    chosen, dense_TE = naive_route(router, x_TD)
    assert [set(row) for row in ids_TK.tolist()] == chosen
    torch.testing.assert_close(dense(weights_TK, ids_TK, 8), dense_TE, rtol=1e-9, atol=0)
    assert (logits_TE.dtype, weights_TK.dtype, ids_TK.dtype) == (torch.float64, torch.float64, torch.int64)


@pytest.mark.parametrize("expert_bias", [True, False])
def test_score_after_top_k_equals_the_definition(expert_bias):
    router, x_TD = random_router(
        dtype=torch.float64, score_after_top_k=True, expert_bias=expert_bias, linear_bias=True
    )
    _, weights_TK, ids_TK = router(x_TD)
    chosen, dense_TE = naive_route(router, x_TD)
    assert [set(row) for row in ids_TK.tolist()] == chosen
    torch.testing.assert_close(dense(weights_TK, ids_TK, 8), dense_TE, rtol=1e-12, atol=0)


def test_leading_axes_are_flattened():
    router, x_TD = random_router(tokens=6)
    for flat, shaped in zip(router(x_TD), router(x_TD.view(2, 3, 6)), strict=True):
        assert torch.equal(flat, shaped)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), permutation=st.permutations(range(9)))
def test_permuting_tokens_permutes_the_routing(seed, permutation):
    router, x_TD = random_router(seed=seed, tokens=9, score="sigmoid", expert_bias=True)
    for whole, permuted in zip(router(x_TD), router(x_TD[list(permutation)]), strict=True):
        torch.testing.assert_close(whole[list(permutation)], permuted)


# --- replayed and forced routing ----------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("normalize", [True, False])
def test_replayed_ids_are_used_with_the_scores_of_now(score, normalize):
    router, x_TD = random_router(
        dtype=torch.float64, score=score, normalize_top_k=normalize, expert_bias=True
    )
    replay_ids_TK = torch.tensor([[7, 0, 3]] * 7, dtype=torch.int32)
    logits_TE, weights_TK, ids_TK = router(x_TD, replay_ids_TK=replay_ids_TK)
    assert ids_TK.dtype == torch.int64
    assert ids_TK.tolist() == replay_ids_TK.tolist()
    s_TK = SCORES[score](logits_TE)[:, [7, 0, 3]]
    expected_TK = s_TK / s_TK.sum(-1, keepdim=True) if normalize else s_TK
    torch.testing.assert_close(weights_TK, expected_TK, rtol=1e-9, atol=0)


def test_replaying_its_own_choice_changes_nothing():
    router, x_TD = random_router(score="sigmoid", expert_bias=True)
    first = router(x_TD)
    for a, b in zip(first, router(x_TD, replay_ids_TK=first[2]), strict=True):
        assert torch.equal(a, b)


def test_forced_balance_deals_experts_round_robin_with_their_true_scores():
    router, x_TD = random_router(tokens=16, forced_balance=True, normalize_top_k=False)
    logits_TE, weights_TK, ids_TK = router(x_TD)
    assert ids_TK[:3].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 0]]
    assert torch.bincount(ids_TK.flatten(), minlength=8).tolist() == [6] * 8
    assert torch.equal(weights_TK, logits_TE.softmax(-1).gather(1, ids_TK))


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"linear_bias": True, "score": "sigmoid"}, True),
        ({"num_groups": 4, "top_k_groups": 4}, True),
        ({"expert_bias": True}, False),
        ({"num_groups": 4, "top_k_groups": 2}, False),
        ({"forced_balance": True}, False),
    ],
)
def test_selection_is_plain(options, plain):
    assert config(**options).build().selection_is_plain is plain


# --- numerics -----------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("shift", [-300.0, -90.0, 0.0, 90.0])
def test_normalised_weights_sum_to_one_where_scores_under_or_overflow(score, shift):
    # At z = -300 every float32 sigmoid is 0: s / (sum s + eps) would be 0, s / sum s would be NaN.
    router, x_TD = identity_router([[shift, shift + LOG2, shift + LOG3, shift - 1]], top_k=2, score=score)
    x_TD.requires_grad_()
    _, weights_TK, ids_TK = router(x_TD)
    assert ids_TK.tolist() == [[2, 1]]
    torch.testing.assert_close(weights_TK.sum(-1), torch.ones(1))
    if score != "sqrt_softplus" and shift < 0:
        # Both scores tend to e^z, whose ratio is 3 : 2; sqrt-softplus tends to its square root.
        torch.testing.assert_close(weights_TK, torch.tensor([[0.6, 0.4]]), rtol=1e-4, atol=0)
    weights_TK[:, 0].sum().backward()
    assert x_TD.grad.isfinite().all()
    assert router.weight.grad.isfinite().all()


def test_saturated_scores_do_not_hide_the_order_of_the_logits():
    # Every float32 sigmoid here is exactly 1; ranking by score would be a tie.
    router, x_TD = identity_router([[40.0, 43.0, 41.0, 42.0]], top_k=2, score="sigmoid")
    assert router(x_TD)[2].tolist() == [[1, 3]]


def test_ties_are_broken_the_same_way_every_time():
    router, _ = random_router(expert_bias=True, score="sigmoid")
    router.expert_bias_E.zero_()
    zeros_TD = torch.zeros(50, 6)
    first = router(zeros_TD)[2]
    assert all(torch.equal(first, router(zeros_TD)[2]) for _ in range(5))
    assert (first.sort(-1).values.diff(dim=-1) > 0).all()


@pytest.mark.parametrize(
    ("input_dtype", "gate_dtype", "expected"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.float64, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float64),
    ],
)
def test_gate_dtype(input_dtype, gate_dtype, expected):
    router, x_TD = random_router(dtype=input_dtype)
    other = config(dtype=gate_dtype).build(dtype=input_dtype)
    other.load_state_dict(router.state_dict())
    logits_TE, weights_TK, _ = other(x_TD)
    assert logits_TE.dtype == weights_TK.dtype == expected
    exact_TE = x_TD.double() @ other.weight.double().T
    error = ((logits_TE - exact_TE).abs().max() / exact_TE.abs().max()).item()
    # Only the gate that computes in bfloat16 shows bfloat16's rounding.
    assert (error > 1e-4) == (gate_dtype is None)


def test_gate_keeps_its_dtype_under_autocast():
    router, x_TD = random_router()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = router(x_TD)
    for a, b in zip(inside, router(x_TD), strict=True):
        assert torch.equal(a, b)
    lenient = config(dtype=None).build()
    lenient.load_state_dict(router.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not torch.equal(lenient(x_TD)[0], inside[0])


def test_expert_bias_stays_float32_through_casts():
    router = config(expert_bias=True).build()
    router.expert_bias_E.copy_(torch.linspace(1, 2, 8) + 1e-3)
    before_E = router.expert_bias_E.clone()
    router.to(torch.bfloat16)
    assert router.weight.dtype == torch.bfloat16
    assert torch.equal(router.expert_bias_E, before_E)
    assert router.expert_bias_E.dtype == torch.float32
    assert dict(router.named_buffers()).keys() == {"expert_bias_E"}
    assert router.double().expert_bias_E.dtype == torch.float32


def test_meta_build_materialises():
    router = config(expert_bias=True, linear_bias=True).build(device="meta").to(torch.bfloat16)
    assert router.expert_bias_E.dtype == torch.float32
    router.to_empty(device="cpu")
    router.reset_parameters()
    assert router.expert_bias_E.tolist() == router.bias.tolist() == [0.0] * 8
    assert 0 < router.weight.float().std() < 0.05


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
@pytest.mark.parametrize("normalize", [True, False])
def test_gradcheck(score, normalize):
    router, x_TD = random_router(
        dtype=torch.float64,
        score=score,
        normalize_top_k=normalize,
        expert_bias=True,
        linear_bias=True,
        num_groups=4,
        top_k_groups=3,
        group_score="top2_sum",
        scale=2.0,
    )
    ids_TK = router(x_TD)[2]

    def outputs(x_TD, weight, bias):
        arguments = ({"weight": weight, "bias": bias}, (x_TD,), {"replay_ids_TK": ids_TK})
        return torch.func.functional_call(router, *arguments)[:2]

    inputs = (x_TD.requires_grad_(), router.weight, router.bias)
    assert torch.autograd.gradcheck(outputs, inputs)
    assert torch.autograd.gradgradcheck(outputs, inputs)


# --- jitter -------------------------------------------------------------------------------


def test_input_jitter_multiplies_the_input_in_training_only():
    router, x_TD = identity_router([[1.0, 2.0, 4.0]] * 500, top_k=2, input_jitter=0.1)
    torch.manual_seed(0)
    ratio = router(x_TD)[0] / x_TD
    assert 0.9 <= ratio.min() < 0.91 < 1.09 < ratio.max() <= 1.1
    assert torch.equal(router.eval()(x_TD)[0], x_TD)
    assert x_TD[0].tolist() == [1.0, 2.0, 4.0]


# --- edges and messages -------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"forced_balance": True}, {"num_groups": 2, "expert_bias": True}])
def test_zero_tokens(options):
    router, _ = random_router(**options)
    x_TD = torch.zeros(0, 6, requires_grad=True)
    logits_TE, weights_TK, ids_TK = router(x_TD)
    assert (logits_TE.shape, weights_TK.shape, ids_TK.shape) == ((0, 8), (0, 3), (0, 3))
    (logits_TE.sum() + weights_TK.sum()).backward()
    assert router.weight.grad.abs().max() == 0


MESSAGES = [
    ({"top_k": 9}, r"top_k=9 must be in \[1, num_experts=8\]; lower router.top_k"),
    ({"top_k": 0}, r"top_k=0 must be in \[1, num_experts=8\]; raise router.top_k"),
    ({"dim": 0}, "dim=0 must be at least 1; set router.dim"),
    ({"num_experts": 0}, "num_experts=0 must be at least 1; set router.num_experts"),
    ({"num_groups": 3}, "num_groups=3 must divide num_experts=8; set router.num_groups"),
    ({"num_groups": 0}, "num_groups=0 must divide num_experts=8"),
    ({"num_groups": 4, "top_k_groups": 5}, r"top_k_groups=5 must be in \[1, num_groups=4\]"),
    (
        {"num_groups": 4, "top_k_groups": 1},
        "top_k=3 must be at most 2, the experts in top_k_groups=1 groups of 2; "
        "lower router.top_k or raise router.top_k_groups",
    ),
    ({"group_score": "mean"}, "group_score='mean' must be 'max' or 'top2_sum'"),
    (
        {"num_groups": 8, "top_k_groups": 3, "group_score": "top2_sum"},
        "group_score='top2_sum' needs 2 experts per group, got 1; lower router.num_groups",
    ),
    ({"score": "tanh"}, "score='tanh' is unknown; choose one of 'softmax'"),
    ({"score": "sigmoid", "score_after_top_k": True}, "score_after_top_k=True needs score='softmax'"),
    ({"dtype": torch.bfloat16}, "dtype=torch.bfloat16 must be torch.float32, torch.float64 or None"),
    ({"input_jitter": 1.0}, r"input_jitter=1.0 must be in \[0, 1\); set router.input_jitter"),
    ({"input_jitter": -0.1}, r"input_jitter=-0.1 must be in \[0, 1\)"),
    ({"scale": 0.0}, "scale=0.0 must be finite and > 0; set router.scale"),
    ({"scale": float("nan")}, "scale=nan must be finite and > 0"),
    ({"init_std": -1.0}, "init_std=-1.0 must be >= 0; set router.init_std"),
]


@pytest.mark.parametrize(("options", "message"), MESSAGES)
def test_construction_messages(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


@pytest.mark.parametrize("options", [{"normalize_top_k": True}, {"score_after_top_k": True}])
def test_normalising_one_weight_warns(options):
    with pytest.warns(UserWarning, match="top_k=1 with normalised weights makes every weight equal"):
        config(**({"normalize_top_k": False, "top_k": 1} | options))


def test_config_is_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        config().top_k = 2
    with pytest.raises(TypeError):
        Router.Config(6, 8, 3, "softmax", True)


def test_input_messages():
    router, x_TD = random_router()
    with pytest.raises(
        ValueError, match=r"x has shape \(7, 5\), expected \(..., D\) with D = 6; set router.dim"
    ):
        router(x_TD[:, :5])
    with pytest.raises(ValueError, match=r"shape \(7, 2\), expected int64 or int32 of shape \(7, 3\)"):
        router(x_TD, replay_ids_TK=torch.zeros(7, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"replay_ids_TK is torch.float32 of shape \(7, 3\)"):
        router(x_TD, replay_ids_TK=torch.zeros(7, 3))


# --- hooks and compile --------------------------------------------------------------------


def test_a_forward_hook_may_replace_the_weights():
    router, x_TD = random_router()
    router.register_forward_hook(lambda module, args, output: (output[0], output[1] * 2, output[2]))
    torch.testing.assert_close(router(x_TD)[1].sum(-1), torch.full((7,), 2.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"score": "sigmoid", "expert_bias": True, "num_groups": 4, "top_k_groups": 2, "scale": 2.5},
        {"score_after_top_k": True, "linear_bias": True},
        {"score": "sqrt_softplus", "forced_balance": True},
    ],
)
def test_compiles_as_one_graph(dtype, options):
    router, x_TD = random_router(dtype=dtype, **options)
    compiled = torch.compile(router, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(x_TD), router(x_TD), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()
