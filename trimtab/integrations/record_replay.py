"""record_routing() and replay_routing(): blocks in which routers are recorded, or use recorded experts.

Shapes: T tokens, E experts, K top-k, B sequences, S length, L layers, M forwards (microbatches).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import cast

from torch import nn

from trimtab.balancer import BALANCER, Balancer
from trimtab.hooks import ROUTER_STATE, RouterState
from trimtab.host_copies import HostCopies
from trimtab.integrations.attach import attach
from trimtab.integrations.discovery import FoundRouter
from trimtab.integrations.weights_of import weighings_of
from trimtab.records import WHATS, RoutingRecords, What
from trimtab.replay import Ids, Replay, by_layer_of, replay_of
from trimtab.scale import Accumulation, GradReduction
from trimtab.taps import Taps, handle_of

Target = Balancer | nn.Module | Sequence[Balancer | nn.Module]

# A bare model has no steps that could be full.
_ANY_NUMBER = Accumulation(num_microbatches=1 << 60)


@contextlib.contextmanager
def record_routing(
    target: Target, *, what: Sequence[What] | What = ("ids",), copies: HostCopies | None = None
) -> Iterator[RoutingRecords]:
    """Record what routers make of the tokens of every forward in the block.

        with trimtab.record_routing(model, what=("ids", "weights")) as records:
            model(input_ids)
        records["model.layers.0.mlp.gate"][0].ids_TK

    Forwards in training, evaluation and ``no_grad`` are recorded, whether they count or not; what is computed
    again in backward and counting passes are not. Values are copied without history, to the host without waiting:
    what is read waits for its own copy alone. Gradients, losses and outputs do not change. Outside of a block
    nothing is computed or kept.

    Args:
        target: the balancer, or its model; a model without one is given hooks for the block, which like
            `trimtab.attach` do not reach what ran compiled before. Several where parts of a model have balancers of
            their own, as pipeline stages have.
        what: any of "logits", "scores", "ids" and "weights"; see `trimtab.records.Record`.
        copies: takes values to the host; one that is kept keeps its pinned memory. None for one of its own.

    Returns:
        A context manager whose value are the records; to be read in the block or after it.

    Raises:
        ValueError: ``what`` is something else, or two parts have layers of one name.
        RuntimeError: the model is being recorded already, or the balancer was removed.

    Warns:
        UserWarning: no router ran in the block.
    """
    kinds: tuple[What, ...] = (what,) if isinstance(what, str) else tuple(what)
    unknown = [kind for kind in kinds if kind not in WHATS]
    if unknown or not kinds:
        raise ValueError(f"what={what!r} must be one or more of {', '.join(map(repr, WHATS))}")
    with _balancers(target, "record_routing") as balancers:
        records = RoutingRecords(_names(balancers), kinds, copies or HostCopies())
        handle = handle_of(records)
        with contextlib.ExitStack() as opened:
            for balancer in balancers:
                taps = opened.enter_context(_taps(balancer))
                if taps.records is not None:
                    raise RuntimeError(
                        "record_routing(...) inside another of the same model; read what both need from one"
                    )
                taps.records = handle
                opened.callback(setattr, taps, "records", None)
            yield records
    if not records.names:
        warnings.warn(
            "record_routing(...) ended and no router has run; was the model called in the block, and attached to "
            "before its first compiled run?",
            stacklevel=3,
        )


@contextlib.contextmanager
def replay_routing(target: Target, ids: Ids) -> Iterator[None]:
    """Route the forwards in the block by given experts, one microbatch of ids for each, in order.

        with trimtab.record_routing(rollout_model) as records:
            rollout_model(input_ids)
        balancer = trimtab.attach(model, objectives)
        with trimtab.replay_routing(balancer, records):
            loss = model(input_ids, labels=labels).loss
        loss.backward()

    The experts are exactly those given. Their weights are formed of the current logits, with the router's own
    normalisation and scale, so that gradients flow as ever; losses, counts and bias updates see the experts that
    were used. Layers that are computed again in backward, in the block or after it, use them again. A counting
    pass in the block is given the same microbatches as the forwards after it.

    Args:
        target: as in `record_routing`; a model without a balancer only where no gradients are recorded, because
            its hooks end with the block.
        ids: records, or for each microbatch {layer: ids} or one (L, T, K) tensor, layers in the model's order; as a
            list, one (M, L, T, K) tensor, or alone for one microbatch. The ids of a layer are (T, K) or (B, S, K)
            integers: T tokens in the model's order, padding as well. A token without ids has -1 in all K places,
            and a layer without has None: both are routed by the router. Ids on the host are checked; of ids on
            a device only the shapes are, because reading them would wait for it.

    Raises:
        ValueError: layers, shapes or values that do not fit the model, or a router whose weights are unknown.
        RuntimeError: a routing is being replayed already; a forward has other tokens, or there are more or fewer
            forwards than microbatches.
    """
    with _balancers(target, "replay_routing") as balancers, contextlib.ExitStack() as opened:
        all_names = _names(balancers)
        by_layer = by_layer_of(ids, all_names)
        replays: list[Replay] = []
        for balancer in balancers:
            routers = [layer.router for layer in balancer.layers]
            device = next(routers[0].module.parameters()).device
            replay = replay_of(balancer.ledger.rows, by_layer, device, others=all_names)
            replay.lasts = not balancer.context.ends_with_block
            weighings = weighings_of([cast(FoundRouter, router) for router in routers])
            for router, weighing in zip(routers, weighings, strict=True):
                state: RouterState = getattr(router.module, ROUTER_STATE)
                state.weighing = weighing
            taps = opened.enter_context(_taps(balancer))
            if taps.replay is not None:
                raise RuntimeError("replay_routing(...) inside another of the same model; end that one first")
            taps.replay, taps.replay_handle = replay, handle_of(replay)
            opened.callback(_end_replay, taps)
            replays.append(replay)
        yield
        for replay in replays:
            replay.check_all_given()


def _end_replay(taps: Taps) -> None:
    taps.replay = taps.replay_handle = None


@contextlib.contextmanager
def _taps(balancer: Balancer) -> Iterator[Taps]:
    """What is open on a model, until nothing is."""
    context = balancer.context
    if context.taps is None:
        context.taps = Taps()
    taps: Taps = context.taps
    try:
        yield taps
    finally:
        if taps.records is None and taps.replay is None:
            context.taps = None


@contextlib.contextmanager
def _balancers(target: Target, name: str) -> Iterator[list[Balancer]]:
    """The balancers meant; a bare model has one for the block."""
    targets = list(target) if isinstance(target, Sequence) else [target]
    if not targets or not all(isinstance(one, Balancer | nn.Module) for one in targets):
        raise ValueError(
            f"{name}({target!r}) takes a balancer, a model, or a list of these for parts of a model"
        )
    balancers: list[Balancer] = []
    own: list[Balancer] = []
    try:
        for one in targets:
            if isinstance(one, Balancer):
                if one.model is None:
                    raise RuntimeError(
                        f"{name}(...) of a balancer that was removed; attach again, or give the model"
                    )
                balancers.append(one)
                continue
            found = _attached(one)
            if not found and any(hasattr(module, ROUTER_STATE) for module in one.modules()):
                raise RuntimeError(
                    f"{name}(...) was given a part of a model whose balancer is of the whole; give the balancer, "
                    "or the model that it is attached to"
                )
            if not found:
                reduction = GradReduction(num_ranks=1)
                found = [attach(one, [], accumulation=_ANY_NUMBER, reduction=reduction, measure_every=0)]
                found[0].context.ends_with_block = True
                own += found
            balancers += found
        yield balancers
    finally:
        for balancer in own:
            balancer.remove()


def _attached(model: nn.Module) -> list[Balancer]:
    """The balancers of a model; several if they are attached to parts of it."""
    found = (module.__dict__.get(BALANCER) for module in model.modules())
    return [balancer for balancer in found if isinstance(balancer, Balancer)]


def _names(balancers: Sequence[Balancer]) -> list[str]:
    names = [row.name for balancer in balancers for row in balancer.ledger.rows]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(
            f"two of the parts given have a layer {repeated[0]!r}; record or replay them in blocks of their own"
        )
    return names
