"""Stock models in float64 throughout, so that two ways to compute one gradient agree to rounding.

Model definitions cast to float32 in norms, routers, rotary angles and softmax, whatever the model's dtype:
with float64 parameters their results then depend on the order of float32 sums.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode


class _Double(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.backward:
            # A mode is off while it handles a function; backward runs models (checkpoints), so on again.
            with self:
                return _backward(*args, **(kwargs or {}))
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [torch.float64 if value is torch.float32 else value for value in args]
        kwargs = {k: torch.float64 if v is torch.float32 else v for k, v in (kwargs or {}).items()}
        return func(*args, **kwargs)


def _backward(self: Any, gradient: Any = None, *args: Any, **kwargs: Any) -> None:
    torch.autograd.backward(self, gradient, *args, **kwargs)


@contextlib.contextmanager
def double_precision() -> Iterator[None]:
    """Inside, every cast to float32 is one to float64, and so is the default of new tensors.

    Parameters and buffers must be float64 already. Backward belongs inside as well: checkpoints compute
    the forward again there.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        # Likewise `torch.autograd.backward` and `grad`: the mode is not asked.
        with mock.patch.object(torch.autograd, "has_torch_function", return_value=False), _Double():
            yield
    finally:
        torch.set_default_dtype(before)
