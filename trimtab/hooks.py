"""The hooks that balancing puts on a model: one on each router, two on the module around them.

Shapes: T tokens, E experts, K top-k, B sequences, S length, D model width.

Data flow of one training forward: the hook before the model describes the microbatch; the hook after
each router counts its ids and wraps its weights in an `Injection`; the hook after the model marks the
output, so that recomputation in backward sees the same microbatch again, and starts the sums of its counts
over ranks.

Hooks are module-level functions and their state is an attribute of the module: torch.compile then makes
one graph for all layers, and copies or pickles of the model carry their own state.
"""

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import ops
from trimtab.gate import KeptGate, kept_gate
from trimtab.host_logits import HostLogits
from trimtab.injection import Injection
from trimtab.ledger import Ledger
from trimtab.microbatch import Concatenation, Context, Microbatch, describe, read_call
from trimtab.replay import Weighing
from trimtab.score_node import ScoreGradient, find_score_node, saved_tensors_are_packed
from trimtab.scores import ScoreName, compute_dtype
from trimtab.taps import inherit, through

ROUTER_STATE = "_trimtab_router"
MODEL_STATE = "_trimtab_model"


class RouterState:
    """What the hook of one router knows.

    Args:
        ledger: where its counts go.
        row: its row there.
        context: the microbatch, shared by all routers of the model.
        score: score function.
        top_k: K.
        unpack: (output, top_k) -> (logits_TE, weights, ids_TK).
        repack: (output, weights) -> output.
        replace: (output, weights_TK, ids_TK) -> output; for replay alone.
        dense_weights: the weights are (T, E), zero where an expert is not chosen.
        gate_weight: name of the gate's weight on the router if logits are computed again in backward
            from the gate's input; None to keep the logits.
        gate_bias: name of the gate's bias, or None.
        keeps_input: the router's input is kept for backward anyway even where the gate computes in
            another dtype.
        bias_holder: module that holds the selection bias, needed only if the bias rule reads scores.
        bias_path: attribute path of the bias on its holder.
        at_scores: the gradient may be added where the router has its probabilities (`trimtab.score_node`).
        fused: the router counts and injects itself as part of its forward, so that it has no hook.
        host: where logits that are kept wait for backward; None: on the device.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        row: int,
        context: Context,
        score: ScoreName,
        top_k: int,
        unpack: Callable[[Any, int], tuple[Tensor, Tensor, Tensor]],
        repack: Callable[[Any, Tensor], Any],
        replace: Callable[[Any, Tensor, Tensor], Any],
        dense_weights: bool,
        gate_weight: str | None,
        gate_bias: str | None,
        keeps_input: bool,
        bias_holder: nn.Module | None = None,
        bias_path: tuple[str, ...] = (),
        at_scores: bool = False,
        fused: bool = False,
        host: HostLogits | None = None,
    ) -> None:
        self.ledger = ledger
        self.row = row
        self.handle = ledger.handle(row)
        self.context = context
        self.score = score
        self.top_k = top_k
        self.unpack = unpack
        self.repack = repack
        self.replace = replace
        self.dense_weights = dense_weights
        self.weighing: Weighing | None = None  # of given experts, once somebody replays
        self.gate_weight = gate_weight
        self.gate_bias = gate_bias
        self.keeps_input = keeps_input
        self.bias_holder = bias_holder
        self.bias_path = bias_path
        self.at_scores = at_scores
        self.fused = fused
        self.host = host
        self.host_device = None if host is None else host.device_type
        self.place = None if host is None else host.handle()
        self.num_maps = len(ledger.rows[row].maps)
        self.injects = bool(ledger.objectives)
        self.has_z = any(o.reads_logits for o in ledger.objectives)
        self.needs_prob_sums = any(o.needs_prob_sums for o in ledger.objectives)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the handles, which name what a copy leaves behind."""
        return {key: value for key, value in self.__dict__.items() if key not in ("handle", "place")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore with a handle to the copied ledger."""
        self.__dict__.update(state)
        self.handle = self.ledger.handle(self.row)
        self.place = None if self.host is None else self.host.handle()

    def __deepcopy__(self, memo: dict[int, Any]) -> "RouterState":
        """Copy as a part of the model; a router copied by itself would count where nobody reads."""
        if id(self.context.module) not in memo:
            raise RuntimeError(
                f"{self.ledger.rows[self.row].name}: a router with a balancer was copied without its model, as "
                "PEFT does for modules_to_save; attach after wrapping or copying, or call balancer.remove() first"
            )
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied


def after_router(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Count the router's ids, and inject the objectives' gradient into its logits."""
    state: RouterState = getattr(module, ROUTER_STATE)
    gate_input = args[0] if args else next(iter(kwargs.values()))
    logits_TE, weights, ids_TK = state.unpack(output, state.top_k)
    logits = logits_TE
    if logits_TE.dim() != 2:
        # Only where needed: gradients that meet at a view are added out of place.
        logits_TE = logits_TE.reshape(-1, logits_TE.shape[-1])
    ids_TK = ids_TK.reshape(-1, ids_TK.shape[-1])
    microbatch = microbatch_of(state, module, gate_input, ids_TK)
    tapped = microbatch.parts[0].tap is not None
    if tapped:
        output, weights, ids_TK = through(state, microbatch, output)
    if not microbatch.active:
        return output if tapped else None
    expert_bias_E = expert_bias(state)
    injects = state.injects and logits_TE.requires_grad
    parts = microbatch.parts
    at_scores = (weights, logits, logits_TE, ids_TK, expert_bias_E)
    if injects and _adds_at_scores(state, module, gate_input, parts, *at_scores):
        return output if tapped else None
    gate_input_TD, gate_weight, gate_bias = (
        kept_gate(state, module, gate_input, logits_TE) if injects else (None, None, None)
    )
    inputs = [None] * len(parts) if gate_input_TD is None else microbatch.split(gate_input_TD)
    for part, part_logits_TE, part_ids_TK, part_input_TD in zip(
        parts, microbatch.split(logits_TE), microbatch.split(ids_TK), inputs, strict=True
    ):
        weights = _balance(
            state,
            part,
            weights,
            part_logits_TE,
            part_ids_TK,
            expert_bias_E,
            (part_input_TD, gate_weight, gate_bias) if injects else None,
        )
    return state.repack(output, weights)


def current_microbatch(
    state: RouterState, module: nn.Module, gate_input: Tensor, routed: Tensor
) -> Microbatch | Concatenation | None:
    """The microbatch that a router's forward is of, on its device; None if its tokens do not count.

    See `microbatch_of`.
    """
    microbatch = microbatch_of(state, module, gate_input, routed)
    return microbatch if microbatch.active else None


def microbatch_of(
    state: RouterState, module: nn.Module, gate_input: Tensor, routed: Tensor
) -> Microbatch | Concatenation:
    """The microbatch that a router's forward is of, whether its tokens count or not; on its device if they do.

    Args:
        state: of the router.
        module: the router.
        gate_input: (B, S, D) or (T, D) what it was called with.
        routed: (T, ...) what it makes of each token.

    Raises:
        ValueError: the router saw other tokens than the model.
        RuntimeError: it is called by itself while a routing is replayed.
    """
    microbatch: Microbatch | Concatenation | None = state.context.current
    # Between forwards only a recomputation belongs to the last microbatch. (A compiled layer cannot ask.)
    called_alone = not (
        torch.compiler.is_compiling() or state.context.running or torch._C._current_graph_task_id() != -1
    )
    if microbatch is None or called_alone:
        # The router is called by itself, outside the model: its input is all there is to know.
        if state.context.taps is not None and state.context.taps.replay is not None:
            raise RuntimeError(
                f"{state.ledger.rows[state.row].name} is called by itself inside replay_routing(...), where it is "
                "not known which microbatch its tokens are; call the model that the balancer is attached to"
            )
        batch_shape = (
            (gate_input.shape[0], gate_input.shape[1]) if gate_input.dim() == 3 else (1, routed.shape[0])
        )
        microbatch = describe(
            state.context.unit,
            active=module.training and torch.is_grad_enabled(),
            batch_shape=batch_shape,
            device=routed.device,
        )
        state.context.number(microbatch)
    if microbatch.active or microbatch.parts[0].tap is not None:
        microbatch = microbatch.to(routed.device)
    if not microbatch.active:
        return microbatch
    # A compiled layer takes integers that it finds on modules for constants: one graph for every size.
    if not torch.compiler.is_compiling() and microbatch.num_rows != routed.shape[0]:
        raise ValueError(
            f"{type(module).__name__} routed {routed.shape[0]} tokens, but the model was called with "
            f"{microbatch.num_rows}; if the model routes other tokens than it is given, call it inside "
            "balancer.microbatch(batch_shape=(B, S), ...) that describes what its routers see"
        )
    return microbatch


def expert_bias(state: RouterState) -> Tensor | None:
    """(E,) selection bias if the bias rule reads it in forward."""
    if state.bias_holder is None:
        return None
    found: Any = state.bias_holder
    for name in state.bias_path:
        found = getattr(found, name)
    bias_E: Tensor = found.detach().reshape(-1)
    return bias_E


def host_place(state: RouterState, logits_TE: Tensor) -> Tensor | None:
    """Handle of where a router's logits wait on the host; None to keep them on the device."""
    return state.place if logits_TE.device.type == state.host_device else None


def _adds_at_scores(
    state: RouterState,
    module: nn.Module,
    gate_input: Tensor,
    parts: Sequence[Microbatch],
    weights: Tensor,
    logits: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    expert_bias_E: Tensor | None,
) -> bool:
    """Count, and add the gradient where the router has its probabilities; False, and nothing done, if it cannot.

    Args:
        state: of the router.
        module: the router.
        gate_input: what it was called with.
        parts: of the forward; several are kept apart by several nodes.
        weights: that the router returned.
        logits: that it returned, as they are.
        logits_TE: the same as (T, E).
        ids_TK: (T, K).
        expert_bias_E: (E,) selection bias if the bias rule reads it.
    """
    if not state.at_scores or len(parts) > 1 or torch.compiler.is_compiling() or state.ledger.returns:
        return False
    # Under checkpointing what a node has saved can be read once, and the node reads it itself.
    reads_saved = state.score != "softmax" or state.has_z or state.needs_prob_sums
    if reads_saved and saved_tensors_are_packed():
        return False
    found = find_score_node(weights, logits, state.score)
    if found is None:
        return False
    node, in_place = found
    (part,) = parts
    num_sequences = 0 if part.sequence_of_group_G is None else part.num_sequences
    counts_AGE, _ = _observe(state, part, logits_TE, ids_TK, expert_bias_E, num_sequences, True)
    gradient = ScoreGradient(
        state.ledger.rows[state.row].name,
        state.handle,
        state.score,
        part,
        num_sequences,
        counts_AGE,
        needs_prob_sums=state.needs_prob_sums,
        in_place=in_place,
        logits_dtype=logits_TE.dtype,
    )
    if state.has_z:
        gate = (
            kept_gate(state, module, gate_input, logits_TE)
            if state.score == "sigmoid"
            else (None, None, None)
        )
        gradient.keep_for_z(node, logits_TE, ids_TK, gate)
    gradient.attach(node)
    return True


def _observe(
    state: RouterState,
    microbatch: Microbatch,
    logits_TE: Tensor,
    ids_TK: Tensor,
    expert_bias_E: Tensor | None,
    num_sequences: int,
    reads: bool,
) -> tuple[Tensor, Tensor | None]:
    return ops.observe(
        state.handle,
        microbatch.ticket,
        logits_TE.detach(),
        ids_TK,
        expert_bias_E,
        microbatch.group_ids_T,
        microbatch.valid_mask_T,
        microbatch.num_tokens_G,
        microbatch.sequence_of_group_G,
        num_sequences,
        state.num_maps,
        reads=reads,
    )


def _balance(
    state: RouterState,
    microbatch: Microbatch,
    weights: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    expert_bias_E: Tensor | None,
    gate: KeptGate | None,
) -> Tensor:
    """Count one microbatch, and hang its gradient on the routing weights of the whole forward.

    Args:
        state: of the router.
        microbatch: what the tokens are.
        weights: of all tokens of the forward. Its values stay as they are.
        logits_TE: (T, E) of the microbatch. Receives the injected gradient.
        ids_TK: (T, K) of the microbatch.
        expert_bias_E: (E,) selection bias if the bias rule reads it.
        gate: input of the microbatch's tokens, weight and bias, each None if logits are kept instead; None to
            count without a gradient.
    """
    num_sequences = 0 if microbatch.sequence_of_group_G is None else microbatch.num_sequences
    reads = gate is not None
    counts_AGE, zero = _observe(state, microbatch, logits_TE, ids_TK, expert_bias_E, num_sequences, reads)
    if gate is None:
        return weights if zero is None else weights + zero.to(weights.dtype)
    returns = state.ledger.returns
    injected: Tensor = Injection.apply(
        logits_TE.new_zeros(2, dtype=compute_dtype(logits_TE.dtype)) if returns else weights,
        zero,
        logits_TE,
        *gate,
        host_place(state, logits_TE),
        counts_AGE,
        microbatch.num_tokens_G,
        microbatch.sequence_of_group_G,
        microbatch.group_ids_T,
        microbatch.valid_mask_T,
        state.handle,
        microbatch.ticket,
        num_sequences,
        state.score,
        state.has_z,
        state.needs_prob_sums,
        returns,
    )
    if returns:
        _keep_term(state, microbatch, injected)
        return weights
    return injected


def _keep_term(state: RouterState, microbatch: Microbatch, term: Tensor) -> None:
    """Keep what `trimtab.finalize` adds to the losses of the step.

    Raises:
        RuntimeError: reentrant checkpointing, whose backward alone knows the router's gradients.
    """
    row = state.ledger.rows[state.row]
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        if not any(ticket is microbatch.ticket for ticket, _ in row.terms):
            raise RuntimeError(
                f"{row.name}: losses='returned' cannot be had inside reentrant checkpointing, whose forward has no "
                "gradients to return losses with; checkpoint with use_reentrant=False, or attach with "
                "losses='injected'"
            )
        return
    row.terms.append((microbatch.ticket, term))


def before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Describe the microbatch that the model is called with."""
    context: Context = getattr(module, MODEL_STATE)
    active = context.counting or (torch.is_grad_enabled() and module.training)
    if _speaks_for_itself(context, active):
        return
    before = context.current
    if context.explicit is not None:
        context.current = context.explicit.with_active(active)
    else:
        context.current = read_call(context, module, args, kwargs)
    context.number(context.current)
    if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
        inherit(before, context.current)
    context.running = True


def _speaks_for_itself(context: Context, active: bool) -> bool:
    """Whether parts of this forward say, or have said, whose tokens they hold."""
    if context.in_run or (context.interleaved and active):
        return True
    if torch.compiler.is_compiling() or torch._C._current_graph_task_id() == -1:
        return False
    # Backward computes a part again, and its output has said whose it is.
    return context.current is not None and context.current.by_turns


def after_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Mark the output with its microbatch. Inside one compiled graph nothing needs the mark."""
    context: Context = getattr(module, MODEL_STATE)
    if context.in_run or not context.running:
        return  # the hook before the model did nothing either
    context.running = False
    microbatch = context.current
    if torch.compiler.is_compiling() or microbatch is None:
        return
    if microbatch.active and context.ledger is not None:
        for part in microbatch.parts:
            context.ledger.end_forward(int(part.ticket))
    if microbatch.active or microbatch.parts[0].tap is not None:
        mark(output, context, microbatch)


def mark(output: Any, context: Context, microbatch: Microbatch | Concatenation) -> bool:
    """See to it that recomputation in backward sees its own microbatch; whether a tensor was found.

    Checkpointed layers run their forward once more in backward, when another microbatch may have replaced the
    masks and groups that their routers read. Backward runs nodes in the order opposite to their creation, so
    it reaches the output of a part of the model before anything in it, and then stays in it to its end.

    Args:
        output: of a model or a part of it, whose tensors are found at any depth.
        context: of the model.
        microbatch: what the part ran on.
    """
    found = False
    for tensor in _tensors_of(output):
        found = True
        if tensor.requires_grad:
            tensor.register_hook(partial(_make_current, context, microbatch))
    return found


def _make_current(context: Context, microbatch: Microbatch | Concatenation, grad: Tensor) -> None:
    context.current = microbatch


def _tensors_of(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors_of(value)
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors_of(value)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            yield from _tensors_of(getattr(output, field.name))
