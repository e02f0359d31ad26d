"""The audit: what the optimiser really receives from balancing, and what went wrong if it is not 1.000.

Shapes: T tokens, E experts, D model width, M microbatches.

The effective coefficient of a layer is the injected gradient on its gate weight, as it stands in
``.grad`` when the optimiser would read it, divided by the reference gradient of the same step. The user
passes a function that runs one step up to, but not including, the optimiser: with all of the trainer's
scaling, accumulation and reduction in it. That function is run once without injection and once for every
layer with that layer's injection alone, so gradients of other layers' losses cannot blur the picture.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.balancer import Balancer
from trimtab.hooks import ROUTER_STATE, RouterState
from trimtab.microbatch import Microbatch
from trimtab.reference import RoutedTokens, reference_loss

TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class LayerAudit:
    """What one layer's gate received.

    Args:
        name: router.
        effective_coef: measured over reference gradient, projected on the reference; 1.000 is right.
        residual: norm of what does not point along the reference, over the norm of the reference; 0 is right.
        finding: what is wrong, in words; "exact" if nothing is.
    """

    name: str
    effective_coef: float
    residual: float
    finding: str

    @property
    def ok(self) -> bool:
        """Whether the coefficient is 1.000 and nothing else was added."""
        return abs(self.effective_coef - 1) <= TOLERANCE and self.residual <= TOLERANCE


@dataclass(frozen=True, slots=True)
class Audit:
    """Result of `audit`; ``str`` of it is a table."""

    layers: tuple[LayerAudit, ...]

    @property
    def ok(self) -> bool:
        """Whether every layer is right."""
        return all(layer.ok for layer in self.layers)

    def __str__(self) -> str:
        """One line per layer."""
        width = max(len(layer.name) for layer in self.layers)
        lines = [f"{'router':<{width}}  effective coefficient  residual  finding"]
        lines += [
            f"{layer.name:<{width}}  {layer.effective_coef:>21.4f}  {layer.residual:>8.1e}  {layer.finding}"
            for layer in self.layers
        ]
        return "\n".join(lines)


def audit(
    balancer: Balancer, run_step: Callable[[], object], *, layers: Sequence[str] | None = None
) -> Audit:
    """Measure the effective coefficient of every layer's injected gradient.

    ``run_step`` must do the same each time it is called: same batches, same random state (no dropout, or
    seeded inside), forwards and backwards of one whole step, unscaling of gradients if a scaler is used,
    and no optimiser step. Gradients are cleared before and after; `Balancer.step` is called here and the
    step's counts are discarded, so that training goes on as if nothing had run.

    With several ranks that share a step all of them call it together; the reference is of the tokens of all
    of them, whose router inputs and logits are sent to every rank for it.

    Args:
        balancer: the attached balancer; a step must not be under way.
        run_step: one step of the trainer without its optimiser.
        layers: routers to audit, by name; None for all. Each costs one more run.

    Returns:
        The audit.

    Raises:
        ValueError: no objective is attached, an unknown layer, or a gate without a gradient.
    """
    if not balancer.objectives:
        raise ValueError("there is no objective to audit; attach with at least one loss")
    names = [layer.router.canonical_name for layer in balancer.layers]
    unknown = sorted(set(layers or ()) - set(names))
    if unknown:
        raise ValueError(f"no router is called {unknown[0]!r}; they are {', '.join(names[:4])}, ...")
    chosen = [i for i, name in enumerate(names) if layers is None or name in layers]
    saved = balancer.state_dict()
    biases = [layer.router.expert_bias for layer in balancer.layers]
    saved_biases = [None if bias is None else bias.detach().clone() for bias in biases]
    frozen, balancer.bias_frozen = balancer.bias_frozen, True
    try:
        with _recording(balancer) as records:
            plain = _run(balancer, run_step, injecting=None)
        results = []
        for index in chosen:
            grads = _run(balancer, run_step, injecting=index, prior=saved)
            want = _reference(balancer, index, records[index])
            results.append(_judge(balancer, names[index], grads[index] - plain[index], want))
    finally:
        balancer.bias_frozen = frozen
        balancer.load_state_dict(saved)
        for bias, before in zip(biases, saved_biases, strict=True):
            if bias is not None and before is not None:
                bias.detach().copy_(before)
    return Audit(tuple(results))


def _state(balancer: Balancer, index: int) -> RouterState:
    state: RouterState = getattr(balancer.layers[index].router.module, ROUTER_STATE)
    return state


def _gate(balancer: Balancer, index: int) -> Tensor:
    router = balancer.layers[index].router
    weight = router.weight
    if weight is None or not weight.requires_grad:
        raise ValueError(
            f"{router.canonical_name} has no trainable gate weight to audit; a frozen "
            "router receives no balancing gradient"
        )
    return weight


def _run(
    balancer: Balancer, run_step: Callable[[], object], injecting: int | None, prior: Any = None
) -> list[Tensor]:
    """Gate gradients of one step in which only one layer, or none, injects."""
    _clear(balancer)
    states = [_state(balancer, index) for index in range(len(balancer.layers))]
    before = [state.injects for state in states]
    if prior is not None:
        balancer.load_state_dict({**prior, "bias_frozen": True})
    try:
        for index, state in enumerate(states):
            state.injects = index == injecting
        run_step()
        grads = []
        for index in range(len(states)):
            gradient = _gate(balancer, index).grad
            gradient = torch.zeros(()) if gradient is None else gradient.detach()
            # A DTensor, without the second that importing its module takes.
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            grads.append(gradient.double().clone())
        balancer.step()
    except BaseException:
        balancer.discard_step()
        raise
    finally:
        for state, injects in zip(states, before, strict=True):
            state.injects = injects
        _clear(balancer)
    return grads


def _clear(balancer: Balancer) -> None:
    assert balancer.model is not None
    for parameter in balancer.model.parameters():
        parameter.grad = None


@dataclass(slots=True)
class _Record:
    gate_input_TD: Tensor
    logits_TE: Tensor
    ids_TK: Tensor
    microbatch: Microbatch


@contextlib.contextmanager
def _recording(balancer: Balancer) -> Iterator[list[list[_Record]]]:
    """Detached gate inputs, logits and ids of every real training forward, per layer."""
    records: list[list[_Record]] = [[] for _ in balancer.layers]
    handles = []
    for index, layer in enumerate(balancer.layers):

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, index: int = index) -> None:
            state = _state(balancer, index)
            microbatch = state.context.current
            recomputing = torch._C._current_graph_task_id() != -1
            if microbatch is None or not microbatch.active or recomputing or state.context.counting:
                return
            gate_input = args[0] if args else next(iter(kwargs.values()))
            logits_TE, _, ids_TK = state.unpack(output, state.top_k)
            rows = (
                gate_input.detach().reshape(-1, gate_input.shape[-1]).double(),
                logits_TE.detach().reshape(-1, logits_TE.shape[-1]).double(),
                ids_TK.reshape(-1, ids_TK.shape[-1]),
            )
            for part, own in zip(
                microbatch.parts, zip(*map(microbatch.split, rows), strict=True), strict=True
            ):
                gate_input_TD, logits_TE, ids_TK = own
                records[index].append(_Record(gate_input_TD, logits_TE, ids_TK, part))

        handles.append(layer.router.module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def _reference(balancer: Balancer, index: int, records: list[_Record]) -> Tensor:
    """Gate gradient of the written-out objectives with exact counts, in float64, of all ranks' tokens."""
    group = balancer.ranks.tokens
    for record in records:
        record.logits_TE.requires_grad_()
    own = [_routed(record, balancer) for record in records]
    ranks = [own]
    if group is not None:
        everybody: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(everybody, [_cpu(one) for one in own], group=group)
        ranks = [own if rank == group.rank() else theirs for rank, theirs in enumerate(everybody)]
    device = records[0].logits_TE.device
    # Microbatch m is what all ranks process together in one forward; or each data rank on its own.
    together = [_join([rank[m] for rank in ranks], device) for m in range(len(own))]
    apart = [_join(part, device) for m in range(len(own)) for part in _by_data_rank([r[m] for r in ranks])]
    score = balancer.layers[index].router.score
    total = sum(
        reference_loss(objective, apart if objective.local else together, score)
        for objective in balancer.objectives
    )
    assert isinstance(total, Tensor)
    slopes = torch.autograd.grad(total, [record.logits_TE for record in records])
    pairs = zip(slopes, records, strict=True)
    want = sum(slope.T @ record.gate_input_TD for slope, record in pairs)
    assert isinstance(want, Tensor)
    if group is not None:
        torch.distributed.all_reduce(want, group=group)
    return want


