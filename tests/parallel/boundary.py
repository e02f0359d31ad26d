"""A model whose activations are whole over tp, with MoE layers that split tokens over it, against one process.

`check` trains both and compares output, the gradient of the block's input and of what lies before it, of
every parameter, and after training the bits of what ranks hold alike.

Shapes: B sequences of a data rank, S length, D model.
"""

import contextlib
import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import trimtab
from tests.parallel.pool import mesh_of
from trimtab import GlobalBatch, GradReduction, SequenceWise, Sign, TokenRanks, ZLoss
from trimtab.experts import Experts, SharedExperts
from trimtab.moe import MoE
from trimtab.parallel.experts import parallelize_moe, split_tokens, sum_gradients
from trimtab.parallel.mesh import Degrees, Mesh
from trimtab.parallel.tokens import TokenShard
from trimtab.router import Router

B, S, D = 2, 6, 8

TP2_EP2 = Degrees(tp=2, ep=2)
TP2_ETP2 = Degrees(tp=2, etp=2)

OBJECTIVES = [
    SequenceWise.Config(coef=0.3),
    GlobalBatch.Config(coef=0.4, counts="exact"),
    ZLoss.Config(coef=0.1),
]


class Host(nn.Module):
    """Something before each MoE layer that is whole over tp, and a residual around it."""

    def __init__(self, *, before: bool, shared: bool, num_layers: int = 1) -> None:
        super().__init__()
        config = MoE.Config(
            router=Router.Config(
                dim=D,
                num_experts=4,
                top_k=2,
                score="sigmoid",
                normalize_top_k=True,
                expert_bias=True,
                init_std=1.0,
            ),
            experts=Experts.Config(dim=D, hidden_dim=6, num_experts=4, bias=True, init_std=0.4),
            shared_experts=SharedExperts.Config(dim=D, hidden_dim=4, init_std=0.4) if shared else None,
            score_before_experts=before,
        )
        self.inner = nn.ModuleList(nn.Linear(D, D, dtype=torch.float64) for _ in range(num_layers))
        self.moe = nn.ModuleList(config.build(dtype=torch.float64) for _ in range(num_layers))

    def forward(self, x_BSD: Tensor) -> Tensor:
        for inner, moe in zip(self.inner, self.moe, strict=True):
            h_BSD = inner(x_BSD).tanh()
            x_BSD = h_BSD + moe(h_BSD)
        return x_BSD


def make_host(**settings: Any) -> Host:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Host(**settings)


def make_batch(num_sequences: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs, and the gradient of the task's loss with respect to the output, linear to keep it simple."""
    generator = torch.Generator().manual_seed(step)
    x_BSD = torch.randn(num_sequences, S, D, generator=generator, dtype=torch.float64)
    return x_BSD, torch.randn(x_BSD.shape, generator=generator, dtype=torch.float64) / 10


# ------------------------------------------------------------------ plans: how ranks share the work


class Plan:
    """The plan of `trimtab.parallel`: tokens are split over tp inside the block."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.tp: Any = mesh.group("tp")

    def crossings(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def apply(self, layer: MoE) -> None:
        parallelize_moe(layer, self.mesh)
        split_tokens(layer, self.mesh)

    def attach(self, host: Host) -> tuple[trimtab.Balancer, dict[str, Any]]:
        tokens, mesh = self.mesh.group("tokens"), self.mesh
        balancer = trimtab.attach(
            host,
            OBJECTIVES,
            bias=Sign.Config(speed=0.01),
            reduction=GradReduction(num_ranks=dist.get_world_size()),
            ranks=TokenRanks(tokens=tokens, sequence=mesh.group("sequence")),
        )
        shard = TokenShard.make(S, tp=mesh.size("tp"), tp_rank=mesh.rank("tp"))
        return balancer, {"batch_shape": (B, S), "tokens": shard.flat_index(B)}

    def reduce(self, host: Host) -> None:
        sum_gradients(host.moe.parameters(), self.mesh)
        # Activations before the block are whole over tp, and so are gradients: ranks differ over data only.
        if (data := self.mesh.group("data")) is not None:
            for parameter in host.inner.parameters():
                dist.all_reduce(parameter.grad, group=data)

    def router_gradient(self, router: Any) -> Tensor:
        return router.weight.grad


def trace(host: Host, plan: Plan | None, num_sequences: int, mine: slice, steps: int) -> dict[str, Any]:
    """Train; output and gradients of the first step, weights after the last."""
    if plan is None:
        balancer = trimtab.attach(
            host, OBJECTIVES, bias=Sign.Config(speed=0.01), reduction=GradReduction(), ranks=TokenRanks()
        )
        batch: dict[str, Any] = {"batch_shape": (num_sequences, S)}
    else:
        for layer in host.moe:
            plan.apply(layer)
        balancer, batch = plan.attach(host)
    optimizer = torch.optim.SGD(host.parameters(), lr=0.05, momentum=0.9, foreach=False)
    out: dict[str, Any] = {}
    for step in range(steps):
        x_BSD, grad_BSD = make_batch(num_sequences, step)
        x_BSD = x_BSD[mine].clone().requires_grad_()
        with balancer.microbatch(**batch):
            y_BSD = host(x_BSD)
        (y_BSD * grad_BSD[mine]).sum().backward()
        if plan is not None:
            plan.reduce(host)
        if step == 0:
            out = {"y": y_BSD.detach().clone(), "x.grad": x_BSD.grad}
            for name, parameter in host.named_parameters():
                assert parameter.grad is not None
                grad = parameter.grad
                out[name] = (grad.full_tensor() if isinstance(grad, DTensor) else grad).clone()
            if plan is not None:
                router = host.moe[0].router
                out["moe.0.router.weight"] = plan.router_gradient(router).clone()
        optimizer.step()
        optimizer.zero_grad()
        balancer.step()
    out["after training"] = {
        name: value.detach().clone()
        for name, value in host.state_dict().items()
        if "router" in name or "shared" in name or "inner" in name
    }
    return out


def drift(value: Tensor) -> float:
    """Largest difference between the ranks' copies of a value."""
    copies = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(copies, value.contiguous())
    return max(float((one - copies[0]).abs().max()) for one in copies)


def check(
    degrees: Degrees, settings: dict[str, Any], plan_class: type[Plan] = Plan, steps: int = 1
) -> dict[str, Any]:
    """Relative errors of the first step by name, and of the last step the drift between copies."""
    mesh = mesh_of(degrees)
    plan = plan_class(mesh)
    host = make_host(**settings)
    num_data = mesh.size("data")
    mine = slice(B * mesh.rank("data"), B * mesh.rank("data") + B)
    want = trace(copy.deepcopy(host), None, B * num_data, slice(None), steps)
    with plan.crossings():
        have = trace(host, plan, B * num_data, mine, steps)
    trained, trained_by_one = have.pop("after training"), want.pop("after training")
    errors = {}
    for name, value in want.items():
        value = value[mine] if name in ("y", "x.grad") else value
        errors[name] = float((have[name].reshape(value.shape) - value).abs().max() / value.abs().max())
    trained = {name: value for name, value in trained.items() if "parametrizations" not in name}
    return {
        "errors": errors,
        "drift": {name: drift(value) for name, value in trained.items()},
        "after": max(float((trained[n] - trained_by_one[n]).abs().max()) for n in trained),
    }
