"""Parameters that several pipeline stages hold: an embedding that the last stage reads too, or has as its head.

Each such stage has a replica, which starts with the same values. A replica's gradient is that of its stage's use
of the parameter; after backward they are summed over the stages that hold one, so every replica has the gradient
of the whole model and the optimiser moves all of them alike: they stay equal to the bit.

Replicas of one pipeline rank (V schedules put the first and the last stage on one) are summed there. Ranks that
hold one send each other theirs, or the part of it that FSDP left them, and each adds them up in order of ranks.
Nobody else takes part, and no process group is made for it: groups must be made by all ranks alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trimtab.parallel.mesh import Mesh
from trimtab.parallel.schedules import PipelinePlan

# Attribute of a stage: {name of a parameter: all stages that hold it}.
SHARED = "_trimtab_shared_parameters"


def share(stage: nn.Module, names: Mapping[str, tuple[int, ...]]) -> None:
    """Say which parameters of a stage other stages hold as well.

    Args:
        stage: a stage's module.
        names: parameters by name, with all stages that hold them, this one among them.
    """
    setattr(stage, SHARED, dict(names))


def shared_names(stage: nn.Module) -> dict[str, tuple[int, ...]]:
    """Parameters of a stage that other stages hold too, with all stages that do; none where nothing is divided."""
    found: dict[str, tuple[int, ...]] = getattr(stage, SHARED, {})
    return found


@dataclass(frozen=True, slots=True)
class _Replicas:
    """The replicas of one parameter on this rank, in order of stages, and the pipeline ranks that hold any."""

    parameters: tuple[nn.Parameter, ...]
    ranks: tuple[int, ...]


class SharedParameters:
    """Sums the gradients of parameters that several stages hold.

    Args:
        parts: modules of this rank's stages, by stage; after FSDP, with their final parameters.
        plan: which rank holds which stage.
        mesh: where ranks are. Every rank of a pipeline makes its own, at the same time.

    Raises:
        ValueError: a parameter that a stage is said to hold and does not.
    """

    def __init__(self, parts: Mapping[int, nn.Module], plan: PipelinePlan, mesh: Mesh) -> None:
        replicas: dict[str, list[nn.Parameter]] = {}
        stages_of: dict[str, tuple[int, ...]] = {}
        copies: set[nn.Parameter] = set()
        for stage, part in sorted(parts.items()):
            parameters = dict(part.named_parameters())
            for name, stages in shared_names(part).items():
                if name not in parameters:
                    raise ValueError(
                        f"stage {stage} is said to share {name!r}, but has no parameter of that name; share "
                        "parameters before the stage is wrapped"
                    )
                replicas.setdefault(name, []).append(parameters[name])
                stages_of[name] = stages
                if stage != min(stages):
                    copies.add(parameters[name])
        #: Replicas beside the first stage's: what counts parameters, or the norm of gradients, leaves these out.
        self.copies = frozenset(copies)
        self._group, self._rank = mesh.group("pp"), mesh.rank("pp")
        # Sorted: all ranks must go through them in one order.
        self._replicas = [
            _Replicas(tuple(found), tuple(sorted({plan.rank_of(stage) for stage in stages_of[name]})))
            for name, found in sorted(replicas.items())
            if found[0].requires_grad  # one that is frozen is so in all stages
        ]

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Give every replica the sum of all replicas' gradients, after backward; every rank calls it."""
        for replicas in self._replicas:
            grads = [_local_gradient(parameter) for parameter in replicas.parameters]
            total, *others = grads
            for other in others:
                total += other
            if len(replicas.ranks) > 1:
                total.copy_(self._sum_over_ranks(total, replicas.ranks))
            for other in others:
                other.copy_(total)

    def _sum_over_ranks(self, own: Tensor, ranks: tuple[int, ...]) -> Tensor:
        own = own.contiguous()
        peers = [rank for rank in ranks if rank != self._rank]
        found = {rank: torch.empty_like(own) for rank in peers}
        messages = [dist.P2POp(dist.isend, own, group=self._group, group_peer=rank) for rank in peers]
        messages += [
            dist.P2POp(dist.irecv, found[rank], group=self._group, group_peer=rank) for rank in peers
        ]
        for work in dist.batch_isend_irecv(messages):
            work.wait()
        # In the same order on every rank, so that all have the same bits.
        first, *rest = ({**found, self._rank: own}[rank] for rank in ranks)
        total = first.clone()
        for other in rest:
            total += other
        return total

    def messages(self) -> list[int]:
        """Bytes of each message that this rank sends along pp in one step."""
        return [
            local.numel() * local.element_size()
            for replicas in self._replicas
            for _ in replicas.ranks[1:]
            for local in [_local(replicas.parameters[0])]
        ]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _local_gradient(parameter: nn.Parameter) -> Tensor:
    """This rank's part of a gradient; zeros are put where there is none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return _local(parameter.grad)
