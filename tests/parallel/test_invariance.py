"""How a model is divided never changes what it learns: every plan against one process, in float64.

Each case is one optimiser step by the trainer's engine on its ranks. Equal to one process to rounding are the
gradient of every parameter, the loss, every logged balance loss, the counts and the next expert bias.
"""

from collections.abc import Iterable
from dataclasses import fields
from itertools import pairwise, product
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.hf_reference import relative_error
from tests.parallel.cases import (
    FACTORS,
    FAMILIES,
    Case,
    compiled_cases,
    covering_cases,
    is_possible,
    pairs_of,
    settings,
)
from tests.parallel.double import double_precision
from tests.parallel.pool import Ranks
from tests.parallel.reference import Expected, build_model, expected, forward, make_step
from tests.parallel.runner import Outcome, run_case

CASES = covering_cases()


def together(outcomes: Iterable[Outcome]) -> dict[str, torch.Tensor]:
    """Whole gradients of all stages."""
    grads: dict[str, torch.Tensor] = {}
    for outcome in outcomes:
        for name, grad in (outcome.grads or {}).items():
            assert name not in grads, f"{name} is in two stages"
            grads[name] = grad
    return grads


def observed(outcomes: Iterable[Outcome]) -> dict[str, list[int]]:
    """By layer, how many forwards each backward had seen: the same on every rank of its stage."""
    seen: dict[str, list[int]] = {}
    for outcome in outcomes:
        for name, each in outcome.seen.items():
            assert seen.setdefault(name, each) == each
    return seen


def check(outcomes: list[Outcome], want: Expected, tolerance: float) -> None:
    """Everything one process has, on every rank that has it."""
    grads = together(outcomes)
    assert grads.keys() == want.grads.keys()
    # Fused weights of experts divided over etp have one more dimension.
    grads = {name: grad.reshape(want.grads[name].shape) for name, grad in grads.items()}
    errors = {name: relative_error({name: grad}, {name: want.grads[name]}) for name, grad in grads.items()}
    assert not {name: error for name, error in errors.items() if not error < tolerance}
    assert sum(outcome.loss for outcome in outcomes) == pytest.approx(want.loss, rel=tolerance)
    assert all(outcome.replicas_agree for outcome in outcomes)
    layers: set[str] = set()
    for outcome in outcomes:
        for metrics in outcome.metrics:
            names = metrics["layers"]
            layers.update(names)
            assert metrics["num_tokens"] == [want.num_tokens] * len(names)
            for name, load in zip(names, metrics["load"], strict=True):
                counts_E = want.counts[name].double()
                assert load == pytest.approx((counts_E / counts_E.mean()).tolist(), rel=1e-12)
            assert metrics["losses"].keys() == want.losses.keys()
            for loss, values in metrics["losses"].items():
                wanted = [want.losses[loss][name] for name in names]
                assert values["value"] == pytest.approx(wanted, rel=tolerance), loss
            if (seen := metrics["count_error"]) is not None:
                assert seen == pytest.approx([want.count_error[name] for name in names], rel=1e-6, abs=1e-12)
        for name, bias_E in outcome.bias.items():
            torch.testing.assert_close(bias_E.double(), want.bias[name], rtol=tolerance, atol=tolerance)
    assert layers == want.counts.keys()
    assert {name for outcome in outcomes for name in outcome.bias} == want.bias.keys()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_plan_equals_one_process(ranks: Ranks, case: Case) -> None:
    outcomes = ranks.run(run_case, case.degrees.world_size, case, timeout=120)
    check(outcomes, expected(case, observed(outcomes)), tolerance=1e-10)


# dynamo looks at .grad of every input of a compiled layer and filters its own warning, below pytest's filter.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("case", compiled_cases(), ids=str)
def test_a_compiled_plan_equals_one_process(ranks: Ranks, case: Case) -> None:
    """To the precision of float32, in which routers, norms and softmax compute here."""
    outcomes = ranks.run(run_case, case.degrees.world_size, case, "aot_eager", timeout=300)
    check(outcomes, expected(case, observed(outcomes)), tolerance=1e-5)


# ------------------------------------------------------------------ the suite itself


def test_every_possible_pair_of_settings_is_run() -> None:
    names = list(FACTORS)
    possible: set[Any] = set()
    for values in product(*FACTORS.values()):
        given = dict(zip(names, values, strict=True))
        if is_possible(given):
            possible.update(pairs_of(given))
    covered = {pair for case in CASES for pair in pairs_of(settings(case))}
    assert covered == possible
    assert names == [field.name for field in fields(Case)]
    assert len(CASES) >= 200


def test_cases_are_the_same_in_every_process() -> None:
    assert covering_cases.__wrapped__() == CASES
    assert len({str(case) for case in CASES}) == len(CASES)


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_keeps_documents_apart(family: str) -> None:
    case = next(case for case in CASES if case.family == family and case.packed)
    with double_precision(), torch.no_grad():
        rows, model = make_step(case).microbatches[0], build_model(family, 2)
        for module in model.modules():
            # Scales queries by their place in the row, not in the document.
            module.attn_temperature_tuning = False
        logits = forward(model, rows).flatten(0, 1)
        for start, end in pairwise(rows.cu_seqlens.tolist()):
            alone = model(input_ids=rows.input_ids.reshape(1, -1)[:, start:end], use_cache=False).logits[0]
            torch.testing.assert_close(logits[start:end], alone, rtol=1e-12, atol=1e-12)


def test_reference_sees_the_settings_that_depend_on_positions() -> None:
    """With them gone the models compute something else, so a plan that got them wrong would be seen."""
    case = next(case for case in CASES if case.data == "full" and not case.packed)
    rows = make_step(case).microbatches[0]
    switched_off = {
        "gpt_oss": {"sliding_window": 1000},
        "llama4": {"attention_chunk_size": 1000},
    }
    for family, setting in switched_off.items():
        with double_precision(), torch.no_grad():
            model = build_model(family, 2)
            before = forward(model, rows)
            for name, value in setting.items():
                setattr(model.config, name, value)
            assert not torch.allclose(before, forward(model, rows))
            if family == "llama4":
                last = forward(model, rows)
                model.model.layers[1].self_attn.attn_temperature_tuning = False
                assert not torch.allclose(last, forward(model, rows))


def test_data_hold_what_is_hard() -> None:
    ragged = [case for case in CASES if case.data == "ragged" and case.packed and case.num_microbatches > 1]
    step = make_step(ragged[0])
    masks = [rows.valid_mask for rows in step.microbatches]
    assert len({int(mask.sum()) for mask in masks}) == len(masks)
    assert all((~mask.any(dim=1)).any() for mask in masks)  # a row without a valid token
    lengths = torch.cat([rows.cu_seqlens.diff() for rows in step.microbatches])
    assert lengths.min() == 1
    assert lengths.max() > 6
    rows = step.microbatches[0]
    # A label is the next token of the same document, if both count.
    shifted = F.pad(rows.input_ids[:, 1:], (0, 1))
    assert ((rows.labels == shifted) | (rows.labels == -100)).all()
    assert (rows.labels[:, :-1][rows.position_ids[:, 1:] == 0] == -100).all()
    assert (rows.labels[~rows.valid_mask] == -100).all()
