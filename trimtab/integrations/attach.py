"""attach(): balancing on any model whose routers can be found."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from trimtab.balancer import BALANCER, Balancer
from trimtab.bias import BiasRule
from trimtab.finalize import Losses
from trimtab.hooks import ROUTER_STATE
from trimtab.host_copies import HostCopies
from trimtab.host_logits import HostLogits
from trimtab.integrations.discovery import (
    FoundRouter,
    context_module,
    discover,
    stock_aux_loss_active,
    stock_aux_loss_at_call,
    verify,
)
from trimtab.integrations.families import Family
from trimtab.objective import Objective
from trimtab.ranks import TokenRanks
from trimtab.router import Router
from trimtab.scale import Accumulation, GradReduction

Keep = Literal["input", "logits", "host"]


def attach(
    model: nn.Module,
    objectives: Sequence[Objective.Config],
    *,
    bias: BiasRule.Config | None = None,
    accumulation: Accumulation | int = 1,
    reduction: GradReduction | None = None,
    ranks: TokenRanks | None = None,
    families: Mapping[str, Family | None] | None = None,
    keep: Keep = "input",
    host_copies: HostCopies | None = None,
    fused: bool = True,
    measure_every: int = 10,
    losses: Losses = "injected",
) -> Balancer:
    """Attach balancing to every router of a model; forward results do not change.

    Gradients of the objectives are added inside backward, so there is no loss to add, in any trainer.
    After each optimiser step call `Balancer.step`. A model that has run compiled must be attached to before
    its first compiled run, or after ``torch.compiler.reset()``: compiled graphs do not see later hooks.

    Args:
        model: a Hugging Face MoE model, a model of `trimtab.MoE` layers, or one wrapped by PEFT or
            torch.compile. Attach after wrapping with PEFT, which may copy routers.
        objectives: losses, for example ``[SequenceWise.Config(coef=1e-4), ZLoss.Config(coef=1e-3)]``.
        bias: rule for expert biases, for routers that have one.
        accumulation: microbatches per optimiser step, as a number or with their order.
        reduction: how the trainer reduces gradients over ranks and microbatches; None for one process.
            Required where torch.distributed runs several.
        ranks: process groups of the ranks that share the tokens of a step and of a sequence, which counts are
            summed over; None for all ranks if ``reduction`` says that all share a step.
        families: rows for router classes that the table of families lacks, by class name; None as a row
            leaves that class alone.
        keep: what backward needs of a router: "input" holds no [T, E] tensor: the gradient is added at the
            router's own softmax (`trimtab.score_node`), or where it has none, the logits are computed again from
            the gate's input, which is kept anyway; "logits" keeps the logits, one [T, E] tensor
            per layer, and saves one matrix product of the gate, about a third of the gate's own cost
            (`benchmarks/RESULTS.md`). Gates that are not plain linear layers, and
            gates that are frozen or run under autocast and so do not keep their input, keep their logits.
            "host" keeps them in pinned host memory: they are copied beside the forward, and back beside the
            backward. On the CPU, in checkpointed layers and under other hooks on saved tensors it is "logits".
        host_copies: makes the copies for "host", and bounds the memory; None for one with defaults.
        fused: let `trimtab.Router` run choice, weights, counts and, in backward, the gradients of its weights
            and of all objectives as one node (`trimtab.fused`). Other routers get a hook, and so does it with
            False, to the same gradients.
        measure_every: steps between measurements of loss values, router entropy and logits; 0 for never.
        losses: "injected" adds gradients during backward. "returned" leaves them to `Balancer.finalize`, whose
            losses the caller adds to its own; the step's forwards then all run before its first backward.
            Routers of trimtab are hooked as well, and all losses are measured in each step.

    Returns:
        The balancer.

    Raises:
        ValueError: ``host_copies`` without keep="host"; several processes without ``reduction``, ``ranks``
            that disagree with it, or an objective that cannot be summed over ranks; no router, a router that
            cannot be served, an objective or rule that does not fit it, a score function that the router does
            not have, a stock auxiliary loss that is active as well, or a balancer there already.
    """
    if keep not in ("input", "logits", "host"):
        raise ValueError(f"keep={keep!r} must be 'input', 'logits' or 'host'")
    if host_copies is not None and keep != "host":
        raise ValueError(f"host_copies has no effect with keep={keep!r}; set keep='host', or leave it out")
    if not isinstance(objectives, Sequence) or not all(isinstance(c, Objective.Config) for c in objectives):
        raise ValueError(
            f"objectives={objectives!r} must be a list of configs, as in [trimtab.SequenceWise.Config(coef=1e-4)]"
        )
    if not isinstance(accumulation, int | Accumulation):
        raise ValueError(f"accumulation={accumulation!r} must be a number of microbatches or an Accumulation")
    built = [config.build() for config in objectives]
    rule = bias.build() if bias is not None else None
    ranks = _ranks(built, reduction, ranks)
    routers = discover(model, extra=families)
    taken = next((r.name for r in routers if hasattr(r.module, ROUTER_STATE)), None)
    if taken is not None:
        raise ValueError(f"{taken} has a balancer already; call its remove() before attaching another")
    if objectives and (active := stock_aux_loss_active(model)) is not None:
        raise ValueError(active)
    verify(routers)
    if isinstance(accumulation, int):
        accumulation = Accumulation(num_microbatches=accumulation)
    if losses not in ("injected", "returned"):
        raise ValueError(f"losses={losses!r} must be 'injected' or 'returned'")
    fused = fused and losses == "injected"
    host = HostLogits(host_copies or HostCopies()) if keep == "host" else None
    balancer = Balancer(built, rule, accumulation, reduction or GradReduction(), measure_every, ranks, losses)
    try:
        for router in routers:
            _check_logits(router, built)
            balancer.add_router(router, _hook_arguments(router, keep, host, fused), router.family.expert_bias)
        if rule is not None and all(layer.bias is None for layer in balancer.layers):
            raise ValueError(
                f"no router matches layers={rule.config.layers}; the first is {routers[0].name!r}"
            )
        around = context_module(model, routers)
        balancer.add_context(model, around, tuple(inspect.signature(around.forward).parameters))
        if objectives:
            balancer.context.stock_loss = stock_aux_loss_at_call(model)
    except BaseException:
        balancer.remove()
        raise
    return balancer


def balancer_of(model: nn.Module) -> Balancer:
    """The balancer attached to ``model``; a deep copy or unpickled model has its own.

    Raises:
        ValueError: none is attached.
    """
    for module in (model, *model.modules()):
        balancer = module.__dict__.get(BALANCER)
        if isinstance(balancer, Balancer):
            return balancer
    raise ValueError(
        f"no balancer is attached to this {type(model).__name__}; call trimtab.attach(model, ...)"
    )


def _ranks(
    objectives: Sequence[Objective], reduction: GradReduction | None, ranks: TokenRanks | None
) -> TokenRanks:
    """The groups that counts are summed over."""
    distributed = torch.distributed
    several = distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1
    if not several:
        return ranks or TokenRanks()
    world_size = distributed.get_world_size()
    if reduction is None:
        raise ValueError(
            f"torch.distributed runs {world_size} processes; say how they reduce gradients: "
            f"reduction=GradReduction(ranks='mean', num_ranks={world_size}) for DDP and FSDP as they are, or "
            "ranks='sum'; num_ranks=1 if the ranks do not share a batch"
        )
    if ranks is None:
        if reduction.num_ranks not in (1, world_size):
            raise ValueError(
                f"num_ranks={reduction.num_ranks} of {world_size} processes share a step; say which: "
                "ranks=TokenRanks(tokens=group), with the process group that gradients are reduced over"
            )
        ranks = TokenRanks(tokens=distributed.group.WORLD if reduction.num_ranks > 1 else None)
    if ranks.num_ranks != reduction.num_ranks:
        raise ValueError(
            f"ranks.tokens has {ranks.num_ranks} ranks, but reduction has num_ranks={reduction.num_ranks}; both "
            "are the ranks that share a step"
        )
    if ranks.num_ranks % ranks.num_sequence_ranks:
        raise ValueError(
            f"ranks.sequence has {ranks.num_sequence_ranks} ranks, which must divide the {ranks.num_ranks} of "
            "ranks.tokens; it holds the ranks that share sequences"
        )
    for objective in objectives:
        if objective.needs_prob_sums and ranks.num_ranks > 1:
            name = type(objective).__name__
            if not objective.local:
                raise ValueError(
                    f"{name} is not summed over ranks; use {name}.Config(local=True) to balance each data rank on "
                    "its own, or BatchWise"
                )
            if ranks.num_sequence_ranks > 1:
                raise ValueError(
                    f"{name} cannot be had where sequences are divided over ranks.sequence; use BatchWise"
                )
    return ranks


def _check_logits(router: FoundRouter, objectives: Sequence[Objective]) -> None:
    if not router.family.exact_logits and any(objective.reads_logits for objective in objectives):
        raise ValueError(
            f"{router.name} ({type(router.module).__name__}) returns probabilities, from which the logits' "
            "log-sum-exp is lost; leave ZLoss out for this model"
        )


def _hook_arguments(
    router: FoundRouter, keep: Keep, host: HostLogits | None, fused: bool
) -> dict[str, object]:
    family = router.family
    direct = "." not in family.weight and (family.bias is None or "." not in family.bias)
    recompute = keep == "input" and router.linear_logits and direct
    return {
        "unpack": family.unpack,
        "repack": family.repack,
        "replace": family.replace,
        "dense_weights": family.dense_weights,
        "gate_weight": family.weight if recompute else None,
        "gate_bias": family.bias if recompute and router.bias is not None else None,
        "keeps_input": router.keeps_input,
        "host": host,
        "at_scores": keep == "input",
        # A subclass with a forward of its own knows nothing of balancing.
        "fused": fused and type(router.module).forward is Router.forward,
    }