def _routed(record: _Record, balancer: Balancer) -> RoutedTokens:
    """One microbatch of this rank; its sequences are numbered apart from those of other data ranks."""
    m = record.microbatch
    device = record.logits_TE.device
    valid_T = torch.ones(m.num_rows, dtype=torch.bool, device=device)
    valid_T = valid_T if m.valid_mask_T is None else m.valid_mask_T
    if m.group_ids_T is None:
        sequence_T = torch.arange(m.num_rows, device=device) // max(m.num_rows // max(m.num_sequences, 1), 1)
        document_T = sequence_T
    else:
        document_T = m.group_ids_T
        sequence_T = document_T
        if m.sequence_of_group_G is not None:
            sequence_T = m.sequence_of_group_G[document_T]
    group = balancer.ranks.sequence
    several = balancer.ranks.tokens is not None
    first = torch.distributed.get_process_group_ranks(group)[0] if group is not None else _rank(several)
    offset = first * _NUMBERS
    return RoutedTokens(record.logits_TE, record.ids_TK, sequence_T + offset, document_T + offset, valid_T)


# More sequences and documents than one data rank has in a microbatch.
_NUMBERS = 1 << 32


def _rank(several: bool) -> int:
    return torch.distributed.get_rank() if several else 0


def _cpu(one: RoutedTokens) -> RoutedTokens:
    fields = (one.logits_TE.detach(), one.ids_TK, one.sequence_T, one.document_T, one.valid_T)
    return RoutedTokens(*(tensor.cpu() for tensor in fields))


