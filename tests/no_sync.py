"""A guard that finds where the host waits for the device, without a device.

What is on the device is on the meta device here, which has shapes and no values; what is on the host is on the CPU.
So the two are as apart as on a machine with a GPU, and code that does not wait for values does not miss them: the
guard sees every operator on its way, and every one that would make the host wait is an error, or is noted and
given a value that is made up.

On a machine with a GPU, `unsynchronised` runs the same block with PyTorch's own guard.
"""

import contextlib
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.overrides import TorchFunctionMode, enable_reentrant_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trimtab import ops

DEVICE = "meta"
_ROOT = Path(__file__).parents[1]
_HIDDEN = (str(Path(torch.__file__).parent), __file__, contextlib.__file__)

# Their results, or the sizes of their results, are values of what they are given.
_READS = {
    "_local_scalar_dense",
    "_linalg_check_errors",
    "_unique",
    "_unique2",
    "allclose",
    "bincount",
    "embedding_renorm_",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "nonzero",
    "nonzero_numpy",
    "unique_consecutive",
    "unique_dim",
}
_INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}
# The native kernels of experts read their counts on the device; what runs here is a shape. In dtypes that have no
# native kernel experts do wait, which `trimtab.grouped_mm` says.
_NOT_ENTERED = {"trimtab::grouped_mm", "trimtab::grouped_mm_weight_grad"}


class HostWaitError(AssertionError):
    """The host waited for the device."""


