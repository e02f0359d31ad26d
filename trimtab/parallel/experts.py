"""Experts as parts of stacked parameters, and the MoE layer in models that keep activations whole over tp.

Ranks of ep hold whole experts, ranks of etp slices of their hidden layers. Every parameter of sliced experts
is divided, biases of the output as well, so that no rank of etp holds a copy of what another one holds: there
is nothing to keep equal, and each rank's gradient is complete for its part. All it lacks are the tokens of
other ranks of efsdp, which FSDP sums.

Shapes: B sequences, S length, T tokens, D model, F hidden, E experts, K top-k; U = 2F for gate and up
together, F without gate.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from trimtab.moe import MoE
from trimtab.parallel.dispatch import ExpertParallelDispatcher
from trimtab.parallel.mesh import Mesh
from trimtab.parallel.placements import CROSSINGS, local

# On a module: {parameter: dim} of those that hold one dimension of their usual shape as two, (2, F).
SPLIT_DIMS = "_trimtab_split_dims"


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertLayout:
    """How a module stacks the parameters of its experts.

    ``gate_up_proj`` (``up_proj`` without gate) is (E, U, D) and ``down_proj`` (E, D, F), or (E, D, U) and
    (E, F, D) if transposed; their biases, if there are any, are (E, U) and (E, D).

    Args:
        transposed: weights are (E, in, out).
        gated: gate and up are one parameter.
        interleaved: gate and up alternate in it, instead of being its halves.
    """

    transposed: bool = False
    gated: bool = True
    interleaved: bool = False

    @property
    def up(self) -> str:
        """Name of the first projection."""
        return "gate_up_proj" if self.gated else "up_proj"

    @property
    def names(self) -> tuple[str, str, str, str]:
        """Names of all parameters that there may be."""
        return self.up, f"{self.up}_bias", "down_proj", "down_proj_bias"

    def slice_dim(self, name: str) -> int:
        """Dimension of a parameter that etp divides."""
        if name.endswith("_bias"):
            return 1
        return 2 if self.transposed == (name == self.up) else 1

    def has_halves(self, name: str) -> bool:
        """Whether a contiguous part of a parameter's `slice_dim` would be all gate or all up."""
        return self.gated and not self.interleaved and name.removesuffix("_bias") == self.up


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSlice:
    """Reads this rank's parts of stacked experts; called in their forward as ``read(module, name)``.

    Args:
        layout: how the module stacks its experts.
        num_etp_ranks: ranks that divide each expert.
        etp_rank: this rank's place among them.
    """

    layout: ExpertLayout
    num_etp_ranks: int
    etp_rank: int

    def __call__(self, module: nn.Module, name: str) -> Tensor:
        """Local experts' weights in the module's own layout, with a smaller F.

        Outputs are parts of a sum over etp, so each rank adds the bias of its own part of the output's width.
        """
        value = local(getattr(module, name))
        if self.num_etp_ranks == 1:
            return value
        if self.layout.has_halves(name):
            dim = self.layout.slice_dim(name)
            return value.flatten(dim, dim + 1)
        if name == "down_proj_bias":
            width = value.shape[1]
            return F.pad(value, (self.etp_rank * width, (self.num_etp_ranks - 1 - self.etp_rank) * width))
        return value


def shard_experts(experts: nn.Module, mesh: Mesh, layout: ExpertLayout) -> ExpertSlice:
    """Replace the parameters of stacked experts by this rank's parts, in place and without communication.

    Parameters become DTensors on the mesh ("ep", "etp"), ``Shard(0)`` over ep. Over etp, if it has several
    ranks, they are sharded in F, and the output's bias in D; where gate and up are halves of one parameter,
    it is kept as (E, 2, F, D) or (E, D, 2, F), of which a shard holds the same part of both. Every rank must
    hold the same values before.

    Args:
        experts: module with the parameters that `ExpertLayout` names, on any device or meta.
        mesh: the mesh.
        layout: how the module stacks them.

    Returns:
        What the module's forward reads its weights with.

    Raises:
        ValueError: sizes that cannot be divided, other parameters, or experts that are parts already.
    """
    reader = ExpertSlice(layout=layout, num_etp_ranks=mesh.size("etp"), etp_rank=mesh.rank("etp"))
    if mesh.size("ep") == mesh.size("etp") == 1:
        return reader
    parameters = dict(experts.named_parameters())
    unknown = [name for name in parameters if name not in layout.names]
    if unknown:
        raise ValueError(
            f"{type(experts).__name__} has parameter {unknown[0]!r}, expected only {', '.join(layout.names)}: "
            "what experts share cannot be divided between them; set ep=1 and etp=1"
        )
    device_mesh = mesh.device_mesh("ep", "etp")
    split_dims: dict[str, int] = {}
    for name, parameter in parameters.items():
        _check_sizes(name, parameter, mesh, layout)
    for name, parameter in parameters.items():
        placements: tuple[Placement, Placement] = (Shard(0), Replicate())
        value = parameter.detach()
        if mesh.size("etp") > 1:
            dim = layout.slice_dim(name)
            if layout.has_halves(name):
                value = value.unflatten(dim, (2, -1))
                split_dims[name] = dim
                dim += 1
            placements = (Shard(0), Shard(dim))
        part = nn.Parameter(_own_part(value, device_mesh, placements), requires_grad=parameter.requires_grad)
        experts.register_parameter(name, part)
    setattr(experts, SPLIT_DIMS, split_dims)
    return reader


