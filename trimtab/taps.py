"""Taps: where forwards are recorded (`trimtab.records`) and where recorded experts are put in (`trimtab.replay`).

Shapes: T tokens, E experts, K top-k, L layers.

While nobody asks, a model's `Context` has no taps, and routers do one comparison with None. Otherwise every
microbatch is given a `Tap` when it is numbered: what is recorded and replayed then belongs to the microbatch, as
its masks do, so that layers that run by turns, and layers that are computed again in backward, see their own.

Traced models call operators. What differs between blocks, microbatches and layers reaches these as tensors, so that
it makes no new graph: records are found by a number when the graph runs, ids are inputs, and a layer's place among
them is too.
"""

from __future__ import annotations

import itertools
import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.ledger import ledger_of
from trimtab.records import RoutingRecords
from trimtab.replay import Replay, replayed_weights

if TYPE_CHECKING:
    from trimtab.hooks import RouterState
    from trimtab.microbatch import Concatenation, Microbatch

# Operators receive numbers and tensors only; this is how they find what is open.
_open: weakref.WeakValueDictionary[int, RoutingRecords | Replay] = weakref.WeakValueDictionary()
_next_id = itertools.count()
_TAGS = (torch.Tag.cudagraph_unsafe,)


def handle_of(opened: RoutingRecords | Replay) -> Tensor:
    """A small CPU tensor that names it to operators, for as long as it lives."""
    number = next(_next_id)
    _open[number] = opened
    return torch.tensor(number, dtype=torch.int64, device="cpu")


class Tap:
    """What is done to one microbatch.

    Args:
        records: handle of what it is recorded in, or None.
        ids_LTK: experts that replace the routers' choice, or None.
        has_gaps: some of these may be -1.
    """

    def __init__(self, records: Tensor | None, ids_LTK: Tensor | None, has_gaps: bool) -> None:
        self.records = records
        self.ids_LTK = ids_LTK
        self.has_gaps = has_gaps

    def __reduce__(self) -> tuple[Any, ...]:
        """None: a copy of the model is another model."""
        return type(None), ()


class Taps:
    """What is open on one model; its attributes change as blocks begin and end."""

    def __init__(self) -> None:
        self.records: Tensor | None = None
        self.replay: Replay | None = None
        self.replay_handle: Tensor | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """None: a copy of the model is another model."""
        return type(None), ()

    def tap(self, microbatch: Microbatch, counting: bool) -> Tap | None:
        """What is done to a microbatch whose forward begins.

        Args:
            microbatch: with its ticket.
            counting: its forward is one of a counting pass: nothing to record, the step's own forward follows.
        """
        compiling = torch.compiler.is_compiling()
        if self.replay is not None and not self.replay.lasts and torch.is_grad_enabled() and not counting:
            raise RuntimeError(
                "replay_routing(...) was given a model without a balancer, whose hooks end with the block: a "
                "backward after it would compute checkpointed layers again with other experts. Attach one that "
                "stays, as in balancer = trimtab.attach(model, []), or run the model under torch.no_grad()"
            )
        # Computed again as a whole, it is the microbatch that it was.
        if not compiling and torch._C._current_graph_task_id() != -1:
            return None
        records = None if counting else self.records
        replay = self.replay
        if replay is None:
            return None if records is None else Tap(records, None, False)
        if compiling:
            assert self.replay_handle is not None
            ids_LTK = take_traced(
                self.replay_handle,
                microbatch.num_tokens_G,
                microbatch.num_rows,
                counting,
                replay.num_layers,
                replay.top_k,
                replay.dtype,
            )
        else:
            ids_LTK = replay.take(microbatch.num_rows, counting, microbatch.num_tokens_G.device)
        return Tap(records, ids_LTK, replay.has_gaps)


