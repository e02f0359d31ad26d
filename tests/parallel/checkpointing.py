"""Models divided by any plan, for tests of checkpoints."""

import zlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Shard

from tests.hf_models import tiny_model
from tests.parallel.pool import mesh_of
from trimtab.experts import ClampedSwiGLU, Experts, SwiGLU
from trimtab.integrations.experts import use_trimtab_experts
from trimtab.integrations.parallel import decoder_layers, parallelize
from trimtab.integrations.stages import split_into_stages
from trimtab.parallel.experts import ExpertLayout, shard_experts
from trimtab.parallel.fsdp import shard_parameters
from trimtab.parallel.mesh import Degrees

NUM_LAYERS = 4


class Block(nn.Module):
    """One of each: parameters of attention that tp divides, of experts in every layout, and the rest."""

    def __init__(self, index: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, 8)
        self.o = nn.Linear(8, dim, bias=False)
        self.gate = nn.Linear(dim, 8, bias=False)
        self.register_buffer("expert_bias_E", torch.randn(8))
        self.register_buffer("not_saved", torch.randn(8), persistent=False)
        self.experts = Experts.Config(
            dim=dim,
            hidden_dim=6,
            num_experts=8,
            activation=ClampedSwiGLU() if index == 2 else SwiGLU(),
            bias=True,
            transposed=index == 1,
        ).build()
        # FSDP shards its 5 rows over up to 4 ranks, the last of which has none.
        self.frozen = nn.Parameter(torch.randn(5, 2), requires_grad=False)


class Toy(nn.Module):
    """Parameters only."""

    def __init__(self, dim: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, dim)
        self.layers = nn.ModuleList(Block(i, dim) for i in range(NUM_LAYERS))
        self.head = nn.Linear(dim, 13)


def stock(kind: str, seed: int) -> nn.Module:
    """The model of one process."""
    if kind == "deepseek":
        return tiny_model("deepseek_v3", num_layers=NUM_LAYERS, seed=seed)[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        toy = Toy(dim=12 if kind == "wide" else 6)
    if kind == "other":
        del toy.head
        toy.tail = nn.Linear(6, 13, bias=False)
    with torch.no_grad():
        for parameter in toy.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(seed))
    return toy


@dataclass
class Divided:
    """What one rank holds."""

    kind: str
    modules: list[nn.Module]
    optimizer: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        # DTensors of several meshes cannot be in one fused update, so groups of an optimiser follow meshes.
        groups: dict[Any, list[nn.Parameter]] = {}
        for parameter in self.named_parameters().values():
            if parameter.requires_grad:
                mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
                groups.setdefault((mesh, parameter.dim() > 1), []).append(parameter)
        self.optimizer = torch.optim.AdamW(
            [{"params": params, "weight_decay": 0.1 * wide} for (_, wide), params in groups.items()], lr=0.1
        )

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Of all parts."""
        return {name: p for module in self.modules for name, p in module.named_parameters()}

    def give_state(self, first: "Divided", second: "Divided") -> "Divided":
        """Give the optimiser the parameters of two other models, divided likewise, as its moments."""
        ones, others = first.named_parameters(), second.named_parameters()
        for name, parameter in self.named_parameters().items():
            if parameter.requires_grad:
                self.optimizer.state[parameter] = {
                    "step": torch.tensor(float(zlib.crc32(name.encode()) % 1000)),
                    "exp_avg": ones[name].detach().clone(),
                    "exp_avg_sq": others[name].detach().square(),
                }
        return self

    def local(self) -> dict[str, torch.Tensor]:
        """This rank's parts of everything that a checkpoint holds, by name."""
        found = {}
        for module in self.modules:
            found |= {name: local(value).clone() for name, value in module.state_dict().items()}
        for name, parameter in self.named_parameters().items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{name} {key}"] = local(value).clone()
        return found


def local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value.detach()


def saved(kind: str, degrees: Degrees | None) -> Divided:
    """What is saved: weights and moments are those of stock models, divided as any model is."""
    return divide(kind, degrees, seed=0).give_state(
        divide(kind, degrees, seed=1), divide(kind, degrees, seed=2)
    )


def divide(kind: str, degrees: Degrees | None, *, seed: int) -> Divided:
    """A model on this rank of a mesh, or whole without one."""
    if degrees is None:
        return Divided(kind, [stock(kind, seed)])
    mesh = mesh_of(degrees)
    # In a pipeline, two stages on each rank.
    stages = [0] if degrees.pp == 1 else [mesh.rank("pp"), degrees.pp + mesh.rank("pp")]
    num_stages = degrees.pp * len(stages)
    divide_part = _divide_transformers if kind == "deepseek" else _divide_toy
    return Divided(kind, [divide_part(stock(kind, seed), mesh, num_stages, stage) for stage in stages])


def _divide_transformers(model, mesh, num_stages, stage):
    use_trimtab_experts(model)
    if num_stages > 1:
        model = split_into_stages(model, num_stages=num_stages, stage=stage)
    divided = parallelize(model, mesh)
    shard_parameters(model, mesh, layers=decoder_layers(model), experts=divided.experts, heads=divided.heads)
    return model


def _divide_toy(toy, mesh, num_stages, stage):
    if num_stages > 1:
        for index in range(NUM_LAYERS):
            if index * num_stages // NUM_LAYERS != stage:
                toy.layers[index] = nn.Identity()
        if stage > 0:
            toy.embed = nn.Identity()
        if stage < num_stages - 1:
            toy.head = toy.tail = nn.Identity()
    layers = [layer for layer in toy.layers if isinstance(layer, Block)]
    heads = []
    for layer in layers:
        experts = layer.experts
        layout = ExpertLayout(
            transposed=experts.config.transposed, interleaved=experts.config.activation.interleaved
        )
        shard_experts(experts, mesh, layout)
        if mesh.size("tp") > 1:
            for linear, name, dim in ((layer.q, "weight", 0), (layer.q, "bias", 0), (layer.o, "weight", 1)):
                part = (
                    getattr(linear, name).detach().chunk(mesh.size("tp"), dim)[mesh.rank("tp")].contiguous()
                )
                tensor = DTensor.from_local(part, mesh.device_mesh("tp"), [Shard(dim)], run_check=False)
                linear.register_parameter(name, nn.Parameter(tensor))
            heads.append([layer.q, layer.o])
    experts = [layer.experts for layer in layers] if mesh.size("ep") * mesh.size("etp") > 1 else []
    shard_parameters(toy, mesh, layers=layers, experts=experts, heads=heads)
    return toy