def _join(parts: Sequence[RoutedTokens], device: torch.device) -> RoutedTokens:
    """Tokens of several ranks as one microbatch."""
    names = ("logits_TE", "ids_TK", "sequence_T", "document_T", "valid_T")
    return RoutedTokens(*(torch.cat([getattr(part, name).to(device) for part in parts]) for name in names))


def _by_data_rank(parts: Sequence[RoutedTokens]) -> list[list[RoutedTokens]]:
    """Parts of one microbatch, those of ranks that share sequences together."""
    found: dict[int, list[RoutedTokens]] = {}
    for part in parts:
        key = int(part.sequence_T[0]) // _NUMBERS if len(part.sequence_T) else -1
        found.setdefault(key, []).append(part)
    return list(found.values())


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _judge(balancer: Balancer, name: str, have: Tensor, want: Tensor) -> LayerAudit:
    norm = want.norm()
    if not norm > 0:
        return LayerAudit(name, float("nan"), 0.0, "the reference gradient is zero: nothing to measure")
    ratio = ((have * want).sum() / norm**2).item()
    residual = ((have - ratio * want).norm() / norm).item() if have.dim() else 0.0
    return LayerAudit(name, ratio, residual, _explain(balancer, ratio, residual))


def _explain(balancer: Balancer, ratio: float, residual: float) -> str:
    """Name the fault that gives such a ratio."""
    microbatches = balancer.ledger.num_microbatches
    ranks = max(balancer.reduction.num_ranks, _world_size())
    if residual > 10 * TOLERANCE and residual > 0.01 * abs(ratio):
        return (
            "the gradient points elsewhere: counts of the step are not the final ones (counts='prior' or "
            "'running'), microbatches differ in size and start_step was not told the totals, a second auxiliary "
            "loss is active, or run_step is not repeatable"
        )
    if abs(ratio) < 1e-7:
        return "nothing arrives: the router's weights are detached, or its output is not used"
    causes = [
        (1.0, "exact"),
        (
            1 / microbatches,
            "divided by the number of microbatches: set GradReduction(microbatches='mean') and follow the "
            "loss, or divisor=M if gradients are divided",
        ),
        (
            float(microbatches),
            "multiplied by the number of microbatches: say GradReduction(microbatches='sum')",
        ),
        (1 / ranks, "divided by the number of ranks: set GradReduction(ranks='mean', num_ranks=R)"),
        (float(ranks), "multiplied by the number of ranks: gradients are summed, so use ranks='sum'"),
    ]
    for value, cause in causes:
        if abs(ratio - value) <= TOLERANCE * value:
            return cause
    return (
        "scaled by a factor that is neither microbatches nor ranks: a loss scale that Balancer.follow does not "
        "see, or a divisor missing in GradReduction"
    )