def inherit(before: Microbatch | Concatenation | None, now: Microbatch | Concatenation) -> None:
    """Give a forward that is computed again as a whole, in backward, the taps that it had.

    Raises:
        RuntimeError: which forward it is cannot be known.
    """
    if before is None or before.parts[0].tap is None:
        return
    if not before.active:
        raise RuntimeError(
            "the model is called again in backward inside replay_routing(...) or record_routing(...), but its "
            "first call ran without gradients, as reentrant checkpointing does, and left no trace of which forward "
            "it was; checkpoint its layers, or the whole with use_reentrant=False"
        )
    for part, part_before in zip(now.parts, before.parts, strict=True):
        part.tap = part_before.tap


def replayed_ids(state: RouterState, microbatch: Microbatch | Concatenation) -> Tensor | None:
    """(T, K) int64 experts of one layer that replace its choice, -1 where it has none; None without replay."""
    found = []
    for part in microbatch.parts:
        if part.tap is None or part.tap.ids_LTK is None:
            return None
        ids_LTK = part.tap.ids_LTK
        if torch.compiler.is_compiling():
            ids_TK = layer_ids_traced(ids_LTK, state.handle)
        else:
            ids_TK = ids_LTK[state.row].to(torch.int64)
        # Layers of one model may lie on several devices.
        ids_TK = ids_TK.to(part.num_tokens_G.device, non_blocking=True)
        found.append(ids_TK if ids_LTK.shape[-1] == state.top_k else ids_TK[:, : state.top_k])
    return found[0] if len(found) == 1 else torch.cat(found)