def parallelize_moe(layer: MoE, mesh: Mesh) -> None:
    """Divide the experts of a `trimtab.MoE` over the ep and etp axes of a mesh, in place.

    Args:
        layer: the layer, with the same parameters on each rank.
        mesh: the mesh.

    Raises:
        ValueError: see `shard_experts`.
    """
    config = layer.config.experts
    dispatcher = ExpertParallelDispatcher.make(config.num_experts, mesh)
    layout = ExpertLayout(transposed=config.transposed, interleaved=config.activation.interleaved)
    layer.experts.read = shard_experts(layer.experts, mesh, layout)
    layer.dispatcher = dispatcher


@dataclass(frozen=True, slots=True)
class _TokenSplit:
    """Hooks that give a layer this rank's part of the tokens, and its caller the whole output.

    Args:
        group: name of the process group of tp.
        num_ranks: its size.
    """

    group: str
    num_ranks: int

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        named = dict(kwargs)
        x = args[0] if args else named.pop("x_BSD")
        if x.dim() < 2 or x.shape[-2] % self.num_ranks:
            raise ValueError(
                f"input of shape {tuple(x.shape)} cannot be split over tp={self.num_ranks} along its tokens "
                "(dimension -2); pad sequences to a multiple of tp"
            )
        ids_TK = named.get("replay_ids_TK")
        if ids_TK is not None:
            named["replay_ids_TK"] = self._split(ids_TK.view(*x.shape[:-1], -1)).flatten(0, -2)
        return (self._split(x), *args[1:]), named

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return CROSSINGS["block.output"].convert(output, output.dim() - 2, self.group)

    def _split(self, x: Tensor) -> Tensor:
        return CROSSINGS["block.input"].convert(x, x.dim() - 2, self.group)


def split_tokens(layer: MoE, mesh: Mesh) -> None:
    """Put a `trimtab.MoE` into a model whose activations are whole over tp, in place.

    Each rank of tp then works on its contiguous part of every sequence: router, balancing, shared and routed
    experts see no token twice. The layer's input and output stay whole, and so do their gradients, at the
    cost of one collective at the boundary forward and one backward. Gradients of the layer's own parameters
    are this rank's tokens': sum them over tp as over data ranks, with FSDP over both or `sum_gradients`.

    Balancing must know who holds what: attach with ``ranks=TokenRanks(tokens=mesh.group("tokens"),
    sequence=mesh.group("sequence"))`` and describe batches with
    ``balancer.microbatch(..., tokens=TokenShard.make(...).flat_index(B))``.

    Args:
        layer: the layer. Called with (..., S, D), S a multiple of tp.
        mesh: the mesh.
    """
    group = mesh.group("tp")
    if group is None:
        return
    boundary = _TokenSplit(group.group_name, group.size())
    # Before other hooks, which then see what the layer sees.
    layer.register_forward_pre_hook(boundary.before, prepend=True, with_kwargs=True)
    layer.register_forward_hook(boundary.after)


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], mesh: Mesh) -> None:
    """Sum gradients over the ranks that hold other tokens, in place: for hosts that do not use FSDP.

    Parts of experts are summed over efsdp, everything else over dp_shard, cp and tp, and both over
    dp_replicate: one collective for each of these groups. A parameter that saw no token counts as zero.

    Args:
        parameters: of layers that work on this rank's tokens only, the same on every rank.
        mesh: the mesh.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    for axis in ("efsdp", "fsdp", "dp_replicate"):
        group = mesh.group(axis)
        grads = [
            _local_grad(parameter)
            for parameter in trained
            if axis == "dp_replicate" or isinstance(parameter, DTensor) == (axis == "efsdp")
        ]
        if group is None or not grads:
            continue
        flat = torch.cat([grad.reshape(-1) for grad in grads])
        dist.all_reduce(flat, group=group)
        for grad, total in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(total.view_as(grad))


def _local_grad(parameter: nn.Parameter) -> Tensor:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def _check_sizes(name: str, parameter: nn.Parameter, mesh: Mesh, layout: ExpertLayout) -> None:
    if isinstance(parameter, DTensor):
        raise ValueError(f"{name} is divided already; divide the experts of a model once, before FSDP")
    num_experts, ep, etp = parameter.shape[0], mesh.size("ep"), mesh.size("etp")
    if num_experts % ep:
        raise ValueError(f"ep={ep} must divide the {num_experts} experts of {name}; choose another ep")
    is_pair = layout.gated and name.removesuffix("_bias") == layout.up
    size = parameter.shape[layout.slice_dim(name)] // (2 if is_pair else 1)
    if size % etp:
        what = "the model's width" if name == "down_proj_bias" else "the experts' hidden width"
        raise ValueError(f"etp={etp} must divide {what} {size} of {name}; set etp=1")


def _own_part(value: Tensor, device_mesh: DeviceMesh, placements: tuple[Placement, ...]) -> DTensor:
    part = value
    for axis, placement in enumerate(placements):
        if isinstance(placement, Shard):
            part = part.chunk(device_mesh.size(axis), placement.dim)[device_mesh.get_local_rank(axis)]
    # A copy, so that the whole parameter's memory is free again.
    part = part.clone(memory_format=torch.contiguous_format)
    return DTensor.from_local(part, device_mesh, placements, run_check=False)
