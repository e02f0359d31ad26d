"""What stands between a router and the ledger, in eager and in traced models.

Shapes: T tokens, K top-k, E experts, G finest groups, A count maps.

In eager a router calls the ledger. In a traced model, and where a mode looks at every operator as selective
checkpointing does, it calls two operators that do. They are opaque: what the ledger computes is the same whether
it counts or is asked again. They carry the three rules that keep counts right under torch.compile:

- ``observe`` also returns a zero that is added to the routing weights, which keeps it in the forward
  graph: a compiler would otherwise drop it, or run it in backward only, where its counts are not needed
  before. Whether it runs in a recomputation it can only know inside, at run time. (Declaring a mutated
  argument instead fails where the compiler saves that argument for a recomputation.)
- ``ticket`` names the forward, so that a recomputation and a backward find its counts: it is a tensor on
  the CPU, of which a compiler makes an input and not a constant.
- ``bind`` takes the incoming gradient, or a compiler could move it into forward, before the counts of
  later microbatches exist.
"""

import torch
from torch import Tensor

from trimtab.ledger import ledger_of
from trimtab.scores import compute_dtype

# A CUDA graph would replay the kernels without the Python that counts and reads.
_TAGS = (torch.Tag.cudagraph_unsafe,)


def _is_watched() -> bool:
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def observe(
    handle: Tensor,
    ticket: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    expert_bias_E: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    num_tokens_G: Tensor,
    sequence_of_group_G: Tensor | None,
    num_sequences: int,
    num_maps: int,
    executed_GE: Tensor | None = None,
    reads: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Count one microbatch of one layer; see `Ledger.observe`.

    Returns:
        (A, G, E) int64 counts, and from the operator a () float32 zero to add to the weights.
    """
    if _is_watched():
        counts_AGE, zero = observe_traced(
            handle,
            ticket,
            logits_TE,
            ids_TK,
            expert_bias_E,
            group_ids_T,
            valid_mask_T,
            num_tokens_G,
            sequence_of_group_G,
            num_sequences,
            num_maps,
            executed_GE,
            reads,
        )
        return counts_AGE, zero
    ledger, row = ledger_of(handle)
    with torch.no_grad():
        counts_AGE = ledger.observe(
            row,
            int(ticket),
            logits_TE,
            ids_TK,
            expert_bias_E,
            group_ids_T,
            valid_mask_T,
            num_tokens_G,
            sequence_of_group_G,
            num_sequences,
            executed_GE,
            reads,
            keeps=True,
        )
    return counts_AGE, None


def bind(
    grad: Tensor,
    handle: Tensor,
    ticket: Tensor,
    counts_AGE: Tensor,
    num_tokens_G: Tensor,
    sequence_of_group_G: Tensor | None,
    num_sequences: int,
    prob_sums_GE: Tensor | None,
    logits_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None]:
    """Read one layer's targets in backward: (G or 1, E) and (), or None. See `Ledger.bind`."""
    if _is_watched():
        target_GE, z_weight = bind_traced(
            grad,
            handle,
            ticket,
            counts_AGE,
            num_tokens_G,
            sequence_of_group_G,
            num_sequences,
            prob_sums_GE,
            logits_dtype,
        )
        return target_GE, z_weight
    ledger, row = ledger_of(handle)
    return ledger.bind(
        row,
        int(ticket),
        counts_AGE,
        num_tokens_G,
        sequence_of_group_G,
        num_sequences,
        prob_sums_GE,
        compute_dtype(logits_dtype),
        half=logits_dtype == torch.float16,
    )


@torch.library.custom_op("trimtab::observe", mutates_args=(), tags=_TAGS)
def observe_traced(
    handle: Tensor,
    ticket: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    expert_bias_E: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    num_tokens_G: Tensor,
    sequence_of_group_G: Tensor | None,
    num_sequences: int,
    num_maps: int,
    executed_GE: Tensor | None = None,
    reads: bool = True,
) -> tuple[Tensor, Tensor]:
    """`observe` as an operator."""
    ledger, row = ledger_of(handle)
    counts_AGE = ledger.observe(
        row,
        int(ticket),
        logits_TE,
        ids_TK,
        expert_bias_E,
        group_ids_T,
        valid_mask_T,
        num_tokens_G,
        sequence_of_group_G,
        num_sequences,
        # Copies, of what is given and what is returned: the ledger keeps counts until backward, and a compiler
        # may use the memory of either for something else as soon as its own graph is through with it.
        None if executed_GE is None else executed_GE.clone(),
        reads,
    )
    return counts_AGE.clone(), torch.zeros((), dtype=torch.float32, device=counts_AGE.device)


@observe_traced.register_fake
def _(
    handle: Tensor,
    ticket: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    expert_bias_E: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    num_tokens_G: Tensor,
    sequence_of_group_G: Tensor | None,
    num_sequences: int,
    num_maps: int,
    executed_GE: Tensor | None = None,
    reads: bool = True,
) -> tuple[Tensor, Tensor]:
    counts_AGE = ids_TK.new_empty(num_maps, num_tokens_G.shape[0], logits_TE.shape[1])
    return counts_AGE, ids_TK.new_empty((), dtype=torch.float32)


@torch.library.custom_op("trimtab::bind", mutates_args=(), tags=_TAGS)
def bind_traced(
    grad: Tensor,
    handle: Tensor,
    ticket: Tensor,
    counts_AGE: Tensor,
    num_tokens_G: Tensor,
    sequence_of_group_G: Tensor | None,
    num_sequences: int,
    prob_sums_GE: Tensor | None,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`bind` as an operator, whose results have the same shapes whatever the objectives: (G, E) and ()."""
    ledger, row = ledger_of(handle)
    dtype = compute_dtype(logits_dtype)
    target_GE, z_weight = ledger.bind(
        row,
        int(ticket),
        counts_AGE,
        num_tokens_G,
        sequence_of_group_G,
        num_sequences,
        prob_sums_GE,
        dtype,
        half=logits_dtype == torch.float16,
    )
    out_GE = counts_AGE.new_zeros(counts_AGE.shape[1:], dtype=dtype)
    if target_GE is not None:
        out_GE.copy_(target_GE)
    return out_GE, counts_AGE.new_zeros((), dtype=dtype) if z_weight is None else z_weight.clone()


@bind_traced.register_fake
def _(
    grad: Tensor,
    handle: Tensor,
    ticket: Tensor,
    counts_AGE: Tensor,
    num_tokens_G: Tensor,
    sequence_of_group_G: Tensor | None,
    num_sequences: int,
    prob_sums_GE: Tensor | None,
    logits_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(logits_dtype)
    target_GE = counts_AGE.new_empty(counts_AGE.shape[1], counts_AGE.shape[2], dtype=dtype)
    return target_GE, counts_AGE.new_empty((), dtype=dtype)
