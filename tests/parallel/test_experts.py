"""Experts divided over ranks against one process: values, every gradient, layouts, FSDP, compile, errors.

Shapes: T tokens, D model, F hidden, E experts.
"""

import copy
import importlib
import warnings
from functools import partial
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint as checkpointed

from tests.hf_models import D, E, tiny_model
from tests.parallel.double import double_precision
from tests.parallel.pool import Ranks, mesh_of
from trimtab.experts import ClampedSwiGLU, Experts, GatedActivation, SharedExperts, SwiGLU
from trimtab.integrations.experts import parallelize_experts
from trimtab.moe import MoE
from trimtab.parallel.experts import parallelize_moe
from trimtab.parallel.mesh import Degrees, Mesh
from trimtab.router import Router

EP2 = Degrees(dp_shard=2, ep=2)
ETP2 = Degrees(tp=2, etp=2)
EP4 = Degrees(dp_shard=2, tp=2, ep=4)
EP2_OF_4 = Degrees(dp_shard=4, ep=2)
ETP2_OF_4 = Degrees(dp_shard=2, tp=2, etp=2)
EP2_ETP2 = Degrees(dp_shard=2, tp=2, ep=2, etp=2)
IDS = {EP2: "ep2", ETP2: "etp2", EP4: "ep4", EP2_OF_4: "ep2-efsdp2", ETP2_OF_4: "etp2-efsdp2"}
IDS |= {EP2_ETP2: "ep2-etp2"}

FAMILIES = ["qwen3_moe", "deepseek_v3", "gpt_oss", "mixtral", "llama4"]


# ------------------------------------------------------------------ what ranks do


def experts_of(block: Any) -> nn.Module:
    return cast(nn.Module, block.experts)


def stock_block(family: str, dtype: torch.dtype) -> Any:
    """The model with one layer, and random experts."""
    model: Any = tiny_model(family, num_layers=1, dtype=dtype)[0]
    if family != "llama4":
        model.set_experts_implementation("eager")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in experts_of(block_of(model)).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def block_of(model: Any) -> Any:
    layer = model.model.layers[0]
    return layer.feed_forward if hasattr(layer, "feed_forward") else layer.mlp


def moe_layer(
    transposed: bool = False,
    bias: bool = True,
    activation: GatedActivation | None = None,
    before: bool = False,
    hidden_dim: int = 6,
    dim: int = D,
    num_experts: int = E,
) -> MoE:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = MoE.Config(
            router=Router.Config(
                dim=dim, num_experts=num_experts, top_k=2, score="sigmoid", normalize_top_k=True, init_std=0.5
            ),
            experts=Experts.Config(
                dim=dim,
                hidden_dim=hidden_dim,
                num_experts=num_experts,
                transposed=transposed,
                bias=bias,
                activation=activation or SwiGLU(),
                init_std=0.3,
            ),
            shared_experts=SharedExperts.Config(dim=dim, hidden_dim=5, gated=True, init_std=0.3),
            score_before_experts=before,
        ).build(dtype=torch.float64)
        for name, parameter in layer.experts.named_parameters():
            if name.endswith("_bias"):
                nn.init.normal_(parameter, std=0.3)
    return layer


