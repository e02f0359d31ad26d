"""Injected gradients equal added ones: every objective, score function and scope, in float64."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

import trimtab
from tests.toy import Batch, ToyModel, assert_grads_equal, batch, grads, reference_grads, task_loss, toy_model
from trimtab import (
    Accumulation,
    BatchWise,
    CommunicationLevel,
    DeviceLevel,
    GlobalBatch,
    ImportanceCV,
    SequenceWise,
    ZLoss,
)
from trimtab.losses import Objective
from trimtab.scores import SCORE_NAMES

OBJECTIVES: dict[str, list[Objective.Config]] = {
    "sequence": [SequenceWise.Config(coef=0.3)],
    "sequence_token": [SequenceWise.Config(coef=0.3, weighting="token")],
    "sequence_unbiased": [SequenceWise.Config(coef=0.3, assignments="unbiased")],
    "document": [SequenceWise.Config(coef=0.3, unit="document")],
    "document_token": [SequenceWise.Config(coef=0.3, unit="document", weighting="token")],
    "batch": [BatchWise.Config(coef=0.2, average_microbatches=True)],
    "batch_unbiased": [BatchWise.Config(coef=0.2, average_microbatches=True, assignments="unbiased")],
    "global": [GlobalBatch.Config(coef=0.4, counts="exact")],
    "global_unbiased": [GlobalBatch.Config(coef=0.4, counts="exact", assignments="unbiased")],
    "device": [DeviceLevel.Config(coef=0.5, num_devices=3)],
    "device_document": [DeviceLevel.Config(coef=0.5, num_devices=2, unit="document")],
    "communication": [CommunicationLevel.Config(coef=0.5, num_devices=3, max_devices_per_token=2)],
    "importance": [ImportanceCV.Config(coef=0.1)],
    "z": [ZLoss.Config(coef=0.05)],
    "all": [
        SequenceWise.Config(coef=0.3, unit="document", assignments="unbiased"),
        SequenceWise.Config(coef=0.2, weighting="token"),
        BatchWise.Config(coef=0.2, average_microbatches=True),
        GlobalBatch.Config(coef=0.4, counts="exact"),
        DeviceLevel.Config(coef=0.5, num_devices=3),
        CommunicationLevel.Config(coef=0.5, num_devices=2, max_devices_per_token=1, unit="document"),
        ImportanceCV.Config(coef=0.1),
        ZLoss.Config(coef=0.05),
    ],
}

RAGGED = [
    batch(3, 5, seed=1, padded=True, packed="position_ids"),
    batch(2, 7, seed=2, packed="position_ids"),
    batch(1, 4, seed=3, padded=True, packed="position_ids"),
]


def totals(batches: Sequence[Batch]) -> dict[str, int]:
    return {
        "num_tokens": sum(b.num_tokens for b in batches),
        "num_sequences": sum(b.num_sequences for b in batches),
        "num_documents": sum(b.num_documents for b in batches),
    }


def injected_grads(
    model: ToyModel,
    objectives: Sequence[Objective.Config],
    batches: Sequence[Batch],
    order: str = "forward_first",
    keep: str = "input",
) -> dict[str, Tensor]:
    """Gradients of one step of training with attached objectives; the model is left as it was."""
    accumulation = Accumulation(num_microbatches=len(batches), order=order)
    balancer = trimtab.attach(model, objectives, accumulation=accumulation, keep=keep, measure_every=1)
    if order == "alternating":
        balancer.start_step(**totals(batches))
    if order == "counting_pass":
        with balancer.counting_pass():
            for one in batches:
                model(**one.call)
    if order == "forward_first":
        losses = [task_loss(model, one) for one in batches]
        for loss in losses:
            loss.backward()
    else:
        for one in batches:
            task_loss(model, one).backward()
    balancer.step()
    balancer.metrics()
    balancer.remove()
    return grads(model)


@pytest.mark.parametrize("score", SCORE_NAMES)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_one_microbatch(name: str, score: str) -> None:
    model = toy_model(score=score, expert_bias=True)
    batches = [batch(3, 6, seed=5, padded=True, packed="cu_seqlens")]
    want = reference_grads(model, [c.build() for c in OBJECTIVES[name]], batches, score)
    assert_grads_equal(injected_grads(model, OBJECTIVES[name], batches), want)


@pytest.mark.parametrize("order", ["forward_first", "counting_pass"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_ragged_accumulation_is_exact(name: str, order: str) -> None:
    model = toy_model(score="sigmoid", expert_bias=True)
    want = reference_grads(model, [c.build() for c in OBJECTIVES[name]], RAGGED, "sigmoid")
    assert_grads_equal(injected_grads(model, OBJECTIVES[name], RAGGED, order), want)


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - {"global", "global_unbiased", "all"}))
def test_plain_accumulation_with_declared_totals_is_exact(name: str) -> None:
    model = toy_model(score="softmax")
    want = reference_grads(model, [c.build() for c in OBJECTIVES[name]], RAGGED, "softmax")
    assert_grads_equal(injected_grads(model, OBJECTIVES[name], RAGGED, "alternating"), want)


@pytest.mark.parametrize("score", SCORE_NAMES)
def test_keeping_logits_gives_the_same_bits(score: str) -> None:
    model = toy_model(score=score, expert_bias=True)
    from_input = injected_grads(model, OBJECTIVES["all"], RAGGED, keep="input")
    from_logits = injected_grads(model, OBJECTIVES["all"], RAGGED, keep="logits")
    for name, grad in from_input.items():
        assert torch.equal(grad, from_logits[name]), name


def test_equal_microbatches_need_no_totals() -> None:
    model = toy_model()
    batches = [batch(2, 6, seed=seed) for seed in range(3)]
    objectives = [SequenceWise.Config(coef=0.3), ZLoss.Config(coef=0.1)]
    want = reference_grads(model, [c.build() for c in objectives], batches, "softmax")
    balancer = trimtab.attach(model, objectives, accumulation=3)
    for one in batches:
        task_loss(model, one).backward()
    balancer.step()
    assert_grads_equal(grads(model), want)


def test_losses_change_gradients() -> None:
    """The comparison above can fail: without injection the gradients differ."""
    model = toy_model()
    want = reference_grads(model, [SequenceWise.Config(coef=0.3).build()], RAGGED[:1], "softmax")
    with pytest.raises(AssertionError, match="error"):
        assert_grads_equal(injected_grads(model, [], RAGGED[:1]), want)


# Reentrant checkpointing under no_grad, as in a counting pass, warns that nothing requires a gradient.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@pytest.mark.parametrize("checkpoint", ["reentrant", "nonreentrant", "selective"])
@pytest.mark.parametrize("order", ["forward_first", "alternating", "counting_pass"])
def test_checkpointing_counts_once(checkpoint: str, order: str) -> None:
    """Recomputed forwards see their own microbatch's masks and documents and are not counted again."""
    objectives = [
        SequenceWise.Config(coef=0.3, unit="document"),
        ZLoss.Config(coef=0.1),
        ImportanceCV.Config(coef=0.1),
    ]
    if order != "alternating":
        objectives.append(GlobalBatch.Config(coef=0.4, counts="exact"))
    model = toy_model(score="sigmoid", expert_bias=True)
    # Reentrant checkpointing needs an input that requires a gradient, which the embedding gives.
    want = reference_grads(model, [c.build() for c in objectives], RAGGED, "sigmoid")
    plain = counts_of(model, objectives, RAGGED, order)
    model.checkpoint = checkpoint
    assert_grads_equal(injected_grads(model, objectives, RAGGED, order), want)
    for have, expected in zip(counts_of(model, objectives, RAGGED, order), plain, strict=True):
        assert torch.equal(have, expected)


def counts_of(
    model: ToyModel, objectives: Sequence[Objective.Config], batches: Sequence[Batch], order: str
) -> list[Tensor]:
    accumulation = Accumulation(num_microbatches=len(batches), order=order)
    balancer = trimtab.attach(model, objectives, accumulation=accumulation)
    if order == "alternating":
        balancer.start_step(**totals(batches))
    if order == "counting_pass":
        with balancer.counting_pass():
            for one in batches:
                model(**one.call)
    for loss in [task_loss(model, one) for one in batches]:
        loss.backward()
    counts = [row.counts_AE[0] for row in balancer.ledger.settle()]
    grads(model)
    balancer.remove()
    total = sum(b.num_tokens for b in batches)
    assert all(int(c.sum()) == 2 * total for c in counts)
    return counts
