"""Documents of packed rows: room for them is known without reading, and more of it than needed changes nothing."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import trimtab
from tests.toy import ToyModel, batch, grads, toy_model
from trimtab import CommunicationLevel, GlobalBatch, SequenceWise, ZLoss
from trimtab.counts import batch_sizes
from trimtab.microbatch import Microbatch, describe

DOCUMENTS = [
    SequenceWise.Config(coef=0.5, unit="document"),
    CommunicationLevel.Config(coef=0.3, num_devices=2, max_devices_per_token=1, weighting="token"),
    GlobalBatch.Config(coef=0.2),
    ZLoss.Config(coef=0.1),
]


def described(B: int, S: int, **given: Any) -> Microbatch:
    return describe("document", active=True, batch_shape=(B, S), device=torch.device("cpu"), **given)


@st.composite
def packed_rows(draw: st.DrawFn) -> tuple[int, int, Tensor]:
    """B, S and offsets from 0, to the last token or not as far."""
    B, S = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    inner = draw(st.sets(st.integers(1, B * S), max_size=6))
    return B, S, torch.tensor([0, *sorted(inner)], dtype=torch.int32)


@settings(deadline=None, max_examples=100)
@given(packed_rows())
def test_room_for_every_document(rows: tuple[int, int, Tensor]) -> None:
    B, S, cu_seqlens = rows
    found = described(B, S, cu_seqlens=cu_seqlens)
    T, offsets = B * S, set(cu_seqlens.tolist())
    starts_T = [t in offsets or t % S == 0 for t in range(T)]
    document_T = torch.tensor(starts_T).cumsum(0) - 1
    assert torch.equal(found.group_ids_T, document_T)
    assert sum(starts_T) <= len(found.num_tokens_G) <= min(len(cu_seqlens) - 1 + B, T)
    num_tokens_G, sequence_of_group_G = found.num_tokens_G.tolist(), found.sequence_of_group_G.tolist()
    for group in range(len(num_tokens_G)):
        members = (document_T == group).nonzero().flatten().tolist()
        assert num_tokens_G[group] == len(members)
        assert {t // S for t in members} <= {sequence_of_group_G[group]}
    # Room that no document needs is no document.
    assert batch_sizes(found.num_tokens_G, found.sequence_of_group_G, B).tolist() == [T, B, sum(starts_T)]


def step(
    model: ToyModel, fused: bool, mask: Tensor, ids: Tensor, **given: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    balancer = trimtab.attach(model, DOCUMENTS, accumulation=2, fused=fused, measure_every=1)
    for _ in range(2):
        with balancer.microbatch(valid_mask=mask, **given):
            model(ids).square().mean().backward()
    balancer.step()
    result = grads(model), balancer.metrics()
    balancer.remove()
    return result


@pytest.mark.parametrize("packed", ["cu_seqlens", "position_ids"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "hooks"])
def test_more_room_changes_nothing(packed: str, fused: bool) -> None:
    """Gradients and metrics to the bit, whatever the bound."""
    one = batch(2, 8, seed=3, padded=True, packed=packed)
    given = {packed: getattr(one, packed)}
    exact = int(one.document_T[-1]) + 1
    model = toy_model()
    want = step(model, fused, one.attention_mask, one.input_ids, **given)
    for bound in (exact, exact + 3, one.input_ids.numel()):
        have = step(model, fused, one.attention_mask, one.input_ids, num_documents=bound, **given)
        for name, grad in want[0].items():
            assert torch.equal(have[0][name], grad), name
        assert have[1] == want[1]


@pytest.mark.parametrize("packed", ["cu_seqlens", "position_ids"])
def test_too_little_room_is_refused(packed: str) -> None:
    one = batch(2, 8, seed=3, packed=packed)
    exact = int(one.document_T[-1]) + 1
    balancer = trimtab.attach(toy_model(), DOCUMENTS)
    with pytest.raises(ValueError, match=f"num_documents={exact - 1}, but there are {exact}; give the most"):
        balancer.microbatch(batch_shape=(2, 8), num_documents=exact - 1, **{packed: getattr(one, packed)})


def test_no_token_is_no_document() -> None:
    for B, S in ((0, 4), (2, 0)):
        found = described(B, S, cu_seqlens=torch.tensor([0]))
        assert found.num_tokens_G.tolist() == []
