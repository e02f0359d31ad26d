"""What must never change a gradient: the order of tokens, how a step is split, and padding."""

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trimtab
from tests.test_exactness import totals
from tests.toy import Batch, ToyModel, assert_grads_equal, batch, grads, task_loss, toy_model
from trimtab import Accumulation, DeviceLevel, GlobalBatch, SequenceWise, ZLoss
from trimtab.objective import Objective

# Losses of sequences and of the whole step: none knows of microbatches.
OBJECTIVES: list[Objective.Config] = [
    SequenceWise.Config(coef=0.3),
    SequenceWise.Config(coef=0.3, weighting="token"),
    DeviceLevel.Config(coef=0.2, num_devices=2),
    GlobalBatch.Config(coef=0.4, counts="exact"),
    ZLoss.Config(coef=0.1),
]


def step_grads(model: ToyModel, batches: list[Batch], kinds: Any) -> dict[str, Tensor]:
    order = Accumulation(num_microbatches=len(batches), order="forward_first")
    balancer = trimtab.attach(model, [OBJECTIVES[k] for k in kinds], accumulation=order, measure_every=0)
    balancer.start_step(**totals(batches))
    for loss in [task_loss(model, one) for one in batches]:
        loss.backward()
    balancer.step()
    balancer.remove()
    return grads(model)


kinds = st.sampled_from([(0, 3, 4), (1, 2, 3), (0, 2, 4), (3,), (4,)])
scores = st.sampled_from(["softmax", "sigmoid", "sqrt_softplus"])


@given(kinds=kinds, score=scores, B=st.integers(2, 5), S=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_permuting_tokens_and_sequences(kinds: Any, score: str, B: int, S: int, seed: int) -> None:
    model = toy_model(score=score, expert_bias=True)
    one = batch(B, S, seed=seed, padded=True)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(B, generator=generator), torch.randperm(S, generator=generator)
    moved = Batch(one.input_ids[rows][:, columns], one.attention_mask[rows][:, columns])
    assert_grads_equal(step_grads(model, [moved], kinds), step_grads(model, [one], kinds))


@given(kinds=kinds, score=scores, cut=st.integers(1, 4), S=st.integers(1, 6), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_splitting_into_microbatches(kinds: Any, score: str, cut: int, S: int, seed: int) -> None:
    model = toy_model(score=score, expert_bias=True)
    one = batch(5, S, seed=seed, padded=True)
    parts = [Batch(one.input_ids[part], one.attention_mask[part]) for part in (slice(0, cut), slice(cut, 5))]
    assert_grads_equal(step_grads(model, parts, kinds), step_grads(model, [one], kinds))


@given(
    kinds=kinds,
    score=scores,
    extra=st.integers(1, 4),
    rows=st.integers(0, 2),
    left=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_adding_padding(kinds: Any, score: str, extra: int, rows: int, left: bool, seed: int) -> None:
    """Padding on either side, and whole rows of it, whatever the padded tokens are."""
    model = toy_model(score=score, expert_bias=True)
    one = batch(3, 4, seed=seed, padded=True)
    noise = batch(3 + rows, 4 + extra, seed=seed + 1).input_ids
    mask = torch.zeros_like(noise)
    place = slice(extra, None) if left else slice(0, 4)
    noise[:3, place], mask[:3, place] = one.input_ids, one.attention_mask
    assert_grads_equal(step_grads(model, [Batch(noise, mask)], kinds), step_grads(model, [one], kinds))


def test_a_microbatch_of_padding_alone() -> None:
    model = toy_model()
    one = batch(3, 4, seed=0)
    empty = Batch(batch(2, 4, seed=1).input_ids, torch.zeros(2, 4, dtype=torch.int64))
    for kinds in ((0, 3, 4), (1, 2)):
        assert_grads_equal(step_grads(model, [one, empty], kinds), step_grads(model, [one], kinds))
        alone = step_grads(model, [empty], kinds)
        assert all(not grad.any() for grad in alone.values())


def test_documents_in_one_row_are_separate_sequences() -> None:
    """A packed row of documents is the batch of those documents as padded rows."""
    model = toy_model(score="sigmoid")
    lengths = [3, 5, 2]
    tokens = [batch(1, n, seed=n).input_ids[0] for n in lengths]
    packed = Batch(torch.cat(tokens)[None], cu_seqlens=torch.tensor([0, 3, 8, 10]).int())
    padded = Batch(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, dtype=torch.int64))
    for row, one in enumerate(tokens):
        padded.input_ids[row, : len(one)] = one
        padded.attention_mask[row, : len(one)] = 1

    def run(one: Batch, unit: str) -> dict[str, Tensor]:
        balancer = trimtab.attach(model, [SequenceWise.Config(coef=0.3, unit=unit)], measure_every=0)
        task_loss(model, one).backward()
        balancer.step()
        balancer.remove()
        return grads(model)

    assert_grads_equal(run(packed, "document"), run(padded, "sequence"))
