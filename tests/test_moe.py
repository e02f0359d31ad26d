"""The MoE layer as a whole: the definition, gradients, hooks, edges, compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import trimtab.grouped_mm
from trimtab.experts import ClampedSwiGLU, Experts, GeGLU, SharedExperts, SwiGLU
from trimtab.moe import MoE
from trimtab.router import Router

D, F, E, K = 8, 8, 6, 2


def moe_config(*, router=None, experts=None, shared=None, **options) -> MoE.Config:
    router_options = {"top_k": K, "score": "softmax", "normalize_top_k": True} | (router or {})
    return MoE.Config(
        router=Router.Config(dim=D, num_experts=E, **router_options),
        experts=Experts.Config(dim=D, hidden_dim=F, num_experts=E, **(experts or {})),
        shared_experts=None if shared is None else SharedExperts.Config(dim=D, hidden_dim=5, **shared),
        **options,
    )


def build(dtype=torch.float64, seed=0, **options) -> MoE:
    moe = moe_config(**options).build(dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in moe.state_dict().values():
            tensor.copy_(0.7 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return moe


def tokens(*shape, dtype=torch.float64, seed=1) -> torch.Tensor:
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(
        dtype
    )


def naive_moe(moe: MoE, x_BSD: torch.Tensor) -> torch.Tensor:
    """Return the definition, one token and one expert at a time; the router is tested on its own."""
    x_TD = x_BSD.reshape(-1, D)
    _, weights_TK, ids_TK = moe.router(x_TD)
    rows = []
    for x, weights, ids in zip(x_TD, weights_TK, ids_TK.tolist(), strict=True):
        y = torch.zeros_like(x)
        for w, e in zip(weights, ids, strict=True):
            gate_up, down = moe.experts.gate_up_proj[e], moe.experts.down_proj[e]
            h = gate_up @ (w * x if moe.config.score_before_experts else x)
            h = h if moe.experts.gate_up_proj_bias is None else h + moe.experts.gate_up_proj_bias[e]
            out = down @ moe.experts.activation(h)
            out = out if moe.experts.down_proj_bias is None else out + moe.experts.down_proj_bias[e]
            y = y + (out if moe.config.score_before_experts else w * out)
        if moe.shared_experts is not None:
            shared = moe.shared_experts(x)
            gate = moe.shared_expert_gate
            y = y + (shared if gate is None else torch.sigmoid(gate.weight[0] @ x) * shared)
        rows.append(y)
    return torch.stack(rows).view_as(x_BSD)


OPTIONS = {
    "plain": {},
    "top_1_scores_before": {
        "router": {"top_k": 1, "score": "sigmoid", "normalize_top_k": False},
        "score_before_experts": True,
    },
    "scores_before": {"score_before_experts": True, "experts": {"bias": True}},
    "shared": {"shared": {"activation": GeGLU()}, "experts": {"activation": GeGLU(approximate="tanh")}},
    "gated_shared": {"shared": {"gated": True}},
    "clamped_bias": {
        "router": {"score_after_top_k": True, "linear_bias": True},
        "experts": {"activation": ClampedSwiGLU(limit=1.0), "bias": True},
    },
    "grouped_sigmoid": {
        "router": {
            "score": "sigmoid",
            "expert_bias": True,
            "num_groups": 3,
            "top_k_groups": 2,
            "group_score": "top2_sum",
            "scale": 2.5,
        },
        "shared": {},
    },
    "sqrt_softplus_all_experts": {"router": {"score": "sqrt_softplus", "top_k": E}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_equals_the_definition_in_value_and_gradient(name):
    moe = build(**OPTIONS[name])
    x_BSD = tokens(2, 7).requires_grad_()
    actual, expected = moe(x_BSD), naive_moe(moe, x_BSD)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    inputs = [x_BSD, *moe.parameters()]
    grads = [torch.autograd.grad(y.square().sum(), inputs, allow_unused=True) for y in (actual, expected)]
    for (label, a), b in zip(
        zip(["x", *dict(moe.named_parameters())], grads[0], strict=True), grads[1], strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10, msg=lambda m, label=label: f"{label}: {m}")
        assert a.abs().max() > 0, label


def test_values_by_hand():
    # Two experts of width 1 with h = silu(x) * x; weights 3/4 and 1/4 from logits log 3 and 0.
    config = MoE.Config(
        router=Router.Config(
            dim=1, num_experts=2, top_k=2, score="softmax", normalize_top_k=False, linear_bias=True
        ),
        experts=Experts.Config(dim=1, hidden_dim=1, num_experts=2),
    )
    moe = config.build(dtype=torch.float64)
    with torch.no_grad():
        moe.router.weight.zero_()
        moe.router.bias.copy_(torch.tensor([3.0, 1.0]).log())
        moe.experts.gate_up_proj.fill_(1.0)
        moe.experts.down_proj.copy_(torch.tensor([10.0, 100.0]).view(2, 1, 1))
    x = torch.tensor([[2.0]], dtype=torch.float64)
    h = 4 * torch.sigmoid(x)
    torch.testing.assert_close(moe(x), (0.75 * 10 + 0.25 * 100) * h)


@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck_of_the_whole_layer(name):
    moe = build(**OPTIONS[name])
    x_BSD = tokens(1, 3).requires_grad_()
    ids_TK = moe.router(x_BSD)[2]
    parameters = dict(moe.named_parameters())

    def run(x_BSD, *values):
        state = dict(zip(parameters, values, strict=True))
        return torch.func.functional_call(moe, state, (x_BSD,), {"replay_ids_TK": ids_TK})

    assert torch.autograd.gradcheck(run, (x_BSD, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loop_and_grouped_paths_agree(monkeypatch, dtype):
    moe = build(dtype=dtype, shared={})
    x_BSD = tokens(2, 30, dtype=dtype).requires_grad_()
    inputs = [x_BSD, *moe.parameters()]
    grouped = moe(x_BSD)
    grouped_grads = torch.autograd.grad(grouped.sum(), inputs)
    monkeypatch.setattr(trimtab.grouped_mm, "_native_applies", lambda *_: False)
    loop = moe(x_BSD)
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2**-6, "atol": 2**-6}
    torch.testing.assert_close(grouped, loop, **tolerance)
    for a, b in zip(grouped_grads, torch.autograd.grad(loop.sum(), inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance["rtol"], atol=8 * tolerance["atol"])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), permutation=st.permutations(range(8)), name=st.sampled_from(list(OPTIONS)))
def test_permuting_tokens_permutes_outputs(seed, permutation, name):
    moe = build(seed=seed, **OPTIONS[name])
    x_TD = tokens(8, seed=seed)
    torch.testing.assert_close(moe(x_TD[list(permutation)]), moe(x_TD)[list(permutation)])


@settings(max_examples=15, deadline=None)
@given(split=st.integers(0, 8), name=st.sampled_from(list(OPTIONS)))
def test_splitting_tokens_changes_no_output(split, name):
    moe = build(**OPTIONS[name])
    x_TD = tokens(8)
    torch.testing.assert_close(torch.cat([moe(x_TD[:split]), moe(x_TD[split:])]), moe(x_TD))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
@pytest.mark.parametrize("name", OPTIONS)
def test_zero_tokens(name, shape):
    moe = build(**OPTIONS[name])
    x = tokens(*shape).requires_grad_()
    y = moe(x)
    assert y.shape == x.shape
    y.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in moe.parameters())


def test_empty_experts_get_zero_gradients():
    moe = build()
    ids_TK = torch.tensor([[1, 4]] * 5)
    moe(tokens(5), replay_ids_TK=ids_TK).sum().backward()
    used = moe.experts.gate_up_proj.grad.abs().amax(dim=(1, 2)) > 0
    assert used.tolist() == [False, True, False, False, True, False]


def test_replayed_ids_reach_the_experts():
    moe = build()
    x_TD = tokens(5)
    own = moe.router(x_TD)[2]
    assert torch.equal(moe(x_TD, replay_ids_TK=own), moe(x_TD))
    assert not torch.equal(moe(x_TD, replay_ids_TK=(own + 1) % E), moe(x_TD))


def test_a_hook_on_the_router_replaces_the_weights():
    moe = build()
    x_BSD = tokens(2, 4)
    before = moe(x_BSD)
    seen = []

    def double_weights(module, args, output):
        seen.append(args[0].shape)
        return output[0], output[1] * 2, output[2]

    handle = moe.router.register_forward_hook(double_weights)
    torch.testing.assert_close(moe(x_BSD), 2 * before)
    torch.testing.assert_close(moe(x_BSD, replay_ids_TK=moe.router(x_BSD)[2]), 2 * before)
    handle.remove()
    # A hook that balances within sequences needs to see where they begin.
    assert seen[0] == (2, 4, D)


def test_child_and_state_names():
    moe = build(shared={"gated": True}, router={"expert_bias": True, "linear_bias": True})
    assert list(dict(moe.named_children())) == ["router", "experts", "shared_experts", "shared_expert_gate"]
    assert set(moe.state_dict()) == {
        "router.weight",
        "router.bias",
        "router.expert_bias_E",
        "experts.gate_up_proj",
        "experts.down_proj",
        "shared_experts.gate_proj.weight",
        "shared_experts.up_proj.weight",
        "shared_experts.down_proj.weight",
        "shared_expert_gate.weight",
    }
    assert set(build().state_dict()) == {"router.weight", "experts.gate_up_proj", "experts.down_proj"}


def test_the_same_bits_on_every_run():
    moe = build(dtype=torch.float32, shared={"gated": True})
    runs = []
    for _ in range(3):
        x_BSD = tokens(2, 40, dtype=torch.float32).requires_grad_()
        y_BSD = moe(x_BSD)
        runs.append([y_BSD, *torch.autograd.grad(y_BSD.sum(), [x_BSD, *moe.parameters()])])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("before", [False, True])
def test_bfloat16_output_and_gradients_keep_their_dtype(before):
    options = {"shared": {"gated": True}, "router": {"expert_bias": True}, "score_before_experts": before}
    moe = build(dtype=torch.bfloat16, **options)
    x_BSD = tokens(2, 9, dtype=torch.bfloat16).requires_grad_()
    y_BSD = moe(x_BSD)
    assert y_BSD.dtype == torch.bfloat16
    y_BSD.sum().backward()
    assert {p.grad.dtype for p in moe.parameters()} == {x_BSD.grad.dtype} == {torch.bfloat16}


def test_autocast_runs_float32_parameters():
    moe = build(dtype=torch.float32, shared={"gated": True})
    x_BSD = tokens(2, 9, dtype=torch.float32)
    exact = moe(x_BSD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_BSD = moe(x_BSD)
    assert y_BSD.dtype == torch.float32
    error = (y_BSD - exact).abs().max() / exact.abs().max()
    assert 1e-5 < error < 2e-2
    y_BSD.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


def test_activation_checkpointing_changes_no_gradient():
    moe = build(shared={"gated": True})
    grads = []
    for checkpointed in (False, True):
        x_BSD = tokens(2, 5).requires_grad_()
        y_BSD = (
            torch.utils.checkpoint.checkpoint(moe, x_BSD, use_reentrant=False) if checkpointed else moe(x_BSD)
        )
        grads.append(torch.autograd.grad(y_BSD.sum(), [x_BSD, *moe.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_experts": 5}, "experts.num_experts=5 must equal router.num_experts=6; set both"),
        ({"dim": 4}, "experts.dim=4 must equal router.dim=8; set both to the model's width"),
    ],
)
def test_parts_that_disagree(change, message):
    options = {"dim": D, "hidden_dim": F, "num_experts": E} | change
    with pytest.raises(ValueError, match=message):
        MoE.Config(router=moe_config().router, experts=Experts.Config(**options))


def test_shared_width_that_disagrees():
    with pytest.raises(ValueError, match=r"shared_experts.dim=4 must equal router.dim=8"):
        MoE.Config(
            router=moe_config().router,
            experts=moe_config().experts,
            shared_experts=SharedExperts.Config(dim=4, hidden_dim=4, activation=SwiGLU()),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["gated_shared", "clamped_bias", "grouped_sigmoid", "top_1_scores_before"])
def test_compiles_as_one_graph(name, dtype):
    moe = build(dtype=dtype, **OPTIONS[name])
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x_BSD = tokens(2, 6, dtype=dtype).requires_grad_()
    inputs = [x_BSD, *moe.parameters()]
    actual, expected = compiled(x_BSD), moe(x_BSD)
    torch.testing.assert_close(actual, expected)
    for a, b in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


# torch's own import of its inductor passes warns.
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_inductor_compiles_float32_as_one_graph():
    moe = build(dtype=torch.float32)
    x_BSD = tokens(2, 6, dtype=torch.float32).requires_grad_()
    inputs = [x_BSD, *moe.parameters()]
    actual, expected = torch.compile(moe, fullgraph=True)(x_BSD), moe(x_BSD)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(actual.sum(), inputs), torch.autograd.grad(expected.sum(), inputs), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
