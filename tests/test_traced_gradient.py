"""The closed form as compilers are given it: the numbers of the one that runs in eager."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab.gradient import logit_gradient
from trimtab.traced_gradient import traced_gradient

SCORES = ("softmax", "sigmoid")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


GROUPS: dict[str, dict[str, Any]] = {
    "one group": {"target_GE": randn(1, 6, seed=1), "group_ids_T": None},
    "sequences": {"target_GE": randn(4, 6, seed=1), "group_ids_T": None},
    "documents": {"target_GE": randn(3, 6, seed=1), "group_ids_T": torch.arange(20) % 3},
    "no target": {"target_GE": None, "group_ids_T": None},
}
CHOSEN = randn(20, 6, seed=4).topk(2, dim=1).indices, randn(20, 2, seed=5)


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("z_weight", [None, torch.tensor(0.3, dtype=torch.float64)], ids=["", "z"])
@pytest.mark.parametrize("masked", [False, True], ids=["", "padding"])
@pytest.mark.parametrize("chosen_TK", [None, CHOSEN], ids=["", "chosen"])
def test_it_is_the_gradient_of_eager(
    score: str,
    groups: str,
    z_weight: Tensor | None,
    masked: bool,
    chosen_TK: tuple[Tensor, Tensor] | None,
) -> None:
    logits_TE = randn(20, 6)
    valid_T = torch.arange(20) % 5 != 2 if masked else None
    given = {"z_weight": z_weight, "valid_mask_T": valid_T, "chosen_TK": chosen_TK, **GROUPS[groups]}
    want_TE = logit_gradient(logits_TE, score, **given)
    have_TE = traced_gradient(logits_TE, score, **given)
    torch.testing.assert_close(have_TE, want_TE, rtol=1e-12, atol=1e-14)
    largest_ids_T1 = logits_TE.argmax(dim=1, keepdim=True)
    known_TE = traced_gradient(logits_TE, score, **given, largest_ids_T1=largest_ids_T1)
    torch.testing.assert_close(known_TE, have_TE, rtol=0, atol=0)


def test_what_is_infinite() -> None:
    """An expert that is ruled out has no gradient, and a row that is not a number has none that is."""
    logits_TE = randn(3, 5)
    logits_TE[0, 2] = -torch.inf
    logits_TE[1, 1] = torch.nan
    weight = torch.tensor(0.1, dtype=torch.float64)
    for score in SCORES:
        have_TE = traced_gradient(logits_TE, score, randn(1, 5, seed=1), weight, None, None)
        assert have_TE[0].isfinite().all()
        assert have_TE[0, 2] == 0
        assert have_TE[1].isnan().all()
        assert have_TE[2].isfinite().all()


# Inductor imports parts of torch.jit that torch itself calls deprecated.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("score", SCORES)
def test_compiled_for_any_number_of_tokens(score: str) -> None:
    target_GE, weight = randn(2, 16, seed=1).float(), torch.tensor(0.1)

    def run(logits_TE: Tensor, valid_T: Tensor) -> Tensor:
        return traced_gradient(logits_TE, score, target_GE, weight, None, valid_T)

    compiled = torch.compile(run, fullgraph=True, dynamic=True)
    for tokens in (64, 96):
        given = randn(tokens, 16, seed=tokens).float(), torch.arange(tokens) % 7 != 3
        torch.testing.assert_close(compiled(*given), run(*given), rtol=1e-5, atol=1e-7)
    torch._dynamo.reset()
