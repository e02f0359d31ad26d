"""The two operators between a traced model and the ledger.

Shapes: T tokens, K top-k, E experts, G finest groups, A count maps.

They are opaque to torch.compile and checkpointing, and carry the three rules that keep counts right there:

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


@torch.library.custom_op("trimtab::observe", mutates_args=(), tags=_TAGS)
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
) -> tuple[Tensor, Tensor]:
    """Count one microbatch of one layer; (A, G, E) int64 and a () float32 zero. See `Ledger.observe`."""
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
        executed_GE,
    )
    return counts_AGE, torch.zeros((), dtype=torch.float32, device=counts_AGE.device)


@observe.register_fake
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
) -> tuple[Tensor, Tensor]:
    counts_AGE = ids_TK.new_empty(num_maps, num_tokens_G.shape[0], logits_TE.shape[1])
    return counts_AGE, ids_TK.new_empty((), dtype=torch.float32)


@torch.library.custom_op("trimtab::bind", mutates_args=(), tags=_TAGS)
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
) -> tuple[Tensor, Tensor]:
    """Read the targets of one layer in backward; (G, E) and (). See `Ledger.bind`."""
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


@bind.register_fake
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
