"""Score functions: literal values, stability, derivatives."""

import math

import pytest
import torch

from trimtab.reference import naive_probs
from trimtab.scores import SCORE_NAMES, log_score_derivative, log_scores, probs, scores


def test_literal_values() -> None:
    z = torch.tensor([0.0, math.log(3.0)], dtype=torch.float64)
    torch.testing.assert_close(scores(z, "softmax"), torch.tensor([0.25, 0.75], dtype=torch.float64))
    torch.testing.assert_close(scores(z, "sigmoid"), torch.tensor([0.5, 0.75], dtype=torch.float64))
    expected = torch.tensor([math.sqrt(math.log(2)), math.sqrt(math.log(4))], dtype=torch.float64)
    torch.testing.assert_close(scores(z, "sqrt_softplus"), expected)
    torch.testing.assert_close(probs(z, "sigmoid"), torch.tensor([0.4, 0.6], dtype=torch.float64))


@pytest.mark.parametrize("name", SCORE_NAMES)
def test_probs_equal_the_definition(name: str) -> None:
    z = torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    torch.testing.assert_close(probs(z, name), naive_probs(z, name), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", SCORE_NAMES)
def test_derivative_is_that_of_log_scores(name: str) -> None:
    z = torch.linspace(-60, 60, 1201, dtype=torch.float64).requires_grad_()
    (want,) = torch.autograd.grad(log_scores(z, name).sum(), z)
    have = log_score_derivative(z.detach(), name)
    have = torch.ones_like(want) if have is None else have
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-30)


@pytest.mark.parametrize("name", SCORE_NAMES)
def test_gradcheck(name: str) -> None:
    z = torch.tensor(
        [[-30.0, -18.0001, -17.9999, -1.0, 0.0, 2.0, 30.0]], dtype=torch.float64
    ).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: log_scores(t, name), (z,))
    assert torch.autograd.gradcheck(lambda t: scores(t, name), (z,), atol=1e-7)
    assert torch.autograd.gradcheck(lambda t: probs(t, name), (z,), atol=1e-7)
    low = (z.detach() - 60).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: probs(t, name), (low,), atol=1e-7)


def test_sigmoid_probs_over_the_whole_range() -> None:
    """Against the logarithmic form, with rows far above, around and far below zero, and with infinities."""
    z = torch.randn(200, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 20
    for offset in (-700.0, -60.0, 0.0, 60.0, 700.0):
        want = log_scores(z + offset, "sigmoid").softmax(dim=-1)
        torch.testing.assert_close(probs(z + offset, "sigmoid"), want, rtol=1e-11, atol=1e-300)
    spread = torch.tensor([[-1e30, 0.0, 1e30, -torch.inf]])
    torch.testing.assert_close(probs(spread, "sigmoid"), torch.tensor([[0.0, 1 / 3, 2 / 3, 0.0]]))
    assert probs(torch.tensor([[torch.nan, 0.0]]), "sigmoid").isnan().all()


@pytest.mark.parametrize("name", ["sigmoid", "sqrt_softplus"])
def test_shrinking_all_scores_changes_nothing(name: str) -> None:
    """Far below zero both scores are exponential: p depends on differences alone, at any depth."""
    z = torch.tensor([[0.3, -0.2, 1.0]])
    at_40, at_80 = probs(z - 40, name), probs(z - 80, name)
    torch.testing.assert_close(at_40, at_80, rtol=2e-5, atol=0)
    assert torch.isfinite(probs(z - 1e4, name)).all()
    torch.testing.assert_close(probs(z - 1e4, name).sum(dim=1), torch.ones(1))


@pytest.mark.parametrize("name", SCORE_NAMES)
@pytest.mark.parametrize("value", [-1e4, -104.0, -18.0, 0.0, 18.0, 1e4])
def test_finite_with_gradient_everywhere(name: str, value: float) -> None:
    z = torch.full((2, 3), value, requires_grad=True)
    out = scores(z, name)
    assert torch.isfinite(out).all()
    assert torch.isfinite(torch.autograd.grad(out.sum(), z)[0]).all()


def test_low_precision_computes_in_float32() -> None:
    z = torch.randn(4, 5, dtype=torch.bfloat16)
    assert scores(z, "sigmoid").dtype == torch.float32
    assert probs(z.double(), "sigmoid").dtype == torch.float64


def test_unknown_score() -> None:
    with pytest.raises(ValueError, match="score='tanh' is unknown; choose one of 'softmax'"):
        probs(torch.zeros(1, 2), "tanh")