def run(block: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Output and the input's gradient."""
    x = x.clone().requires_grad_()
    y = block(x)
    y = (y[0] if isinstance(y, tuple) else y).reshape(x.shape)
    y.sin().sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def whole_gradient(parameter: nn.Parameter, mesh: Mesh, shape: torch.Size) -> Tensor:
    """The gradient of all ranks' tokens, in the stock shape; reduced here as a trainer would."""
    assert parameter.grad is not None
    grad = parameter.grad.clone()
    if not isinstance(grad, DTensor):
        dist.all_reduce(grad)
        return grad
    part = grad.to_local()
    if len(grad.placements) == 2 and (group := mesh.group("efsdp")) is not None:
        dist.all_reduce(part, group=group)  # FSDP has not done it already
    return grad.full_tensor().reshape(shape)


def tokens_of(num_tokens: list[int], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(1, num, D, generator=generator, dtype=dtype) for num in num_tokens]


def errors(one: nn.Module, many: nn.Module, mesh: Mesh, num_tokens: list[int]) -> dict[str, float]:
    """Relative to the largest entry: output, input's gradient, every parameter's gradient."""
    tokens, rank = tokens_of(num_tokens), dist.get_rank()
    y_one, grad_one = run(one, torch.cat(tokens, dim=1))
    y, grad = run(many, tokens[rank])
    out = {}
    for name, have, want in (("y", y, y_one), ("x.grad", grad, grad_one)):
        want = want.split(num_tokens, dim=1)[rank]
        out[name] = float((have - want).abs().max() / want.abs().max()) if have.numel() else 0.0
    for (name, parameter), (name_one, parameter_one) in zip(
        many.named_parameters(), one.named_parameters(), strict=True
    ):
        assert name == name_one
        want = parameter_one.grad
        assert want is not None
        have = whole_gradient(parameter, mesh, want.shape)
        out[name] = float((have - want).abs().max() / want.abs().max())
    return out


def family_errors(family: str, degrees: Degrees, num_tokens: list[int], fsdp: bool) -> dict[str, float]:
    mesh = mesh_of(degrees)
    with double_precision():
        model = stock_block(family, torch.float64)
        parallel = copy.deepcopy(model)
        experts = parallelize_experts(parallel, mesh)
        assert experts == [experts_of(block_of(parallel))]
        if fsdp:
            fully_shard(experts[0], mesh=mesh.fsdp_mesh("efsdp"))
            for module in experts:
                assert isinstance(module, FSDPModule)
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        return errors(block_of(model), block_of(parallel), mesh, num_tokens)


def moe_errors(
    degrees: Degrees, num_tokens: list[int], settings: dict[str, Any], checkpoint: bool = False
) -> dict[str, float]:
    mesh = mesh_of(degrees)
    layer = moe_layer(**settings)
    parallel = copy.deepcopy(layer)
    assert parallelize_experts(parallel, mesh) == [parallel.experts]
    if checkpoint:
        parallel.forward = partial(checkpointed, parallel.forward, use_reentrant=False)  # type: ignore[method-assign]
    return errors(layer, parallel, mesh, num_tokens)


def layouts(family: str, degrees: Degrees) -> dict[str, Any]:
    """Per parameter: shape of the part, placements, whether parts make up the whole, bytes it keeps."""
    mesh = mesh_of(degrees)
    model = stock_block(family, torch.float32)
    stock = dict(experts_of(block_of(model)).named_parameters())
    parallelize_experts(model, mesh)
    out: dict[str, Any] = {}
    for name, parameter in experts_of(block_of(model)).named_parameters():
        assert isinstance(parameter, DTensor)
        part = parameter.to_local()
        out[name] = {
            "shape": tuple(part.shape),
            "placements": str(parameter.placements),
            "equal": torch.equal(parameter.full_tensor().reshape(stock[name].shape), stock[name]),
            "bytes": part.untyped_storage().nbytes(),
            "part": part.detach(),
        }
    return out


def meta_and_frozen() -> tuple[bool, bool, str]:
    mesh = mesh_of(EP2)
    with torch.device("meta"):
        layer = moe_layer()
    layer.experts.down_proj.requires_grad_(False)
    parallelize_moe(layer, mesh)
    down, up = layer.experts.down_proj, layer.experts.gate_up_proj
    return down.requires_grad, up.requires_grad, up.device.type


def compiled_errors(family: str, degrees: Degrees, backend: str, dtype: torch.dtype) -> tuple[float, int]:
    """Largest relative difference between compiled and eager block over several batches, and the graphs."""
    mesh, rank = mesh_of(degrees), dist.get_rank()
    if backend == "inductor":
        with warnings.catch_warnings():
            # It defines TorchScript modules when it is imported.
            warnings.simplefilter("ignore", DeprecationWarning)
            importlib.import_module("torch._inductor.compile_fx")
    model = stock_block(family, dtype)
    parallelize_experts(model, mesh)
    eager, block = copy.deepcopy(block_of(model)), block_of(model)
    torch._dynamo.reset()
    counters.clear()
    block.compile(fullgraph=True, backend=backend)
    worst = 0.0
    for seed in range(3):
        x = torch.randn(1, 6, D, dtype=dtype, generator=torch.Generator().manual_seed(10 * seed + rank))
        if seed == 2:
            x = x[:, :1].expand(x.shape).contiguous()  # one token, six times: most experts get none
        results = []
        for one in (eager, block):
            y, grad = run(one, x)
            results.append([y, grad, *(p.grad for p in one.parameters())])
            one.zero_grad()
        for have, want in zip(*results, strict=True):
            have, want = (t.to_local() if isinstance(t, DTensor) else t for t in (have, want))
            if want.abs().max() > 0:
                worst = max(worst, float((have - want).abs().max() / want.abs().max()))
    graphs = counters["stats"]["unique_graphs"]
    torch._dynamo.reset()
    return worst, graphs


def refusals(degrees: Degrees, cases: list[tuple[str, dict[str, Any]]]) -> list[str]:
    mesh, found = mesh_of(degrees), []
    for what, settings in cases:
        layer = moe_layer(**settings)
        if what == "twice":
            parallelize_moe(layer, mesh)
        elif what == "shared parameter":
            layer.experts.scale = nn.Parameter(torch.ones(1))
        try:
            parallelize_moe(layer, mesh)
        except ValueError as error:
            found.append(str(error))
    return found


def normalised_experts() -> str:
    model = stock_block("mixtral", torch.float32)
    experts: Any = experts_of(block_of(model))
    experts.has_post_expert_norm = True
    try:
        parallelize_experts(model, mesh_of(ETP2))
    except ValueError as error:
        return str(error)
    return ""


def no_experts() -> list[nn.Module]:
    return parallelize_experts(nn.Linear(2, 2), mesh_of(EP2))


# ------------------------------------------------------------------ tests


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("degrees", "num_tokens"),
    [
        (EP2, [5, 9]),
        (ETP2, [6, 6]),
        (EP4, [5, 9, 0, 3]),
        (EP2_OF_4, [5, 9, 0, 3]),
        (EP2_ETP2, [3, 3, 6, 6]),
    ],
    ids=lambda value: IDS.get(value, "") if isinstance(value, Degrees) else "",
)
def test_transformers_blocks_are_those_of_one_process(
    ranks: Ranks, family: str, degrees: Degrees, num_tokens: list[int]
) -> None:
    for result in ranks.run(family_errors, degrees.world_size, family, degrees, num_tokens, False):
        assert "experts.down_proj" in result
        assert "experts.gate_up_proj" in result
        assert max(result.values()) < 1e-10, result


