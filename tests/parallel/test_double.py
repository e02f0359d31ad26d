"""`double_precision` leaves no float32 in any family's forward or backward."""

import contextlib
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.hf_models import Batch, make_batch
from tests.hf_reference import Gradients, relative_error, stock_model, take_grads
from tests.parallel.double import double_precision

FAMILIES = ["deepseek_v3", "qwen3_moe", "gpt_oss", "mixtral", "llama4"]


class Casts(TorchDispatchMode):
    """Collects the operators that have a float32 tensor as argument or result."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in tree_leaves((args, kwargs, out)):
            if isinstance(value, torch.Tensor) and value.dtype == torch.float32:
                self.seen.add(str(func))
        return out


def gradients(model: Any, batch: Batch) -> Gradients:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"].reshape(-1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    loss.backward()  # type: ignore[no-untyped-call]
    return take_grads(model)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_of_a_batch_are_the_sum_over_its_halves(family: str, checkpointing: bool) -> None:
    model, _ = stock_model(family, dtype=torch.float64, experts_implementation="eager")
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    batch = make_batch(4, 16, padding=True)
    halves = [{k: v[part] for k, v in batch.items()} for part in (slice(2), slice(2, 4))]
    with double_precision(), Casts() as casts:
        whole = gradients(model, batch)
        first, second = (gradients(model, half) for half in halves)
    assert not casts.seen
    assert all(gradient.dtype == torch.float64 for gradient in whole.values())
    assert relative_error({name: first[name] + second[name] for name in first}, whole) < 1e-12
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_stock_models_cast_without_it(family: str) -> None:
    model, _ = stock_model(family, dtype=torch.float64, experts_implementation="eager")
    with contextlib.suppress(RuntimeError), Casts() as casts:  # llama4 mixes dtypes and fails
        gradients(model, make_batch(2, 16))
    assert casts.seen


def test_new_tensors_are_double_too() -> None:
    with double_precision():
        counts = torch.ones(2, dtype=torch.int64)
        made = [torch.zeros(2), counts / counts.sum(), counts.float(), torch.zeros(2, dtype=torch.float32)]
    assert [tensor.dtype for tensor in made] == [torch.float64] * 4
