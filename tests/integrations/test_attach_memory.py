"""What attach() holds between forward and backward: nothing of size [T, E], or one such tensor where told.

Shapes: T tokens, D model width, E experts.
"""

import weakref
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.hf_models import REQUIRED, Batch, E
from tests.hf_reference import OBJECTIVES, attached_grads, stock_model, with_lora
from trimtab import attach

B, S = 3, 12
T = B * S
NUM_LAYERS = 2
Held = Counter[tuple[int, torch.dtype]]


class Saved:
    """A tensor that autograd holds, for as long as it holds it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def held(model: Any, batch: Batch, autocast: bool) -> tuple[Held, int]:
    """(elements, dtype) of each storage held for backward beside the model's own and the batch, and bytes."""
    own = [*model.parameters(), *model.buffers(), *batch.values()]
    known = {tensor.untyped_storage().data_ptr() for tensor in own}
    alive: weakref.WeakSet[Saved] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        alive.add(saved)
        return saved

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss = model(**batch).loss
    storages = {}
    for saved in alive:
        storage, dtype = saved.tensor.untyped_storage(), saved.tensor.dtype
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = (storage.nbytes() // dtype.itemsize, dtype)
    num_bytes = sum(elements * dtype.itemsize for elements, dtype in storages.values())
    del loss
    return Counter(storages.values()), num_bytes


def added(family: str, dtype: torch.dtype, keep: str, autocast: bool = False) -> tuple[Held, int]:
    """What attaching every objective adds: storages of at least T E elements, and bytes of the others."""
    model, make_batch = stock_model(family, dtype=dtype, num_layers=NUM_LAYERS)
    batch = make_batch(B, S, seed=1, padding=True)
    before, _ = held(model, batch, autocast)
    balancer = attach(model, OBJECTIVES["all"], keep=keep)  # type: ignore[arg-type]
    after, _ = held(model, batch, autocast)
    balancer.remove()
    difference = after - before
    large = Counter({kind: number for kind, number in difference.items() if kind[0] >= T * E})
    small = sum(elements * dtype.itemsize * n for (elements, dtype), n in (difference - large).items())
    return large, small


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", REQUIRED)
def test_recomputing_logits_holds_nothing_large(family: str, dtype: torch.dtype) -> None:
    large, small = added(family, dtype, "input")
    assert not large
    # counts of three maps per sequence, the mask, group sizes and a handle per layer
    assert 0 < small < NUM_LAYERS * 1024


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", REQUIRED)
def test_keeping_logits_holds_one_tensor_per_layer(family: str, dtype: torch.dtype) -> None:
    large, _ = added(family, dtype, "logits")
    assert [elements for elements, _ in large] == [T * E]
    assert large.total() == NUM_LAYERS


@pytest.mark.parametrize("family", REQUIRED)
def test_autocast_keeps_logits(family: str) -> None:
    """The gate keeps a cast copy of its input there: holding the input itself would cost T D, not T E."""
    large, _ = added(family, torch.float32, "input", autocast=True)
    assert [elements for elements, _ in large] == [T * E]
    assert large.total() == NUM_LAYERS


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_frozen_gate_keeps_logits(family: str) -> None:
    """A frozen gate does not save its input, which would cost T D."""
    model, make_batch = stock_model(family)
    query = "q_proj" if family == "qwen3_moe" else "q_b_proj"
    model = with_lora(model, target_modules=[query])
    batch = make_batch(B, S, seed=1, padding=True)
    before, _ = held(model, batch, False)
    attach(model, OBJECTIVES["all"])
    after, _ = held(model, batch, False)
    large = {kind: number for kind, number in (after - before).items() if kind[0] >= T * E}
    assert large == {(T * E, torch.float32): NUM_LAYERS}


def test_nothing_is_held_after_the_step() -> None:
    """Between steps the ledger has counts, and no tensor with a token dimension."""
    model, make_batch = stock_model("deepseek_v3")
    batch = make_batch(B, S, seed=1, padding=True)
    attached_grads(model, OBJECTIVES["all"], [batch])
    balancer = attach(model, OBJECTIVES["all"], measure_every=1)
    model(**batch).loss.backward()
    balancer.step()
    for row in balancer.ledger.rows:
        assert row.counts_AE is None
        assert row.measured == []
        assert row.prior_counts_AE is not None
        assert row.prior_counts_AE.numel() < T * E