@pytest.mark.parametrize(
    ("family", "degrees"),
    [("qwen3_moe", EP2_OF_4), ("gpt_oss", EP2_OF_4), ("qwen3_moe", ETP2_OF_4), ("gpt_oss", ETP2_OF_4)],
    ids=lambda value: IDS.get(value, "") if isinstance(value, Degrees) else value,
)
def test_fsdp_shards_the_parts_over_efsdp(ranks: Ranks, family: str, degrees: Degrees) -> None:
    for result in ranks.run(family_errors, 4, family, degrees, [4, 4, 4, 4], True):
        assert max(result.values()) < 1e-10, result


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"transposed": True, "before": True},
        {"activation": ClampedSwiGLU(), "transposed": True},
        {"activation": ClampedSwiGLU(), "before": True},
        {"bias": False},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
@pytest.mark.parametrize("degrees", [EP4, EP2_ETP2], ids=lambda degrees: IDS[degrees])
def test_trimtab_layers_are_those_of_one_process(
    ranks: Ranks, degrees: Degrees, settings: dict[str, Any]
) -> None:
    for result in ranks.run(moe_errors, 4, degrees, [3, 3, 7, 7], settings):
        assert max(result.values()) < 1e-10, result


@pytest.mark.parametrize("degrees", [EP2, ETP2], ids=lambda degrees: IDS[degrees])
def test_recomputed_in_backward(ranks: Ranks, degrees: Degrees) -> None:
    for result in ranks.run(moe_errors, 2, degrees, [4, 4], {}, checkpoint=True):
        assert max(result.values()) < 1e-10, result


