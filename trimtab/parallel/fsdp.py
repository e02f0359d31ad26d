"""FSDP over three groups of parameters, gradients summed exactly once, and their norm.

Every parameter is sharded over all ranks that hold different tokens for it:

    experts          ep (and etp), then FSDP over efsdp
    attention heads  tp, then FSDP over dp_cp
    everything else  FSDP over fsdp = dp_shard * cp * tp

so each rank of (pp, dp_shard, cp, tp) has a part of every parameter that no other rank has, and
dp_replicate holds copies. Gradients are sums over the step's tokens: nothing is divided by a number of ranks.
"""

from collections.abc import Collection, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from trimtab.parallel.mesh import Mesh


def shard_parameters(
    model: nn.Module,
    mesh: Mesh,
    *,
    layers: Sequence[nn.Module],
    experts: Sequence[nn.Module] = (),
    heads: Sequence[Sequence[nn.Module]] = (),
    reshard_after_forward: bool = True,
) -> None:
    """Shard a model (or pipeline stage) in place.

    Args:
        model: the root, which owns what no layer owns.
        mesh: where ranks are.
        layers: repeated layers, gathered one at a time.
        experts: modules whose own parameters are sharded over ep already.
        heads: groups of modules whose own parameters are sharded over tp already, one group for each
            attention block.
        reshard_after_forward: gather parameters again for backward instead of keeping them; pipelines
            keep them, or every microbatch would gather them twice.
    """
    ignored: set[nn.Parameter] = set()
    for axis, groups in (("efsdp", [[module] for module in experts]), ("dp_cp", heads)):
        for group in groups:
            device_mesh = mesh.fsdp_mesh(axis)
            if device_mesh is None:
                # Each rank has a part of its own already; the mesh of everything else is not theirs.
                ignored |= {parameter for module in group for parameter in module.parameters()}
            else:
                fully_shard(list(group), mesh=device_mesh, reshard_after_forward=reshard_after_forward)
    device_mesh = mesh.fsdp_mesh("fsdp")
    if device_mesh is None:
        return
    for layer in layers:
        own = ignored & set(layer.parameters())
        fully_shard(
            layer, mesh=device_mesh, reshard_after_forward=reshard_after_forward, ignored_params=own or None
        )
    fully_shard(model, mesh=device_mesh, reshard_after_forward=False, ignored_params=ignored or None)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # gloo knows no scaled sums, which a divide factor asks for even if it is 1.
            module.set_force_sum_reduction_for_comms(True)


def gathers_inside_layers(
    mesh: Mesh, *, experts: Sequence[nn.Module] = (), heads: Sequence[Sequence[nn.Module]] = ()
) -> bool:
    """Whether `shard_parameters` will let parts of a layer gather parameters of their own, as the layer runs."""
    pairs = (("efsdp", experts), ("dp_cp", heads))
    return any(len(groups) > 0 and mesh.fsdp_mesh(axis) is not None for axis, groups in pairs)


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """This rank's part of every gradient."""
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


@torch.no_grad()
def clip_gradients(
    parameters: Iterable[nn.Parameter],
    max_norm: float,
    mesh: Mesh | None,
    *,
    copies: Collection[nn.Parameter] = frozenset(),
) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most ``max_norm``; return the norm before.

    Args:
        parameters: of this rank, all pipeline stages of it together.
        max_norm: bound; infinity only measures.
        mesh: where ranks are; None for one process.
        copies: replicas of parameters of another stage, scaled alike and not counted.

    Returns:
        () float64 on every rank: the norm that one process would have.
    """
    parameters = list(parameters)
    grads = [grad for grad in local_gradients(parameters) if grad.numel()]
    counted = [grad for grad in local_gradients(p for p in parameters if p not in copies) if grad.numel()]
    device = grads[0].device if grads else torch.device("cpu" if mesh is None else mesh.device_type)
    square = torch.zeros((), dtype=torch.float64, device=device)
    if counted:
        square = torch.stack(torch._foreach_norm(counted)).double().square().sum()
    if mesh is not None:
        # Every part is on one rank only, but for copies along dp_replicate.
        dist.all_reduce(square)
        square = square / mesh.degrees.dp_replicate
    norm = square.sqrt()
    # The factor is 1 and not a branch where nothing is to be clipped: a branch would wait for the device.
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(factor.to(grad.dtype))
    return norm
