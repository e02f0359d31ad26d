"""Recomputation and compiler settings of schedules that split backward."""

import contextlib
import os
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from trimtab.parallel.zero_bubble import keep_microbatch, zero_bubble_compile_settings


def times_current(context: Any, seen: list[Any]) -> Any:
    def layer(x: Tensor) -> Tensor:
        seen.append(context.current)
        return torch.mm(x, x).sin() * context.current

    return layer


@pytest.mark.parametrize("selective", [False, True])
def test_recomputation_sees_the_microbatch_of_its_forward(selective: bool) -> None:
    context = SimpleNamespace(current=2.0)
    contexts: list[Any] = []
    context_fn = None
    if selective:
        context_fn = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    keep = keep_microbatch(contexts, context_fn)
    contexts.append(context)  # a balancer that is attached after checkpointing was switched on
    seen: list[Any] = []
    x = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    (want,) = torch.autograd.grad(2.0 * torch.mm(x, x).sin().sum(), x)
    out = checkpoint(times_current(context, seen), x, use_reentrant=False, context_fn=keep)
    context.current = 5.0
    for _ in range(2):  # zero bubble goes through one graph more than once
        (grad,) = torch.autograd.grad(out.sum(), x, retain_graph=True)
        torch.testing.assert_close(grad, want)
        assert context.current == 5.0
    assert seen == [2.0] * 3


def test_the_microbatch_comes_back_after_an_error() -> None:
    context = SimpleNamespace(current=1)
    _, recompute = keep_microbatch([context])()
    context.current = 2
    with contextlib.suppress(KeyError), recompute:
        assert context.current == 1
        raise KeyError
    assert context.current == 2


def test_compile_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    before = torch._functorch.config.donated_buffer
    with zero_bubble_compile_settings():
        assert torch._functorch.config.donated_buffer is False
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        assert cache_dir() != str(tmp_path)
    assert torch._functorch.config.donated_buffer is before
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)


def test_compile_settings_leave_no_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with zero_bubble_compile_settings():
        assert "TORCHINDUCTOR_CACHE_DIR" in os.environ
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