def _on_device(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == DEVICE


def _on_host(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cpu"


def why_it_waits(func: Any, args: Any, kwargs: Any) -> str | None:
    """Why an operator makes the host wait for the device; None if it does not.

    Args:
        func: the operator.
        args: tensors on the meta device stand for those on the device.
        kwargs: same.
    """
    name = func.overloadpacket.__name__
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if not any(map(_on_device, tensors)):
        moves = name == "_to_copy" and _is_device(kwargs.get("device")) and not kwargs.get("non_blocking")
        return "copies from the host and waits for the copy" if moves else None
    if name in _READS:
        return "reads values of the device"
    if name == "repeat_interleave" and "Tensor" in func._overloadname and kwargs.get("output_size") is None:
        return "sizes its result by values of the device; give output_size"
    if name == "histc" and (*args, 0, 0)[2:4] == (0, 0):
        return "looks for the range of values on the device; give min and max"
    if name == "_to_copy" and kwargs.get("device") == torch.device("cpu") and not kwargs.get("non_blocking"):
        return "copies to the host and waits for the copy"
    if name == "copy_" and _on_device(args[0]) != _on_device(args[1]) and not (*args, False)[2]:
        return "copies between host and device and waits for the copy"
    if name == "where" and any(map(_on_host, args)):
        return "copies a number from the host and waits for the copy; give it as a Python number"
    return _why_index_waits(args) if name in _INDEXED else None


def _why_index_waits(args: Any) -> str | None:
    indices = [index for index in args[1] if index is not None]
    if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
        return "sizes its result by a mask on the device"
    if any(map(_on_host, indices)):
        return "copies indices from the host and waits for the copy"
    if len(args) > 2 and args[2].dim() == 0:
        return "copies a number that is assigned to indexed places from the host; use index_fill_ or scatter_"
    return None


def _is_device(device: Any) -> bool:
    return device is not None and torch.device(device).type == DEVICE


class _Functions(TorchFunctionMode):
    """Sees what is no operator: data of the host that becomes a tensor on the device, and values that are shown."""

    def __init__(self, found: Callable[[str, str], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor) and not isinstance(args[-1], Tensor):
            device = kwargs.get("device")
            if _is_device(device) or (func is Tensor.new_tensor and device is None and _on_device(args[0])):
                self.found(name, "copies from the host and waits for the copy")
        elif func in (Tensor.__repr__, Tensor.__format__, Tensor.numpy) and _on_device(args[0]):
            self.found(name, "reads values of the device")
        elif func in (Tensor.__getitem__, Tensor.__setitem__) and _on_device(args[0]):
            places = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(place, list) for place in places):
                self.found(name, "copies indices from the host and waits for the copy")
        return func(*args, **kwargs)


class SyncGuard(TorchDispatchMode):
    """Refuses, or notes, operators that make the host wait for the device.

    Args:
        raises: refuse them; else note them in ``waits`` and go on with made-up values.
    """

    def __init__(self, *, raises: bool = True) -> None:
        super().__init__()
        self.raises = raises
        self.waits: Counter[str] = Counter()
        """By place and operator."""
        self._functions = _Functions(self._found)

    def __enter__(self) -> "SyncGuard":
        self._functions.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._functions.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.name().split(".")[0]
        if func.namespace == "trimtab" and name not in _NOT_ENTERED:
            # Inside an operator PyTorch is below autograd, where the parts of compound functions are not seen.
            with enable_reentrant_dispatch(), torch.no_grad(), self:
                return OPDEFS[name]._init_fn(*args, **kwargs)
        why = why_it_waits(func, args, kwargs)
        if why is not None:
            self._found(func.overloadpacket.__name__, why)
            return _made_up(func, args, kwargs)
        return func(*args, **kwargs)

    def _found(self, name: str, why: str) -> None:
        frame = _caller()
        path = Path(frame.filename)
        place = (
            path.name
            if "site-packages" in path.parts or not path.is_relative_to(_ROOT)
            else path.relative_to(_ROOT)
        )
        if self.raises:
            raise HostWaitError(f"{name} {why}: {place}:{frame.lineno}: {frame.line}")
        self.waits[f"{place} {frame.name}: {name}"] += 1


def _caller() -> traceback.FrameSummary:
    """The line outside PyTorch and this file that is running."""
    frames = traceback.extract_stack(sys._getframe(1))
    return next(frame for frame in reversed(frames) if not frame.filename.startswith(_HIDDEN))


def _made_up(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator that waits returns where it is only noted."""
    name = func.overloadpacket.__name__
    if name in ("_local_scalar_dense", "item"):
        return torch.ones((), dtype=args[0].dtype, device="cpu").item()
    if name in ("equal", "is_nonzero", "allclose"):
        return True
    if name == "_to_copy" and _on_device(args[0]):
        return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype, device="cpu")
    if name in ("_to_copy", "copy_", *_INDEXED):
        return func(*args, **kwargs)
    frame = _caller()
    raise HostWaitError(f"{name} has a result whose size cannot be made up: {frame.filename}:{frame.lineno}")


@contextlib.contextmanager
def as_in_eager(*, own_modes: int = 1) -> Iterator[None]:
    """Let routers call the ledger as they do in eager, though a mode of a test looks on.

    Args:
        own_modes: modes that look on; with more of them, as under selective checkpointing, routers do what they do
            under a mode.
    """

    def is_watched() -> bool:
        return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > own_modes

    with mock.patch.object(ops, "_is_watched", is_watched):
        yield


@contextlib.contextmanager
def simulated(*, eager: bool = True) -> Iterator[None]:
    """Code runs as it does on a device, though it is the meta device and `SyncGuard` looks on.

    Args:
        eager: routers call the ledger as in eager; else the operators of traced models.
    """
    asked = torch.is_autocast_enabled

    def is_autocast_enabled(device_type: str | None = None) -> bool:
        # PyTorch does not answer for the meta device.
        return device_type != DEVICE and (asked() if device_type is None else asked(device_type))

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "is_autocast_enabled", is_autocast_enabled))
        if eager:
            stack.enter_context(as_in_eager())
        yield


@contextlib.contextmanager
def unsynchronised(device: str, *, eager: bool = True) -> Iterator[None]:
    """A block in which the host may not wait for the device, "meta" or "cuda"."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with simulated(eager=eager), SyncGuard():
        yield


def place(value: Any, device: str) -> Any:
    """Tensors of a dictionary, or one tensor or module, on the device."""
    if isinstance(value, dict):
        return {key: place(one, device) for key, one in value.items()}
    return value if value is None else value.to(device)