def test_parts_of_whole_experts(ranks: Ranks) -> None:
    for result in ranks.run(layouts, 2, "gpt_oss", EP2):
        assert {name: facts["shape"] for name, facts in result.items()} == {
            "gate_up_proj": (4, 32, 64),
            "gate_up_proj_bias": (4, 64),
            "down_proj": (4, 32, 32),
            "down_proj_bias": (4, 32),
        }
        for facts in result.values():
            assert facts["equal"]
            assert facts["placements"] == "(Shard(dim=0), Replicate())"
            assert facts["bytes"] == facts["part"].numel() * 4


def test_halves_are_kept_apart_so_that_slices_hold_both(ranks: Ranks) -> None:
    first, second = ranks.run(layouts, 2, "qwen3_moe", ETP2)
    stock = experts_of(block_of(stock_block("qwen3_moe", torch.float32)))
    gate_up = stock.get_parameter("gate_up_proj").detach().view(E, 2, 16, D)
    down = stock.get_parameter("down_proj").detach()
    for rank, result in enumerate((first, second)):
        mine = slice(8 * rank, 8 * rank + 8)
        assert torch.equal(result["gate_up_proj"]["part"], gate_up[:, :, mine])
        assert result["gate_up_proj"]["placements"] == "(Shard(dim=0), Shard(dim=2))"
        assert torch.equal(result["down_proj"]["part"], down[:, :, mine])
        assert all(facts["equal"] for facts in result.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_no_rank_of_etp_holds_a_copy(ranks: Ranks, family: str) -> None:
    results = ranks.run(layouts, 4, family, EP2_ETP2)
    for name, parameter in experts_of(block_of(stock_block(family, torch.float32))).named_parameters():
        assert sum(result[name]["part"].numel() for result in results) == parameter.numel()
        for result in results:
            assert result[name]["equal"]
            assert result[name]["bytes"] == parameter.numel() * 4 // 4


def test_meta_and_frozen_parameters_stay_so(ranks: Ranks) -> None:
    assert ranks.run(meta_and_frozen, 2) == [(False, True, "meta")] * 2


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("degrees", [EP2, ETP2], ids=lambda degrees: IDS[degrees])
def test_blocks_compile_as_one_graph(ranks: Ranks, family: str, degrees: Degrees) -> None:
    for error, graphs in ranks.run(
        compiled_errors, 2, family, degrees, "aot_eager", torch.float64, timeout=120
    ):
        assert error < 1e-12
        assert graphs == 1


@pytest.mark.parametrize(
    ("degrees", "dtype", "bound"),
    [(EP2, torch.float32, 1e-5), (ETP2, torch.float64, 1e-12)],
    ids=["ep2", "etp2"],
)
def test_inductor(ranks: Ranks, degrees: Degrees, dtype: torch.dtype, bound: float) -> None:
    for error, graphs in ranks.run(compiled_errors, 2, "gpt_oss", degrees, "inductor", dtype, timeout=300):
        assert error < bound
        assert graphs == 1


def test_what_cannot_be_divided(ranks: Ranks) -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("", {"num_experts": 6}),
        ("twice", {}),
        ("shared parameter", {}),
    ]
    for found in ranks.run(refusals, 4, EP4, cases):
        assert found == [
            "ep=4 must divide num_experts=6, so that ranks hold equally many; choose another ep",
            "gate_up_proj is divided already; divide the experts of a model once, before FSDP",
            "Experts has parameter 'scale', expected only gate_up_proj, gate_up_proj_bias, down_proj, "
            "down_proj_bias: what experts share cannot be divided between them; set ep=1 and etp=1",
        ]
    cases = [("", {"hidden_dim": 5}), ("", {"dim": 7, "hidden_dim": 4})]
    for found in ranks.run(refusals, 2, ETP2, cases):
        assert found == [
            "etp=2 must divide the experts' hidden width 5 of gate_up_proj; set etp=1",
            "etp=2 must divide the model's width 7 of down_proj_bias; set etp=1",
        ]
    assert (
        ranks.run(normalised_experts, 2)
        == [
            "MixtralExperts normalises each expert's output, of which ranks of etp have parts of a sum; set etp=1"
        ]
        * 2
    )


def test_a_stage_without_experts(ranks: Ranks) -> None:
    assert ranks.run(no_experts, 2) == [[], []]
