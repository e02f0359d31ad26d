"""How a stock router weighs the experts it has chosen, measured on a stand-in of it.

Shapes: T tokens (a few dozen random ones), E experts, K top-k.

To replay a routing, the weights of experts that the router did not choose must be known. Its output tells how it
weighs: by the scores at the chosen experts, plain or divided by their sum, times a factor. Which of these
reproduces its weights to rounding is found by running it (`trimtab.integrations.probe`), not looked up by name.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from trimtab.integrations.discovery import FoundRouter
from trimtab.integrations.families import Family
from trimtab.integrations.probe import Probe, RouterMismatchError, run
from trimtab.replay import Weighing
from trimtab.router import Router
from trimtab.routing import Routing
from trimtab.scores import scores

# Float32 rounding of a softmax, a sum and a division.
ROUNDING = 1e-5
# Logits so low that a small number added to a sum of their scores shows.
LOWERED = -12.0


def weighings_of(routers: Sequence[FoundRouter]) -> list[Weighing]:
    """What gives each router's own weights from its logits and ids.

    Args:
        routers: any that balancing serves. Neither they nor the global random state are touched.

    Raises:
        ValueError: weights that are none of these, or an output that cannot be given other ids; the message says
            whose.
    """
    measured: dict[Hashable, Weighing] = {}
    found = []
    for router in routers:
        if isinstance(router.module, Router):
            found.append(weighing_of(router))
            continue
        if router.kind not in measured:
            measured[router.kind] = weighing_of(router)
        found.append(measured[router.kind])
    return found


def weighing_of(router: FoundRouter) -> Weighing:
    """`weighings_of` one router."""
    module, family = router.module, router.family
    if isinstance(module, Router):
        # A copy: a compiled layer that finds one object in two places makes a graph for just that.
        return Weighing(routing=dataclasses.replace(module.routing))
    if not family.weights_follow_score:
        raise _refusal(router, "its weights do not follow the scores of the chosen experts")
    if family.probe_ones:
        raise _refusal(router, f"its weights hold a learned factor ({', '.join(family.probe_ones)})")
    try:
        probe, lower = (
            run(module, router.block, family, router.num_experts, router.top_k, shift=shift)
            for shift in (0.0, LOWERED)
        )
    except RouterMismatchError as error:
        raise _refusal(router, str(error)) from error
    _check_replace(router, probe)
    for normalize in (False, True):
        routing = Routing(top_k=router.top_k, score=router.score, normalize_top_k=normalize)
        found = Weighing(routing=routing)
        for _ in range(2):  # scale and epsilon are each measured where the other hardly shows
            plain = dataclasses.replace(found, routing=routing)(probe.logits, probe.ids).double()
            scale = _round((_weights(probe, family) / plain).mean().item(), 5e-7)
            scaled = dataclasses.replace(routing, scale=scale)
            adds = normalize and router.score != "softmax"
            found = Weighing(routing=scaled, epsilon=_epsilon(lower, family, scaled) if adds else 0.0)
        if all(
            torch.allclose(found(one.logits, one.ids).double(), _weights(one, family), rtol=ROUNDING, atol=0)
            for one in (probe, lower)
        ):
            return found
    raise _refusal(
        router,
        f"its weights are neither its {router.score} scores nor these divided by their sum, times one factor",
    )


def _weights(probe: Probe, family: Family) -> Tensor:
    """(T, K) float64 weights that the router gave."""
    weights = probe.weights.gather(1, probe.ids) if family.dense_weights else probe.weights
    return weights.double()


def _epsilon(lower: Probe, family: Family, routing: Routing) -> float:
    """What the router adds to the sum of scores: its weights sum to scale sum / (sum + epsilon)."""
    sums_T = scores(lower.logits, routing.score).gather(1, lower.ids).double().sum(dim=1)
    epsilon = (sums_T * (routing.scale / _weights(lower, family).sum(dim=1) - 1)).mean().item()
    # Below, it is rounding.
    return _round(epsilon, 1e-2) if epsilon > 0.1 * ROUNDING * sums_T.mean().item() else 0.0


def _check_replace(router: FoundRouter, probe: Probe) -> None:
    family = router.family
    given = probe.weights.gather(1, probe.ids) if family.dense_weights else probe.weights.clone()
    _, weights, ids_TK = family.unpack(family.replace(probe.output, given, probe.ids), router.top_k)
    # A dense output names experts by its weights alone.
    if not torch.equal(weights, probe.weights) or not torch.equal(ids_TK, probe.ids):
        raise _refusal(
            router,
            f"unpack(replace(output, weights, ids)) of Family(router_class={family.router_class!r}, ...) does not "
            "return these weights and ids; give the row a replace that does",
        )


def _round(value: float, rel: float) -> float:
    """The shortest decimal within a relative error: what a configuration says, and rounding blurred."""
    shorter = (float(f"{value:.{digits}g}") for digits in range(1, 18))
    return next((short for short in shorter if math.isclose(short, value, rel_tol=rel)), value)


def _refusal(router: FoundRouter, reason: str) -> ValueError:
    kind = type(router.module).__name__
    return ValueError(
        f"{router.canonical_name} ({kind}) cannot replay a routing: {reason}. Recording it works"
    )
