"""Objectives: values by hand, validation, and the pure functions under them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.counts import (
    DeviceCounts,
    ExecutedCounts,
    Reading,
    StepCounts,
    StepTotals,
    UnbiasedCounts,
    count_ids,
    load_fraction,
    sum_groups,
)
from trimtab.device_losses import CommunicationLevel, DeviceLevel
from trimtab.losses import BatchWise, GlobalBatch, ImportanceCV, SequenceWise, ZLoss
from trimtab.objective import Objective
from trimtab.reference import load_balance_loss
from trimtab.scale import Accumulation

F64 = torch.float64


def reading(counts_GE: list[list[int]], tokens_G: list[int], top_k: int = 1, **fields: object) -> Reading:
    """A microbatch that is the whole step, with executed counts only."""
    counts = torch.tensor(counts_GE, dtype=F64)
    tokens = torch.tensor(tokens_G, dtype=F64)
    groups = (tokens > 0).sum().to(F64)
    settings = dict(
        maps=(ExecutedCounts(),),
        counts_AGE=counts[None],
        num_tokens_G=tokens,
        sequence_of_group_G=None,
        num_sequences=len(tokens_G),
        top_k=top_k,
        totals=StepTotals(tokens.sum(), groups, groups, 1),
        step_counts=lambda mode: step_counts(counts.sum(0, keepdim=True), tokens.sum(), top_k),
    )
    settings.update(fields)
    return Reading(**settings)


def step_counts(counts_AE: torch.Tensor, num_tokens: torch.Tensor, top_k: int) -> StepCounts:
    return StepCounts(counts_AE, num_tokens, load_fraction(counts_AE, num_tokens, top_k))


def test_load_balance_loss_by_hand() -> None:
    # T = 2, E = 2, K = 1: both tokens to expert 0: f = (2, 0), P = (0.75, 0.25)
    probs = torch.tensor([[0.5, 0.5], [1.0, 0.0]], dtype=F64)
    assert load_balance_loss(probs, torch.tensor([2, 0]), 1).item() == pytest.approx(1.5, abs=1e-15)
    uniform = torch.full((4, 4), 0.25, dtype=F64)
    assert load_balance_loss(uniform, torch.tensor([2, 2, 2, 2]), 2).item() == 1.0


def test_load_balance_loss_shape_error() -> None:
    with pytest.raises(ValueError, match=r"counts have shape \(3,\), expected \(2,\)"):
        load_balance_loss(torch.ones(1, 2), torch.ones(3), 1)


def test_load_fraction_has_mean_one_and_empty_groups_are_zero() -> None:
    f = load_fraction(torch.tensor([[3.0, 1.0], [0.0, 0.0]]), torch.tensor([2.0, 0.0]), 2)
    assert f.tolist() == [[1.5, 0.5], [0.0, 0.0]]


def test_sequence_wise_by_hand() -> None:
    # two sequences, K = 1: f = (2, 0) and (1, 1); probability sums (1.5, 0.5) and (1, 1) over 2 tokens each
    r = reading([[2, 0], [1, 1]], [2, 2])
    loss = SequenceWise.Config(coef=0.1).build()
    torch.testing.assert_close(
        loss.targets(r), 0.1 / (2 * 2) * torch.tensor([[2.0, 0.0], [1.0, 1.0]], dtype=F64)
    )
    sums = torch.tensor([[1.5, 0.5], [1.0, 1.0]], dtype=F64)
    numerator, denominator = loss.measure(r, sums, torch.tensor(0.0))
    assert (numerator / denominator).item() == pytest.approx((1.5 + 1.0) / 2)
    # the value is linear in p, with the targets as slope
    assert (loss.targets(r) * sums).sum().item() == pytest.approx(0.1 * 1.25)


def test_weighting_by_token_and_by_sequence_differ_on_ragged_sequences() -> None:
    r = reading([[3, 0], [0, 1]], [3, 1])
    by_sequence = SequenceWise.Config(coef=1.0).build().targets(r)
    by_token = SequenceWise.Config(coef=1.0, weighting="token").build().targets(r)
    torch.testing.assert_close(by_sequence, torch.tensor([[2 / 6, 0.0], [0.0, 2 / 2]], dtype=F64))
    torch.testing.assert_close(by_token, torch.tensor([[2 / 4, 0.0], [0.0, 2 / 4]], dtype=F64))


def test_an_empty_sequence_has_no_weight() -> None:
    r = reading([[2, 0], [0, 0]], [2, 0])
    for weighting in ("sequence", "token"):
        target = SequenceWise.Config(coef=1.0, weighting=weighting).build().targets(r)
        assert target.tolist() == [[1.0, 0.0], [0.0, 0.0]]


def test_batch_and_global_by_hand() -> None:
    r = reading([[2, 0], [1, 1]], [2, 2])
    expected = torch.tensor([[1.5, 0.5]], dtype=F64) / 4
    torch.testing.assert_close(BatchWise.Config(coef=1.0).build().targets(r), expected)
    torch.testing.assert_close(GlobalBatch.Config(coef=1.0).build().targets(r), expected)


def test_device_level_is_the_mean_over_a_device() -> None:
    r = reading([[4, 0, 2, 2]], [4], top_k=2)
    target = DeviceLevel.Config(coef=1.0, num_devices=2).build().targets(r)
    # f = (2, 0, 1, 1): both devices have mean 1
    torch.testing.assert_close(target, torch.full((1, 4), 0.25, dtype=F64))


def test_communication_level_by_hand() -> None:
    # 2 tokens, K = 2, E = 4, D = 2: token 0 to experts 0 and 1, token 1 to experts 0 and 2
    ids = torch.tensor([[0, 1], [0, 2]])
    counts = DeviceCounts(2)(ids, torch.zeros(2, 4), None, None, 1)
    assert counts.tolist() == [[2, 2, 1, 1]]
    r = reading([[0] * 4], [2], maps=(DeviceCounts(2),), counts_AGE=counts[None].to(F64))
    target = CommunicationLevel.Config(coef=1.0, num_devices=2, max_devices_per_token=2).build().targets(r)
    # D / (m T) = 1/2 times (2, 1), over T = 2 tokens
    torch.testing.assert_close(target, torch.tensor([[0.5, 0.5, 0.25, 0.25]], dtype=F64))


def test_importance_cv_slope_is_its_derivative() -> None:
    sums = torch.tensor([[0.2, 1.0, 3.0], [0.5, 0.1, 0.7]], dtype=F64, requires_grad=True)
    loss = ImportanceCV.Config(coef=2.0).build()
    importance = sums.sum(dim=0)
    (want,) = torch.autograd.grad(2.0 * importance.var(correction=0) / importance.mean() ** 2, sums)
    r = reading([[0] * 3, [0] * 3], [1, 1], prob_sums_GE=sums.detach())
    torch.testing.assert_close(loss.targets(r).expand(2, 3), want)


def test_z_weight() -> None:
    r = reading([[2, 0], [1, 1]], [2, 2])
    assert ZLoss.Config(coef=0.5).build().z_weight(r).item() == 0.5 / 4
    assert SequenceWise.Config(coef=0.5).build().z_weight(r) is None


def test_unbiased_counts_are_the_top_k_of_the_logits() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 4.0]])
    executed = torch.tensor([[2, 1], [0, 2]])
    assert UnbiasedCounts()(executed, logits, None, None, 1).tolist() == [[1, 2, 1]]
    assert ExecutedCounts()(executed, logits, None, None, 1).tolist() == [[1, 1, 2]]


@given(
    num_tokens=st.integers(0, 24),
    num_experts=st.integers(1, 9),
    num_groups=st.integers(1, 5),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None)
def test_count_ids_against_a_loop(num_tokens: int, num_experts: int, num_groups: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    top_k = min(2, num_experts)
    ids = torch.randint(num_experts, (num_tokens, top_k), generator=generator)
    groups = torch.randint(num_groups, (num_tokens,), generator=generator)
    valid = torch.rand(num_tokens, generator=generator) < 0.7
    want = torch.zeros(num_groups, num_experts, dtype=torch.int64)
    for token in range(num_tokens):
        for expert in ids[token].tolist():
            want[groups[token], expert] += int(valid[token])
    assert torch.equal(count_ids(ids, num_experts, groups, valid, num_groups), want)
    values = torch.rand(num_tokens, num_experts, generator=generator, dtype=F64)
    sums = torch.zeros(num_groups, num_experts, dtype=F64).index_add_(0, groups, values)
    torch.testing.assert_close(sum_groups(values, groups, num_groups), sums)


def test_contiguous_groups_need_no_ids() -> None:
    ids = torch.tensor([[0], [1], [1], [1]])
    assert count_ids(ids, 2, None, None, 2).tolist() == [[1, 1], [0, 2]]
    assert sum_groups(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), None, 2).tolist() == [[3.0], [7.0]]


def test_bfloat16_is_summed_in_float32() -> None:
    values = torch.full((4096, 1), 1.0, dtype=torch.bfloat16)
    assert sum_groups(values, None, 1).item() == 4096.0
    assert sum_groups(values, torch.zeros(4096, dtype=torch.int64), 1).item() == 4096.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceWise.Config(coef=-1.0), r"coef=-1.0 must be a finite number, at least 0"),
        (lambda: SequenceWise.Config(coef=math.nan), r"coef=nan must be a finite number"),
        (lambda: SequenceWise.Config(coef=1, unit="row"), r"unit='row' must be 'sequence' or 'document'"),
        (lambda: SequenceWise.Config(coef=1, weighting="x"), r"weighting='x' must be 'sequence' or 'token'"),
        (lambda: SequenceWise.Config(coef=1, assignments="x"), r"assignments='x' must be 'executed'"),
        (lambda: BatchWise.Config(coef=1, assignments="x"), r"assignments='x' must be 'executed'"),
        (lambda: GlobalBatch.Config(coef=1, counts="later"), r"counts='later' must be 'exact', 'prior'"),
        (lambda: DeviceLevel.Config(coef=1, num_devices=0), r"num_devices=0 must be at least 1"),
        (
            lambda: CommunicationLevel.Config(coef=1, num_devices=2, max_devices_per_token=3),
            r"max_devices_per_token=3 must be in \[1, num_devices=2\]",
        ),
        (
            lambda: CommunicationLevel.Config(
                coef=1, num_devices=2, max_devices_per_token=1, assignments="unbiased"
            ),
            r"communication is what the router executed",
        ),
    ],
)
def test_configuration_errors(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "accumulation", "message"),
    [
        (
            BatchWise.Config(coef=1),
            Accumulation(num_microbatches=4),
            r"num_microbatches=4 balances each microbatch on its own.*GlobalBatch.*or the sequence-wise loss",
        ),
        (
            GlobalBatch.Config(coef=1, counts="exact"),
            Accumulation(num_microbatches=4),
            r"counts='exact' cannot be had with num_microbatches=4.*forward_first.*counting pass.*'prior'",
        ),
        (
            DeviceLevel.Config(coef=1, num_devices=3),
            Accumulation(),
            r"num_devices=3 must divide num_experts=8",
        ),
    ],
)
def test_objectives_that_cannot_be_had(
    config: Objective.Config, accumulation: Accumulation, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        config.build().check(8, 2, accumulation)


def test_the_same_objectives_can_be_had_otherwise() -> None:
    BatchWise.Config(coef=1).build().check(8, 2, Accumulation())
    BatchWise.Config(coef=1, average_microbatches=True).build().check(8, 2, Accumulation(num_microbatches=4))
    for order in ("forward_first", "counting_pass"):
        step = Accumulation(num_microbatches=4, order=order)
        GlobalBatch.Config(coef=1, counts="exact").build().check(8, 2, step)
