"""What FSDP made of a module: the groups of parameters that it gathers and reduces together."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """Parameters that are gathered in one collective.

    Args:
        axis: mesh axis that they are sharded over: "fsdp", "dp_cp" or "efsdp".
        is_root: they are the root's own, which stay gathered from forward to backward.
        num_shards: ranks that they are sharded over.
        num_replicas: ranks that hold copies of a shard.
        shard_bytes: one shard, padded so that all ranks have as much.
        own_bytes: this rank's shard without padding.
        trained_bytes: one shard of what has gradients, padded likewise.
    """

    axis: str
    is_root: bool
    num_shards: int
    num_replicas: int
    shard_bytes: int
    own_bytes: int
    trained_bytes: int

    @property
    def whole_gradient_bytes(self) -> int:
        """All shards of gradients, as they are summed."""
        return self.trained_bytes * self.num_shards

    @property
    def whole_bytes(self) -> int:
        """All shards, as they are gathered."""
        return self.shard_bytes * self.num_shards


def parameter_groups(module: nn.Module) -> Iterator[ParameterGroup]:
    """The groups that `trimtab.parallel.fsdp.shard_parameters` made of a model; none if it did not shard it."""
    seen: set[int] = set()
    for child in module.modules():
        if not isinstance(child, FSDPModule):
            continue
        state: Any = child._get_fsdp_state()
        if id(state) in seen:  # modules that are one group share a state
            continue
        seen.add(id(state))
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # before PyTorch 2.13 there was one group at most
            groups = [group for group in [state._fsdp_param_group] if group is not None]
        for group in groups:
            shards = [parameter.sharded_param for parameter in group.fsdp_params]
            padded = [parameter.padded_sharded_param_size.numel() for parameter in group.fsdp_params]
            sizes = [shard.element_size() for shard in shards]
            own = [shard.to_local().numel() for shard in shards]
            yield ParameterGroup(
                axis=group.mesh_info.mesh.mesh_dim_names[-1],
                is_root=child is module,
                num_shards=group.mesh_info.shard_mesh_size,
                num_replicas=getattr(group.mesh_info, "replicate_mesh_size", 1),
                shard_bytes=sum(numel * size for numel, size in zip(padded, sizes, strict=True)),
                own_bytes=sum(numel * size for numel, size in zip(own, sizes, strict=True)),
                trained_bytes=sum(
                    numel * size
                    for numel, size, shard in zip(padded, sizes, shards, strict=True)
                    if shard.requires_grad
                ),
            )
