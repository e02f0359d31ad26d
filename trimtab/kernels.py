"""Which implementation routes on a device: Triton's kernels, or torch operators with a reason said once.

Shapes: T tokens, E experts, K top-k.
"""

import functools
import importlib
import logging
from types import ModuleType

import torch
from torch import Tensor

MAX_EXPERTS = 1024
MAX_TOP_K = 32

_logger = logging.getLogger(__name__)


def kernels_for(logits_TE: Tensor, top_k: int) -> ModuleType | None:
    """`trimtab.triton_kernels` if it serves these logits; None, with the reason logged once, if it does not."""
    if logits_TE.device.type != "cuda":
        return None
    reason = why_not(logits_TE.dtype, logits_TE.shape[1], top_k)
    if reason is not None:
        _say_once(reason)
        return None
    return _load()


def why_not(dtype: torch.dtype, num_experts: int, top_k: int) -> str | None:
    """Why the kernels cannot serve such logits on a CUDA device; None if they can."""
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"logits are {dtype}, and the kernels compute in float32"
    if num_experts > MAX_EXPERTS:
        return f"num_experts={num_experts} is more than the {MAX_EXPERTS} that the kernels hold in registers"
    if top_k > MAX_TOP_K:
        return f"top_k={top_k} is more than the {MAX_TOP_K} that the kernels serve"
    if _load() is None:
        return "Triton is not installed; pip install triton"
    return None


@functools.cache
def _load() -> ModuleType | None:
    try:
        return importlib.import_module("trimtab.triton_kernels")
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "triton":
            raise
        return None


@functools.cache
def _say_once(reason: str) -> None:
    _logger.warning("routing on CUDA runs as single torch operators instead of fused kernels: %s", reason)
