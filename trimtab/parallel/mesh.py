"""Which rank is where: degrees of parallelism, and the process groups they make.

Ranks are numbered with pp outermost, then dp_replicate, dp_shard, cp and tp. Expert axes are made of the
same ranks: etp is tp or 1, ep takes its ranks from dp_shard, cp and, with etp = 1, tp; what is left of
them is efsdp.
"""

from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, kw_only=True, slots=True)
class Degrees:
    """Number of ranks along each axis.

    Args:
        dp_replicate: copies of the sharded model (HSDP).
        dp_shard: ranks that share parameters by FSDP and have data of their own.
        cp: ranks that divide each sequence between them; attention gathers keys and values.
        tp: ranks that divide attention heads, and tokens everywhere else.
        ep: ranks that divide the experts.
        etp: ranks that divide each expert's hidden width: 1 or tp.
        pp: pipeline ranks.

    Raises:
        ValueError: a degree below 1, an etp other than 1 or tp, or an ep that does not fit.
    """

    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    etp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        """Validate."""
        for field in fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be at least 1")
        if self.etp not in (1, self.tp):
            raise ValueError(
                f"etp={self.etp} must be 1 or tp={self.tp}: experts are divided as attention is, or not"
            )
        room = self.dp_shard * self.cp * (self.tp if self.etp == 1 else 1)
        if room % self.ep:
            axes = "dp_shard * cp * tp" if self.etp == 1 else "dp_shard * cp (etp takes tp)"
            raise ValueError(f"ep={self.ep} must divide {axes} = {room}")

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def data(self) -> int:
        """Ranks along the axes that have data of their own."""
        return self.dp_replicate * self.dp_shard

    @property
    def sequence(self) -> int:
        """Ranks that divide each sequence between them."""
        return self.cp * self.tp

    @property
    def fsdp(self) -> int:
        """Ranks over which parameters outside attention and experts are sharded."""
        return self.dp_shard * self.cp * self.tp

    @property
    def efsdp(self) -> int:
        """Ranks over which FSDP shards each expert-parallel part."""
        return self.fsdp // (self.ep * self.etp)


class Groups:
    """Process groups by their ranks, each made once: axes that span the same ranks share theirs.

    A group costs memory on a GPU, and with gloo a thread that never sleeps long.
    """

    def __init__(self) -> None:
        self._by_ranks: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def of(self, ranks: tuple[int, ...]) -> dist.ProcessGroup:
        """The group of these ranks; all of them must ask for it, in the same order as for others they share."""
        if ranks not in self._by_ranks:
            if len(ranks) == dist.get_world_size():
                group = dist.group.WORLD
            else:
                group = dist.new_group(list(ranks), use_local_synchronization=True)
            assert isinstance(group, dist.ProcessGroup)
            self._by_ranks[ranks] = group
        return self._by_ranks[ranks]


class Mesh:
    """Process groups of all axes. Every rank of the world must make it, with the same degrees.

    Args:
        degrees: sizes of the axes; their product is the world's size.
        device_type: "cpu" or "cuda".
        groups: groups that exist already; None for none.

    Raises:
        ValueError: the product of the degrees is not the number of ranks.
    """

    def __init__(self, degrees: Degrees, device_type: str, groups: Groups | None = None) -> None:
        world_size = dist.get_world_size()
        if degrees.world_size != world_size:
            raise ValueError(
                f"pp * dp_replicate * dp_shard * cp * tp = {degrees.world_size} must be the number of ranks, "
                f"{world_size}; {degrees}"
            )
        d = self.degrees = degrees
        self.device_type = device_type
        self._groups = Groups() if groups is None else groups
        self._meshes: dict[str, DeviceMesh] = {}
        # Views of the world: the same ranks in the same order, cut into other axes.
        self._add(pp=d.pp, dp_replicate=d.dp_replicate, fsdp=d.fsdp)
        self._add(pp=d.pp, dp_replicate=d.dp_replicate, dp_cp=d.dp_shard * d.cp, tp=d.tp)
        self._add(pp=d.pp, dp_replicate=d.dp_replicate, efsdp=d.efsdp, ep=d.ep, etp=d.etp)
        self._add(pp=d.pp, data=d.data, cp=d.cp, _tp=d.tp)
        self._add(pp=d.pp, _data=d.data, sequence=d.sequence)
        self._add(pp=d.pp, tokens=d.data * d.sequence)

    def _add(self, **axes: int) -> None:
        """Make one view of the world, unless each of its new axes has one rank."""
        new = [name for name in axes if name not in ("pp", "dp_replicate")]
        if all(axes[name] == 1 for name in new) and not ("fsdp" in axes and self.degrees.world_size > 1):
            return
        # On the CPU whatever the default device is, so that a model may be built on the meta device around it.
        ranks = torch.arange(self.degrees.world_size, device="cpu").view(tuple(axes.values()))
        own = (ranks == dist.get_rank()).nonzero()[0].tolist()
        groups = []
        for dim in range(len(axes)):
            along: list[int | slice] = list(own)
            along[dim] = slice(None)
            groups.append(self._groups.of(tuple(ranks[tuple(along)].tolist())))
        root = DeviceMesh.from_group(groups, self.device_type, ranks, mesh_dim_names=tuple(axes))
        for name in axes:
            if not name.startswith("_"):
                self._meshes.setdefault(name, root)

    def size(self, axis: str) -> int:
        """Ranks along an axis: pp, dp_replicate, dp_shard, cp, tp, ep, etp, data, sequence, fsdp or efsdp."""
        size: int = getattr(self.degrees, axis)
        return size

    def rank(self, axis: str) -> int:
        """This rank's place along pp, dp_replicate, data, cp, tp, ep, etp or sequence."""
        return 0 if self.size(axis) == 1 else self._meshes[axis].get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Ranks that differ from this one along an axis only; None if it has one rank.

        Beside the axes of `size`: "tokens", all ranks of this pipeline stage.
        """
        root = self._meshes.get(axis)
        if root is None:
            return None
        group = root.get_group(axis)
        return None if group.size() == 1 else group

    def device_mesh(self, *axes: str) -> DeviceMesh:
        """The part of the mesh that this rank's axes span, for DTensor: axes of one view, in its order."""
        return self._meshes[axes[-1]][axes]

    def fsdp_mesh(self, axis: str) -> DeviceMesh | None:
        """Mesh for FSDP along "fsdp", "dp_cp" or "efsdp", with dp_replicate before it; None for one rank."""
        sizes = {
            "fsdp": self.degrees.fsdp,
            "dp_cp": self.degrees.dp_shard * self.degrees.cp,
            "efsdp": self.degrees.efsdp,
        }
        if self.degrees.dp_replicate > 1:
            return self.device_mesh("dp_replicate", axis)
        return None if sizes[axis] == 1 else self.device_mesh(axis)
