"""Grouped multiply, experts and local dispatch: native path, loop, derivatives, edges."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.dispatch import LocalDispatcher, sort_by_expert
from trimtab.experts import ClampedSwiGLU, Experts, GatedActivation, GeGLU, SharedExperts, SwiGLU
from trimtab.grouped_mm import _grouped_mm, _weight_grad, grouped_mm, grouped_mm_loop, grouped_rows

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
COUNTS = [[3, 0, 4, 1], [0, 0, 8, 0], [8, 0, 0, 0], [0, 0, 0, 0]]


def operands(counts, width_in=16, width_out=32, dtype=torch.float32, transposed=False):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    if transposed:
        w_EDF = randn(len(counts), width_out, width_in).transpose(1, 2)
    else:
        w_EDF = randn(len(counts), width_in, width_out)
    x_ND = randn(sum(counts), width_in)
    return x_ND.requires_grad_(), w_EDF.requires_grad_(), torch.tensor(counts)


def count_native_calls(monkeypatch) -> list[torch.dtype]:
    calls: list[torch.dtype] = []
    native = F.grouped_mm
    monkeypatch.setattr(F, "grouped_mm", lambda x, w, offs: calls.append(x.dtype) or native(x, w, offs=offs))
    return calls


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("widths", [(16, 32), (6, 10), (16, 10), (1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_the_loop_in_value_and_gradient(dtype, counts, widths, transposed):
    x_ND, w_EDF, counts_E = operands(counts, *widths, dtype, transposed)
    actual, expected = grouped_mm(x_ND, w_EDF, counts_E), grouped_mm_loop(x_ND, w_EDF, counts_E)
    grad_NF = torch.linspace(-1, 1, actual.numel(), dtype=torch.float64).to(dtype).view_as(actual)
    tolerance = {"rtol": 0, "atol": 0 if dtype in (torch.float32, torch.float64) else 0.05}
    torch.testing.assert_close(actual, expected, **tolerance)
    assert actual.is_contiguous()
    assert actual.dtype == dtype
    gradients = torch.autograd.grad(actual, (x_ND, w_EDF), grad_NF)
    for a, b in zip(gradients, torch.autograd.grad(expected, (x_ND, w_EDF), grad_NF), strict=True):
        torch.testing.assert_close(
            a, b, **(tolerance if dtype != torch.float32 else {"rtol": 0, "atol": 1e-5})
        )


def test_values_by_hand():
    x_ND = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    w_EDF = torch.tensor([[[1.0], [0.0]], [[9.0], [9.0]], [[1.0], [1.0]]])
    counts_E = torch.tensor([1, 0, 2])
    assert grouped_mm(x_ND, w_EDF, counts_E).tolist() == [[1.0], [7.0], [11.0]]


@pytest.mark.parametrize(
    ("dtype", "widths", "calls"),
    [
        (torch.float32, (16, 32), 3),  # forward, gradient of x, gradient of w
        (torch.bfloat16, (16, 32), 3),
        (torch.float16, (16, 32), 3),
        (torch.float64, (16, 32), 0),
        (torch.float32, (16, 6), 0),
        (torch.bfloat16, (16, 12), 0),
    ],
)
def test_native_kernel_runs_where_it_applies(monkeypatch, dtype, widths, calls):
    seen = count_native_calls(monkeypatch)
    x_ND, w_EDF, counts_E = operands([3, 0, 4, 1], *widths, dtype)
    grouped_mm(x_ND, w_EDF, counts_E).sum().backward()
    assert seen == [dtype] * calls


def test_expanded_gradient_and_odd_strides(monkeypatch):
    seen = count_native_calls(monkeypatch)
    x_ND, _, counts_E = operands([3, 0, 4, 1])
    wide_ND = torch.cat([x_ND, x_ND[:, :5]], dim=1).detach()
    odd_x_ND = wide_ND[:, 1:17].requires_grad_()
    odd_w_EDF = torch.randn(4, 32, 2, 16).permute(0, 3, 2, 1)[:, :, 1].detach().requires_grad_()
    y_NF = grouped_mm(odd_x_ND, odd_w_EDF, counts_E)
    torch.testing.assert_close(y_NF, grouped_mm_loop(odd_x_ND, odd_w_EDF, counts_E))
    y_NF.backward(torch.ones(1, 1).expand(8, 32))  # stride 0, which the native backward refuses
    assert len(seen) == 3
    expected_ND = torch.stack([odd_w_EDF[e].sum(-1) for e in (0, 0, 0, 2, 2, 2, 2, 3)])
    torch.testing.assert_close(odd_x_ND.grad, expected_ND)
    assert odd_w_EDF.grad[1].abs().max() == 0


def test_native_kernel_gets_aligned_row_major_rows(monkeypatch):
    # The CPU kernel reads any of these; on CUDA an unaligned address or a column-major block is an error.
    native, seen = F.grouped_mm, []

    def check(x, w, offs):
        rows = (x,) if w.dim() == 3 else (x.t(), w)
        assert all(r.stride(1) == 1 and r.stride(0) % 4 == 0 for r in rows)
        assert all(t.data_ptr() % 16 == 0 for t in (x, w))
        assert x.shape[0] > 0
        assert offs.dtype == torch.int32
        seen.append(x)
        return native(x, w, offs=offs)

    monkeypatch.setattr(F, "grouped_mm", check)
    x_ND, w_EDF, counts_E = operands([3, 0, 4, 1])
    unaligned_ND = torch.zeros(8 * 16 + 1)[1:].view(8, 16)
    for rows_ND in (x_ND, x_ND.detach().t().contiguous().t(), unaligned_ND):
        y_NF = grouped_mm(rows_ND.requires_grad_(), w_EDF, counts_E)
        y_NF.backward(torch.randn(32, 8).t())
    assert len(seen) == 9
    empty_ND = torch.zeros(0, 16, requires_grad=True)
    grouped_mm(empty_ND, w_EDF, torch.zeros(4, dtype=torch.int64)).sum().backward()
    assert len(seen) == 9


def test_gradient_has_the_layout_of_its_parameter():
    x_ND, _, counts_E = operands([3, 0, 4, 1])
    weight_EFD = nn.Parameter(torch.randn(4, 32, 16))
    (grad,) = torch.autograd.grad(grouped_mm(x_ND, weight_EFD.transpose(1, 2), counts_E).sum(), weight_EFD)
    assert grad.stride() == weight_EFD.stride()


@pytest.mark.parametrize("frozen", ["x", "w"])
def test_frozen_operand_costs_no_multiply(monkeypatch, frozen):
    seen = count_native_calls(monkeypatch)
    x_ND, w_EDF, counts_E = operands([3, 0, 4, 1])
    (x_ND if frozen == "x" else w_EDF).requires_grad_(False)
    grouped_mm(x_ND, w_EDF, counts_E).sum().backward()
    assert len(seen) == 2


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("transposed", [False, True])
def test_gradcheck(counts, transposed):
    x_ND, w_EDF, counts_E = operands(counts, 3, 4, torch.float64, transposed)
    assert torch.autograd.gradcheck(lambda x, w: grouped_mm(x, w, counts_E), (x_ND, w_EDF))
    assert torch.autograd.gradgradcheck(lambda x, w: grouped_mm(x, w, counts_E), (x_ND, w_EDF))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_operators_keep_their_contract_with_torch(dtype):
    x_ND, w_EDF, counts_E = operands([3, 0, 4, 1], dtype=dtype)
    torch.library.opcheck(_grouped_mm._opoverload, (x_ND, w_EDF, counts_E))
    grad_NF = torch.randn(8, 32, dtype=dtype, requires_grad=True)
    torch.library.opcheck(_weight_grad._opoverload, (x_ND, grad_NF, counts_E))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_grouped_rows(dtype):
    v_EF = torch.randn(4, 6, dtype=dtype, requires_grad=True)
    rows_NF = grouped_rows(v_EF, torch.tensor([3, 0, 4, 1]), 8)
    assert torch.equal(rows_NF, v_EF[[0, 0, 0, 2, 2, 2, 2, 3]])
    rows_NF.sum().backward()
    assert v_EF.grad[:, 0].tolist() == [3.0, 0.0, 4.0, 1.0]


def test_grouped_rows_gradient_does_not_round_like_a_running_bfloat16_sum():
    v_EF = torch.zeros(1, 8, dtype=torch.bfloat16, requires_grad=True)
    grouped_rows(v_EF, torch.tensor([1024]), 1024).sum().backward()
    assert v_EF.grad[0, 0] == 1024  # adding ones in bfloat16 stops at 256


@pytest.mark.parametrize("width", [16, 6])
def test_counts_that_miss_rows_are_refused(width):
    # The native kernel leaves rows past the last offset uninitialised.
    x_ND, w_EDF, _ = operands([3, 0, 4, 1], width_in=width)
    with pytest.raises(ValueError, match="num_tokens_per_expert_E sums to 7, expected the 8 rows of x"):
        grouped_mm(x_ND, w_EDF, torch.tensor([3, 0, 4, 0]))


def test_grouped_mm_messages():
    x_ND, w_EDF, counts_E = operands([3, 0, 4, 1])
    with pytest.raises(
        ValueError, match=r"got x \(8, 16\) and w \(4, 32, 16\).*pass an \(E, F, D\) weight as"
    ):
        grouped_mm(x_ND, w_EDF.transpose(1, 2), counts_E)
    with pytest.raises(ValueError, match=r"has shape \(3,\), expected \(4,\): one count for each expert"):
        grouped_mm(x_ND, w_EDF, counts_E[:3])
    with pytest.raises(ValueError, match=r"x in torch.bfloat16 and w in torch.float32, expected one dtype"):
        grouped_mm(x_ND.bfloat16(), w_EDF, counts_E)


def test_autocast_casts_both_operands_as_linear_does():
    x_ND, w_EDF, counts_E = operands([3, 0, 4, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y_NF = grouped_mm(x_ND, w_EDF, counts_E)
    assert y_NF.dtype == torch.bfloat16
    y_NF.sum().backward()
    assert x_ND.grad.dtype == w_EDF.grad.dtype == torch.float32


# --- activations and experts --------------------------------------------------------------------------


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("activation", "gate", "up", "expected"),
    [
        (SwiGLU(), 2.0, 3.0, 2 * sigmoid(2) * 3),
        (GeGLU(), 2.0, 3.0, 2 * 0.5 * (1 + math.erf(2 / math.sqrt(2))) * 3),
        (
            GeGLU(approximate="tanh"),
            2.0,
            3.0,
            2 * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (2 + 0.044715 * 8))) * 3,
        ),
        (ClampedSwiGLU(interleaved=False), 2.0, 3.0, (3 + 1) * 2 * sigmoid(1.702 * 2)),
        (ClampedSwiGLU(interleaved=False), 9.0, 3.0, (3 + 1) * 7 * sigmoid(1.702 * 7)),
        (ClampedSwiGLU(interleaved=False), -9.0, 3.0, (3 + 1) * -9 * sigmoid(1.702 * -9)),
        (ClampedSwiGLU(interleaved=False), 2.0, 9.0, (7 + 1) * 2 * sigmoid(1.702 * 2)),
        (ClampedSwiGLU(interleaved=False), 2.0, -9.0, (-7 + 1) * 2 * sigmoid(1.702 * 2)),
        (ClampedSwiGLU(interleaved=False, alpha=1.0, limit=1.0), 2.0, 3.0, 2 * sigmoid(1)),
    ],
)
def test_activations_by_hand(activation, gate, up, expected):
    actual = activation(torch.tensor([[gate, up]], dtype=torch.float64))
    torch.testing.assert_close(actual, torch.tensor([[expected]], dtype=torch.float64))


def test_interleaved_splits_even_and_odd():
    gate_up_N2F = torch.randn(5, 8)
    halves_N2F = torch.cat([gate_up_N2F[:, ::2], gate_up_N2F[:, 1::2]], dim=1)
    for kind in (SwiGLU, GeGLU, ClampedSwiGLU):
        assert torch.equal(kind(interleaved=True)(gate_up_N2F), kind(interleaved=False)(halves_N2F))
    assert ClampedSwiGLU() == ClampedSwiGLU(interleaved=True)
    assert SwiGLU() == SwiGLU(interleaved=False)


def test_an_activation_must_define_combine():
    with pytest.raises(NotImplementedError, match="must define combine"):
        GatedActivation()(torch.ones(1, 2))


def build_experts(dtype=torch.float64, **options) -> Experts:
    experts = Experts.Config(**({"dim": 6, "hidden_dim": 5, "num_experts": 4} | options)).build(dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return experts


def naive_experts(experts: Experts, x_ND, counts):
    rows = []
    expert_of_row = [e for e, count in enumerate(counts) for _ in range(count)]
    for x, e in zip(x_ND, expert_of_row, strict=True):
        up, down = experts.gate_up_proj[e], experts.down_proj[e]
        up, down = (up.T, down.T) if experts.transposed else (up, down)
        h = up @ x + (experts.gate_up_proj_bias[e] if experts.config.bias else 0)
        y = down @ experts.activation(h) + (experts.down_proj_bias[e] if experts.config.bias else 0)
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("activation", [SwiGLU(), GeGLU(), ClampedSwiGLU()])
def test_experts_equal_one_row_at_a_time(bias, transposed, activation):
    experts = build_experts(bias=bias, transposed=transposed, activation=activation)
    counts = [3, 0, 4, 1]
    x_ND = torch.randn(8, 6, dtype=torch.float64, requires_grad=True)
    actual, expected = experts(x_ND, torch.tensor(counts)), naive_experts(experts, x_ND, counts)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    inputs = [x_ND, *experts.parameters()]
    grads = [torch.autograd.grad(y.square().sum(), inputs) for y in (actual, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_parameter_names_and_layouts():
    def shapes(**options):
        return {n: tuple(p.shape) for n, p in build_experts(**options).named_parameters()}

    assert shapes() == {"gate_up_proj": (4, 10, 6), "down_proj": (4, 6, 5)}
    assert shapes(transposed=True, bias=True) == {
        "gate_up_proj": (4, 6, 10),
        "down_proj": (4, 5, 6),
        "gate_up_proj_bias": (4, 10),
        "down_proj_bias": (4, 6),
    }


def test_zero_rows_give_zero_gradients_and_not_none():
    experts = build_experts(bias=True)
    x_ND = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    y_ND = experts(x_ND, torch.zeros(4, dtype=torch.int64))
    assert y_ND.shape == (0, 6)
    y_ND.sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() == 0 for p in experts.parameters())


def test_experts_initialise():
    experts = Experts.Config(dim=64, hidden_dim=64, num_experts=4, bias=True, init_std=0.5).build()
    assert abs(experts.gate_up_proj.std().item() - 0.5) < 0.02
    assert experts.down_proj_bias.abs().max() == 0


def test_shared_experts_by_hand():
    shared = SharedExperts.Config(dim=1, hidden_dim=1).build(dtype=torch.float64)
    with torch.no_grad():
        for name, value in (("gate_proj", 2.0), ("up_proj", 3.0), ("down_proj", 5.0)):
            getattr(shared, name).weight.fill_(value)
    expected = 5 * (2 * sigmoid(2)) * 3
    torch.testing.assert_close(shared(torch.ones(1, 1, dtype=torch.float64)).item(), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Experts.Config(dim=0, hidden_dim=1, num_experts=1),
            "dim=0 must be at least 1; set experts.dim",
        ),
        (lambda: Experts.Config(dim=1, hidden_dim=1, num_experts=0), "num_experts=0 must be at least 1"),
        (lambda: Experts.Config(dim=1, hidden_dim=1, num_experts=1, init_std=-1), "init_std=-1 must be >= 0"),
        (lambda: SharedExperts.Config(dim=1, hidden_dim=0), "hidden_dim=0 .* set shared_experts.hidden_dim"),
        (lambda: SharedExperts.Config(dim=1, hidden_dim=1, init_std=-1), "set shared_experts.init_std"),
        (lambda: GeGLU(approximate="sigmoid"), "approximate='sigmoid' must be 'none' or 'tanh'"),
        (lambda: ClampedSwiGLU(limit=0), "limit=0 must be > 0; set ClampedSwiGLU.limit"),
        (lambda: ClampedSwiGLU(alpha=-1), "alpha=-1 must be > 0; set ClampedSwiGLU.alpha"),
    ],
)
def test_construction_messages(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- local dispatch -----------------------------------------------------------------------------------


def test_sort_by_expert_by_hand():
    order_N, inverse_N, counts_E = sort_by_expert(torch.tensor([[2, 0], [0, 3], [2, 0]]), 5)
    assert order_N.tolist() == [1, 2, 5, 0, 4, 3]
    assert inverse_N.tolist() == [3, 0, 1, 5, 4, 2]
    assert counts_E.tolist() == [3, 0, 2, 1, 0]
    assert counts_E.dtype == torch.int64


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**16), tokens=st.integers(0, 9), top_k=st.integers(1, 4), before=st.booleans())
def test_dispatch_then_combine_is_the_weighted_sum(seed, tokens, top_k, before):
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(tokens, 3, generator=generator, dtype=torch.float64)
    ids_TK = torch.rand(tokens, 6, generator=generator).argsort(-1)[:, :top_k]
    weights_TK = torch.rand(tokens, top_k, generator=generator, dtype=torch.float64)
    dispatcher = LocalDispatcher(num_experts=6)
    x_ND, counts_E, plan = dispatcher.dispatch(x_TD, ids_TK, weights_TK, score_before_experts=before)
    assert counts_E.tolist() == torch.bincount(ids_TK.flatten(), minlength=6).tolist()
    # Expert e multiplies by e + 1, so a row at the wrong expert shows.
    factor_N = torch.repeat_interleave(torch.arange(1, 7, dtype=torch.float64), counts_E)
    y_TD = dispatcher.combine(x_ND * factor_N[:, None], plan)
    torch.testing.assert_close(y_TD, x_TD * (weights_TK * (ids_TK + 1)).sum(1, keepdim=True))


@pytest.mark.parametrize("before", [False, True])
def test_dispatch_gradcheck(before):
    ids_TK = torch.tensor([[2, 0], [0, 3], [2, 0]])
    x_TD = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weights_TK = torch.rand(3, 2, dtype=torch.float64, requires_grad=True)
    dispatcher = LocalDispatcher(num_experts=4)

    def run(x_TD, weights_TK):
        x_ND, _, plan = dispatcher.dispatch(x_TD, ids_TK, weights_TK, score_before_experts=before)
        return dispatcher.combine(x_ND.sin(), plan)

    assert torch.autograd.gradcheck(run, (x_TD, weights_TK))
    assert torch.autograd.gradgradcheck(run, (x_TD, weights_TK))


def test_combine_multiplies_and_sums_in_the_dtype_of_the_weights():
    # 1 + 2^-9 is 1 in bfloat16: rounded before the sum, the two results would cancel.
    dispatcher = LocalDispatcher(num_experts=2)
    x_TD = torch.ones(1, 1, dtype=torch.bfloat16)
    weights_TK = torch.tensor([[1 + 2**-9, 1.0]])
    x_ND, _, plan = dispatcher.dispatch(x_TD, torch.tensor([[0, 1]]), weights_TK, score_before_experts=False)
    y_TD = dispatcher.combine(x_ND * torch.tensor([[1], [-1]]), plan)
    assert y_TD.dtype == torch.bfloat16
    assert y_TD.item() == 2**-9


@pytest.mark.parametrize("before", [False, True])
def test_dispatch_has_no_unordered_sum(before):
    # Raises on any operation that has no deterministic implementation, forward or backward.
    torch.use_deterministic_algorithms(True)
    try:
        x_TD = torch.randn(5, 2, requires_grad=True)
        weights_TK = torch.rand(5, 2, requires_grad=True)
        ids_TK = torch.tensor([[0, 1]] * 5)
        dispatcher = LocalDispatcher(num_experts=2)
        x_ND, _, plan = dispatcher.dispatch(x_TD, ids_TK, weights_TK, score_before_experts=before)
        y_TD = dispatcher.combine(x_ND, plan)
        nodes, names = [y_TD.grad_fn], set()
        while nodes:
            node = nodes.pop()
            names.add(node.name())
            nodes += [n for n, _ in node.next_functions if n is not None]
        y_TD.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert "IndexCopyBackward0" in names
    assert not names & {"IndexBackward0", "IndexSelectBackward0", "GatherBackward0"}, names
