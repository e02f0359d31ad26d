"""Grouped matrix multiply: one matrix per expert over rows sorted by expert.

`torch.nn.functional.grouped_mm` is the fast path. It has no float64, its shape function rejects float32
under `torch.compile`, it wants strides that are multiples of 16 bytes and it fails on expanded gradients. The
custom operators here hide all of that: the native kernel where it applies, a plain loop elsewhere, one
signature.

Shape suffixes: N rows (token-expert pairs sorted by expert), E experts of this rank, D and F the inner and
outer widths of the multiply.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_ALIGNMENT_BYTES = 16


def grouped_mm(x_ND: Tensor, w_EDF: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    """Multiply each block of rows by its expert's matrix, `y[n] = x[n] @ w[expert of n]`.

    The first `num_tokens_per_expert_E[0]` rows belong to expert 0, the next ones to expert 1, and so on.
    Experts without rows and calls without rows are ordinary. Under autocast both operands are cast as for
    `F.linear`.

    Args:
        x_ND: (N, D) floating rows sorted by expert. Gradient flows.
        w_EDF: (E, D, F) of x's dtype; a transposed view of an (E, F, D) parameter costs nothing. Gradient
            flows.
        num_tokens_per_expert_E: (E,) int64 or int32 row counts that sum to N. No gradient. The sum is checked
            on CPU and in the loop; the native CUDA path does not check, so as not to wait for the device.

    Returns:
        (N, F) rows in x's dtype, contiguous. Differentiable any number of times.

    Raises:
        ValueError: shapes or dtypes disagree, or the counts do not sum to N.
    """
    device_type = x_ND.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        # F.linear leaves float64 alone under autocast, and so does this.
        x_ND = x_ND if x_ND.dtype == torch.float64 else x_ND.to(dtype)
        w_EDF = w_EDF if w_EDF.dtype == torch.float64 else w_EDF.to(dtype)
    _check_operands(x_ND, w_EDF, num_tokens_per_expert_E)
    return _grouped_mm(x_ND, w_EDF, num_tokens_per_expert_E)


def grouped_mm_loop(x_ND: Tensor, w_EDF: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    """Multiply block by block in a plain differentiable loop: the reference for `grouped_mm`.

    Args:
        x_ND: (N, D) rows sorted by expert. Gradient flows.
        w_EDF: (E, D, F). Gradient flows.
        num_tokens_per_expert_E: (E,) integer counts that sum to N; read on the host.

    Returns:
        (N, F) rows.

    Raises:
        ValueError: the counts do not sum to N.
    """
    sizes = _host_counts(num_tokens_per_expert_E, x_ND.shape[0])
    return torch.cat([rows @ w for rows, w in zip(x_ND.split(sizes), w_EDF, strict=True)])


def grouped_rows(v_EF: Tensor, num_tokens_per_expert_E: Tensor, num_rows: int) -> Tensor:
    """Repeat each expert's vector over its rows, `y[n] = v[expert of n]` (an expert's bias).

    It is a `grouped_mm` with inputs (1, 0, ..., 0): the values are exact, and the gradient sums each expert's
    rows in a matrix multiply, in a fixed order and in float32 accumulation, where indexing would add rows one
    by one with atomics in the dtype of v.

    Args:
        v_EF: (E, F) one vector per expert. Gradient flows.
        num_tokens_per_expert_E: (E,) integer counts that sum to `num_rows`. No gradient.
        num_rows: N.

    Returns:
        (N, F) in v's dtype.
    """
    width = _ALIGNMENT_BYTES // v_EF.element_size()
    # repeat_interleave would do, but its backward is an unordered index_add over all rows of an expert.
    one_hot = F.pad(v_EF.new_ones(num_rows, 1), (0, width - 1))
    return _grouped_mm(one_hot, F.pad(v_EF.unsqueeze(1), (0, 0, 0, width - 1)), num_tokens_per_expert_E)


def _check_operands(x_ND: Tensor, w_EDF: Tensor, num_tokens_per_expert_E: Tensor) -> None:
    if x_ND.dim() != 2 or w_EDF.dim() != 3 or x_ND.shape[1] != w_EDF.shape[1]:
        raise ValueError(
            f"grouped_mm got x {tuple(x_ND.shape)} and w {tuple(w_EDF.shape)}, "
            "expected (N, D) and (E, D, F); pass an (E, F, D) weight as w.transpose(1, 2)"
        )
    if num_tokens_per_expert_E.dim() != 1 or num_tokens_per_expert_E.shape[0] != w_EDF.shape[0]:
        raise ValueError(
            f"num_tokens_per_expert_E has shape {tuple(num_tokens_per_expert_E.shape)}, expected "
            f"({w_EDF.shape[0]},): one count for each expert of w"
        )
    if x_ND.dtype != w_EDF.dtype:
        raise ValueError(
            f"grouped_mm got x in {x_ND.dtype} and w in {w_EDF.dtype}, expected one dtype; "
            "cast x to the weight's dtype or run under torch.autocast"
        )


def _host_counts(num_tokens_per_expert_E: Tensor, num_rows: int) -> list[int]:
    sizes: list[int] = num_tokens_per_expert_E.tolist()
    if sum(sizes) != num_rows:
        raise ValueError(
            f"num_tokens_per_expert_E sums to {sum(sizes)}, expected the {num_rows} rows of x; "
            "drop the rows of no expert before the multiply"
        )
    return sizes


def _native_applies(x_ND: Tensor, width_in: int, width_out: int) -> bool:
    # Both widths count: forward reads one of them contiguously and backward the other.
    if any(width * x_ND.element_size() % _ALIGNMENT_BYTES for width in (width_in, width_out)):
        return False
    if x_ND.shape[0] == 0:
        return False
    if x_ND.is_cuda:
        # Other CUDA dtypes run a loop inside torch, which waits for the device just as ours does.
        return x_ND.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x_ND.device) >= (8, 0)
    return x_ND.device.type == "cpu" and x_ND.dtype in (torch.float32, torch.bfloat16, torch.float16)


def _aligned(t: Tensor) -> Tensor:
    """Return t, copied only if the native kernel would refuse its strides or its address."""
    inner, outer = sorted(t.stride()[-2:])
    strides_fit = inner == 1 and all(
        stride * t.element_size() % _ALIGNMENT_BYTES == 0 for stride in (outer, *t.stride()[:-2])
    )
    if strides_fit and t.data_ptr() % _ALIGNMENT_BYTES == 0:
        return t
    return t.clone(memory_format=torch.contiguous_format)


def _aligned_rows(x_ND: Tensor) -> Tensor:
    # Column-major rows would start each expert's block at an address of its own, aligned or not.
    return _aligned(x_ND if x_ND.stride(1) == 1 else x_ND.contiguous())


def _offsets(num_tokens_per_expert_E: Tensor, num_rows: int) -> Tensor:
    if num_tokens_per_expert_E.device.type == "cpu":
        _host_counts(num_tokens_per_expert_E, num_rows)  # rows past the last offset would be uninitialised
    return num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)


@torch.library.custom_op("trimtab::grouped_mm", mutates_args=())
def _grouped_mm(x_ND: Tensor, w_EDF: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    if not _native_applies(x_ND, w_EDF.shape[1], w_EDF.shape[2]):
        return grouped_mm_loop(x_ND, w_EDF, num_tokens_per_expert_E)
    offsets = _offsets(num_tokens_per_expert_E, x_ND.shape[0])
    return F.grouped_mm(_aligned_rows(x_ND), _aligned(w_EDF), offs=offsets).contiguous()


@_grouped_mm.register_fake
def _(x_ND: Tensor, w_EDF: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    return x_ND.new_empty(x_ND.shape[0], w_EDF.shape[2])


@torch.library.custom_op("trimtab::grouped_mm_weight_grad", mutates_args=())
def _weight_grad(x_ND: Tensor, grad_NF: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    """Sum of outer products per expert, `x_block.T @ grad_block`, (E, D, F); 0 for an expert without rows."""
    if not _native_applies(x_ND, x_ND.shape[1], grad_NF.shape[1]):
        sizes = _host_counts(num_tokens_per_expert_E, x_ND.shape[0])
        blocks = zip(x_ND.split(sizes), grad_NF.split(sizes), strict=True)
        return torch.stack([x.T @ grad for x, grad in blocks])
    offsets = _offsets(num_tokens_per_expert_E, x_ND.shape[0])
    return F.grouped_mm(_aligned_rows(x_ND).t(), _aligned_rows(grad_NF), offs=offsets).contiguous()


@_weight_grad.register_fake
def _(x_ND: Tensor, grad_NF: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
    return x_ND.new_empty(num_tokens_per_expert_E.shape[0], x_ND.shape[1], grad_NF.shape[1])


def _save_operands(
    ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: Tensor
) -> None:
    ctx.save_for_backward(*inputs)


# Each operator's derivative is made of the two, so they can be differentiated any number of times.
def _grouped_mm_backward(ctx, grad_NF: Tensor):  # type: ignore[no-untyped-def]
    x_ND, w_EDF, num_tokens_per_expert_E = ctx.saved_tensors
    grad_x_ND = grad_w_EDF = None
    if ctx.needs_input_grad[0]:
        grad_x_ND = _grouped_mm(grad_NF, w_EDF.transpose(1, 2), num_tokens_per_expert_E)
    if ctx.needs_input_grad[1]:
        # A gradient laid out like its parameter is accumulated without another copy of the weights.
        if w_EDF.stride(1) == 1:
            grad_w_EDF = _weight_grad(grad_NF, x_ND, num_tokens_per_expert_E).transpose(1, 2)
        else:
            grad_w_EDF = _weight_grad(x_ND, grad_NF, num_tokens_per_expert_E)
    return grad_x_ND, grad_w_EDF, None


def _weight_grad_backward(ctx, grad_EDF: Tensor):  # type: ignore[no-untyped-def]
    x_ND, grad_NF, num_tokens_per_expert_E = ctx.saved_tensors
    grad_x_ND = grad_grad_NF = None
    if ctx.needs_input_grad[0]:
        grad_x_ND = _grouped_mm(grad_NF, grad_EDF.transpose(1, 2), num_tokens_per_expert_E)
    if ctx.needs_input_grad[1]:
        grad_grad_NF = _grouped_mm(x_ND, grad_EDF, num_tokens_per_expert_E)
    return grad_x_ND, grad_grad_NF, None


_grouped_mm.register_autograd(_grouped_mm_backward, setup_context=_save_operands)
_weight_grad.register_autograd(_weight_grad_backward, setup_context=_save_operands)