def record(
    state: RouterState, microbatch: Microbatch, logits_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor | None:
    """Record one layer's routing of one microbatch, if somebody asked.

    Args:
        state: of the router.
        microbatch: whose tokens they are.
        logits_TE: (T, E).
        ids_TK: (T, K).
        weights_TK: (T, K).

    Returns:
        In a traced model a () zero to add to the weights, which keeps the operator in the forward; else None.
    """
    if microbatch.tap is None or microbatch.tap.records is None:
        return None
    handle: Tensor = microbatch.tap.records
    values = logits_TE.detach(), ids_TK, weights_TK.detach()
    num_sequences = 0 if microbatch.is_part else microbatch.num_sequences
    if torch.compiler.is_compiling():
        zero: Tensor = record_traced(handle, state.handle, microbatch.ticket, *values, num_sequences)
        return zero
    _record(handle, state.handle, microbatch.ticket, *values, num_sequences)
    return None


def through(state: RouterState, microbatch: Microbatch | Concatenation, output: Any) -> Any:
    """A router's output with its replayed routing, recorded.

    Args:
        state: of the router.
        microbatch: that it ran, with taps.
        output: of the router.

    Returns:
        The output, its weights (T, K) or (T, E), and its ids (T, K).
    """
    logits_TE, weights, ids = state.unpack(output, state.top_k)
    if logits_TE.dim() != 2:
        logits_TE = logits_TE.reshape(-1, logits_TE.shape[-1])
    ids_TK = ids.reshape(-1, ids.shape[-1])
    chosen_TK = _of_chosen(state, weights, ids_TK)
    replay_ids_TK = replayed_ids(state, microbatch)
    if replay_ids_TK is not None:
        if not torch.compiler.is_compiling() and replay_ids_TK.shape[0] != ids_TK.shape[0]:
            raise RuntimeError(
                f"{state.ledger.rows[state.row].name} routed {ids_TK.shape[0]} tokens, but the ids to replay are "
                f"of {replay_ids_TK.shape[0]}, as many as the model was called with"
            )
        missing_T1 = None
        if microbatch.parts[0].tap.has_gaps:
            missing_T1 = replay_ids_TK[:, :1] < 0
            replay_ids_TK = torch.where(missing_T1, ids_TK, replay_ids_TK)
        assert state.weighing is not None
        chosen_TK = replayed_weights(logits_TE, replay_ids_TK, chosen_TK, missing_T1, state.weighing)
        ids_TK = replay_ids_TK
        given = chosen_TK if state.dense_weights else chosen_TK.reshape(weights.shape)
        output = state.replace(output, given, ids_TK.reshape(ids.shape).to(ids.dtype))
        weights = state.unpack(output, state.top_k)[1]
    for part, part_logits_TE, part_ids_TK, part_weights_TK in zip(
        microbatch.parts,
        microbatch.split(logits_TE),
        microbatch.split(ids_TK),
        microbatch.split(chosen_TK),
        strict=True,
    ):
        zero = record(state, part, part_logits_TE, part_ids_TK, part_weights_TK)
        if zero is not None:
            weights = weights + zero.to(weights.dtype)
            output = state.repack(output, weights)
    return output, weights, ids_TK


def _of_chosen(state: RouterState, weights: Tensor, ids_TK: Tensor) -> Tensor:
    """(T, K) weights of the chosen experts."""
    weights = weights.reshape(-1, weights.shape[-1])
    return weights.gather(1, ids_TK) if state.dense_weights else weights


# -------------------------------------------------------------------- operators of traced models


def _record(
    handle: Tensor,
    row_handle: Tensor,
    ticket: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    num_sequences: int,
) -> None:
    records = _open.get(int(handle))
    # In a backward pass this is a recomputation of what is recorded already. Records that nobody holds any more are
    # wanted by nobody.
    if not isinstance(records, RoutingRecords) or torch._C._current_graph_task_id() != -1:
        return
    ledger, place = ledger_of(row_handle)
    row = ledger.rows[place]
    records.add(row.name, row.score, int(ticket), num_sequences, logits_TE, ids_TK, weights_TK)


@torch.library.custom_op("trimtab::record_routing", mutates_args=(), tags=_TAGS)
def record_traced(
    handle: Tensor,
    row_handle: Tensor,
    ticket: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    num_sequences: int,
) -> Tensor:
    """Record one layer's routing; a () zero."""
    _record(handle, row_handle, ticket, logits_TE, ids_TK, weights_TK, num_sequences)
    return weights_TK.new_zeros(())


@record_traced.register_fake
def _(
    handle: Tensor,
    row_handle: Tensor,
    ticket: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    num_sequences: int,
) -> Tensor:
    return weights_TK.new_empty(())


@torch.library.custom_op("trimtab::replay_take", mutates_args=(), tags=_TAGS)
def take_traced(
    handle: Tensor,
    like: Tensor,
    num_tokens: int,
    counting: bool,
    num_layers: int,
    top_k: int,
    dtype: torch.dtype,
) -> Tensor:
    """(L, T, K) ids of the forward that begins; see `Replay.take`."""
    replay = _open.get(int(handle))
    if not isinstance(replay, Replay) or torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "a compiled model is computed again as a whole in backward inside replay_routing(...), where it is not "
            "known which forward it is; checkpoint its layers instead"
        )
    # A copy: a compiler may reuse the memory of what an operator returns.
    return replay.take(num_tokens, counting, like.device).clone()


@take_traced.register_fake
def _(
    handle: Tensor,
    like: Tensor,
    num_tokens: int,
    counting: bool,
    num_layers: int,
    top_k: int,
    dtype: torch.dtype,
) -> Tensor:
    return like.new_empty((num_layers, num_tokens, top_k), dtype=dtype)


@torch.library.custom_op("trimtab::replay_layer", mutates_args=(), tags=_TAGS)
def layer_ids_traced(ids_LTK: Tensor, row_handle: Tensor) -> Tensor:
    """(T, K) int64 ids of one layer."""
    return ids_LTK[row_handle.tolist()[1]].to(torch.int64)


@layer_ids_traced.register_fake
def _(ids_LTK: Tensor, row_handle: Tensor) -> Tensor:
    return ids_LTK.new_empty(ids_LTK.shape[1:], dtype=torch.int64)
