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
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import ops
from trimtab.injection import Injection
from trimtab.ledger import Ledger
from trimtab.microbatch import Context, Microbatch, describe, read_call
from trimtab.scores import ScoreName

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
        gate_weight: name of the gate's weight on the router if logits are computed again in backward
            from the gate's input; None to keep the logits.
        gate_bias: name of the gate's bias, or None.
        keeps_input: the router's input is kept for backward anyway even where the gate computes in
            another dtype.
        bias_holder: module that holds the selection bias, needed only if the bias rule reads scores.
        bias_path: attribute path of the bias on its holder.
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
        gate_weight: str | None,
        gate_bias: str | None,
        keeps_input: bool,
        bias_holder: nn.Module | None = None,
        bias_path: tuple[str, ...] = (),
    ) -> None:
        self.ledger = ledger
        self.row = row
        self.handle = ledger.handle(row)
        self.context = context
        self.score = score
        self.top_k = top_k
        self.unpack = unpack
        self.repack = repack
        self.gate_weight = gate_weight
        self.gate_bias = gate_bias
        self.keeps_input = keeps_input
        self.bias_holder = bias_holder
        self.bias_path = bias_path
        self.num_maps = len(ledger.rows[row].maps)
        self.injects = bool(ledger.objectives)
        self.has_z = any(o.reads_logits for o in ledger.objectives)
        self.needs_prob_sums = any(o.needs_prob_sums for o in ledger.objectives)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the handle, which names the ledger that a copy leaves behind."""
        return {key: value for key, value in self.__dict__.items() if key != "handle"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore with a handle to the copied ledger."""
        self.__dict__.update(state)
        self.handle = self.ledger.handle(self.row)

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
    if logits_TE.dim() != 2:
        # Only where needed: gradients that meet at a view are added out of place.
        logits_TE = logits_TE.reshape(-1, logits_TE.shape[-1])
    ids_TK = ids_TK.reshape(-1, ids_TK.shape[-1])
    microbatch = state.context.current
    # Between forwards only a recomputation belongs to the last microbatch. (A compiled layer cannot ask.)
    called_alone = not (
        torch.compiler.is_compiling() or state.context.running or torch._C._current_graph_task_id() != -1
    )
    if microbatch is None or called_alone:
        # The router is called by itself, outside the model: its input is all there is to know.
        batch_shape = (
            (gate_input.shape[0], gate_input.shape[1]) if gate_input.dim() == 3 else (1, ids_TK.shape[0])
        )
        microbatch = describe(
            state.context.unit,
            active=module.training and torch.is_grad_enabled(),
            batch_shape=batch_shape,
            device=ids_TK.device,
        )
        state.context.number(microbatch)
    if not microbatch.active:
        return None
    microbatch = microbatch.to(ids_TK.device)
    # A compiled layer takes integers that it finds on modules for constants: one graph for every size.
    if not torch.compiler.is_compiling() and microbatch.num_rows != ids_TK.shape[0]:
        raise ValueError(
            f"{type(module).__name__} routed {ids_TK.shape[0]} tokens, but the model was called with "
            f"{microbatch.num_rows}; if the model routes other tokens than it is given, call it inside "
            "balancer.microbatch(batch_shape=(B, S), ...) that describes what its routers see"
        )
    num_sequences = 0 if microbatch.sequence_of_group_G is None else microbatch.num_sequences
    expert_bias_E: Any = None
    if state.bias_holder is not None:
        expert_bias_E = state.bias_holder
        for name in state.bias_path:
            expert_bias_E = getattr(expert_bias_E, name)
        expert_bias_E = expert_bias_E.detach().reshape(-1)
    counts_AGE, zero = ops.observe(
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
    )
    if not (state.injects and logits_TE.requires_grad):
        return state.repack(output, weights + zero.to(weights.dtype))
    gate_input_TD = gate_weight = gate_bias = None
    # Holding an input that nobody else holds would cost more than the logits. A frozen gate does not hold its
    # input, and under autocast gates hold a cast copy.
    if state.gate_weight is not None and not torch.is_autocast_enabled(gate_input.device.type):
        weight = getattr(module, state.gate_weight)
        held_by_gate = weight.requires_grad and gate_input.dtype == logits_TE.dtype
        if state.keeps_input or held_by_gate:
            gate_input_TD = gate_input.detach().reshape(-1, gate_input.shape[-1])
            gate_weight = weight.detach()
            if state.gate_bias is not None:
                gate_bias = getattr(module, state.gate_bias).detach()
    weights = Injection.apply(
        weights,
        zero,
        logits_TE,
        gate_input_TD,
        gate_weight,
        gate_bias,
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
    )
    return state.repack(output, weights)


def before_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Describe the microbatch that the model is called with."""
    context: Context = getattr(module, MODEL_STATE)
    if context.explicit is not None:
        active = context.counting or (torch.is_grad_enabled() and module.training)
        context.current = context.explicit.with_active(active)
    else:
        context.current = read_call(context, module, args, kwargs)
    context.number(context.current)
    context.running = True


def after_model(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Mark the output with its microbatch. Inside one compiled graph nothing needs the mark."""
    context: Context = getattr(module, MODEL_STATE)
    context.running = False
    microbatch = context.current
    if not torch.compiler.is_compiling() and microbatch is not None and microbatch.active:
        if context.ledger is not None:
            context.ledger.end_forward(int(microbatch.ticket))
        _mark(output, partial(_make_current, context, microbatch))


def _make_current(context: Context, microbatch: Microbatch, grad: Tensor) -> None:
    context.current = microbatch


def _mark(output: Any, hook: Callable[[Tensor], None]) -> None:
    """Run ``hook`` when backward reaches any tensor of an output, at any depth.

    Checkpointed layers run their forward once more in backward, when a later microbatch may have replaced
    the masks and groups that their routers read.
    """
    if isinstance(output, Tensor):
        if output.requires_grad:
            output.register_hook(hook)
    elif isinstance(output, (tuple, list)):
        for value in output:
            _mark(value, hook)
    elif isinstance(output, dict):
        for value in output.values():
            _mark(value, hook)
    elif dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            _mark(getattr(output, field.name), hook)
