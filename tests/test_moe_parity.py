"""The layer against the MoE blocks of transformers: same weights, same outputs, same gradients.

Each row of `FAMILIES` maps a family to a `MoE.Config` and to the state-dict names of its block. Vendor names
live here and in `trimtab.integrations` only.

Not expressible, and why:
- deepseek_v4's hash-routed first layers choose experts by a table of token ids: the layer takes the ids as
  `replay_ids_TK`, but does not hold the table. The router of its other layers is compared below on its own.
- gemma4 normalises and scales the router's input and has a learned scale per expert.
- phimoe samples its second expert with its own estimator (sparsemixer); jetmoe also routes attention.
- nemotron_h has experts without a gate; longcat_flash and zaya have experts that are the identity.
- laguna soft-caps its logits; kolibri1 adds its bias to sigmoid logits instead of to scores.
- mixtral's `router_jitter_noise` also multiplies the experts' input in training; ours only the router's, as
  published. They agree at 0, the default.
"""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest
import torch

from trimtab.experts import ClampedSwiGLU, Experts, GatedActivation, SharedExperts, SwiGLU
from trimtab.moe import MoE
from trimtab.router import Router

pytest.importorskip("transformers")

D, F, F_SHARED, E, K, B, S = 16, 12, 20, 8, 3, 2, 11
SCALE = 2.5
SHARED = SharedExperts.Config(dim=D, hidden_dim=F_SHARED)
SHARED_2F = SharedExperts.Config(dim=D, hidden_dim=2 * F)
GATED = SharedExperts.Config(dim=D, hidden_dim=F_SHARED, gated=True)
EXPERT_NAMES = {
    "router.weight": "gate.weight",
    "experts.gate_up_proj": "experts.gate_up_proj",
    "experts.down_proj": "experts.down_proj",
}


def shared_names(theirs: str, gate: str | None = None) -> dict[str, str]:
    names = {f"shared_experts.{p}_proj.weight": f"{theirs}.{p}_proj.weight" for p in ("gate", "up", "down")}
    return names | ({"shared_expert_gate.weight": f"{gate}.weight"} if gate else {})


@dataclass(frozen=True, kw_only=True)
class Family:
    """A transformers block, the equal MoE.Config, and which of its tensors each of ours is."""

    block: str
    hf_config: str
    hf_fields: Mapping[str, object]
    router: Router.Config
    names: Mapping[str, str]
    shared: SharedExperts.Config | None = None
    score_before_experts: bool = False
    activation: GatedActivation = field(default_factory=SwiGLU)
    bias: bool = False
    transposed: bool = False
    implementations: tuple[str, ...] = ("eager", "grouped_mm")
    exact_output: bool = False  # against grouped_mm, where normalisation does not take another route
    output: Callable[[object], torch.Tensor] = field(default=lambda y: y if torch.is_tensor(y) else y[0])

    def config(self) -> MoE.Config:
        experts = Experts.Config(
            dim=D,
            hidden_dim=F,
            num_experts=E,
            activation=self.activation,
            bias=self.bias,
            transposed=self.transposed,
        )
        return MoE.Config(
            router=self.router,
            experts=experts,
            shared_experts=self.shared,
            score_before_experts=self.score_before_experts,
        )


def softmax_router(normalize: bool, **options) -> Router.Config:
    return Router.Config(dim=D, num_experts=E, top_k=K, score="softmax", normalize_top_k=normalize, **options)


def sigmoid_router(**options) -> Router.Config:
    options = {"top_k": K, "normalize_top_k": True} | options
    return Router.Config(dim=D, num_experts=E, score="sigmoid", **options)


QWEN = {"num_experts": E, "num_experts_per_tok": K, "hidden_size": D, "moe_intermediate_size": F}
QWEN_SHARED = QWEN | {"shared_expert_intermediate_size": F_SHARED}
MIXTRAL = {"num_local_experts": E, "num_experts_per_tok": K, "hidden_size": D, "intermediate_size": F}
BIAS = {"router.expert_bias_E": "gate.e_score_correction_bias"}
DEEPSEEK = {
    "n_routed_experts": E,
    "num_experts_per_tok": K,
    "hidden_size": D,
    "moe_intermediate_size": F,
    "n_shared_experts": 2,
    "routed_scaling_factor": SCALE,
}

FAMILIES = {
    "qwen3_moe": Family(
        block="Qwen3MoeSparseMoeBlock",
        hf_config="Qwen3MoeConfig",
        hf_fields=QWEN | {"norm_topk_prob": True},
        router=softmax_router(True),
        names=EXPERT_NAMES,
    ),
    "qwen2_moe": Family(
        exact_output=True,
        block="Qwen2MoeSparseMoeBlock",
        hf_config="Qwen2MoeConfig",
        hf_fields=QWEN_SHARED | {"norm_topk_prob": False},
        router=softmax_router(False),
        shared=GATED,
        names=EXPERT_NAMES | shared_names("shared_expert", gate="shared_expert_gate"),
    ),
    "qwen3_next": Family(
        block="Qwen3NextSparseMoeBlock",
        hf_config="Qwen3NextConfig",
        hf_fields=QWEN_SHARED | {"norm_topk_prob": True},
        router=softmax_router(True),
        shared=GATED,
        names=EXPERT_NAMES | shared_names("shared_expert", gate="shared_expert_gate"),
    ),
    "qwen3_vl_moe": Family(
        block="Qwen3VLMoeTextSparseMoeBlock",
        hf_config="Qwen3VLMoeTextConfig",
        hf_fields=QWEN,
        router=softmax_router(True),
        names=EXPERT_NAMES,
    ),
    "qwen3_5_moe": Family(
        block="Qwen3_5MoeSparseMoeBlock",
        hf_config="Qwen3_5MoeTextConfig",
        hf_fields=QWEN_SHARED,
        router=softmax_router(True),
        shared=GATED,
        names=EXPERT_NAMES | shared_names("shared_expert", gate="shared_expert_gate"),
    ),
    "mixtral": Family(
        block="MixtralSparseMoeBlock",
        hf_config="MixtralConfig",
        hf_fields=MIXTRAL,
        router=softmax_router(True),
        names=EXPERT_NAMES,
    ),
    "olmoe": Family(
        exact_output=True,
        block="OlmoeSparseMoeBlock",
        hf_config="OlmoeConfig",
        hf_fields=MIXTRAL | {"num_experts": E, "norm_topk_prob": False},
        router=softmax_router(False),
        names=EXPERT_NAMES,
    ),
    "granitemoe": Family(
        exact_output=True,
        block="GraniteMoeMoE",
        hf_config="GraniteMoeConfig",
        hf_fields=MIXTRAL,
        router=softmax_router(True, score_after_top_k=True),
        names=EXPERT_NAMES | {"router.weight": "router.weight"},
    ),
    "gpt_oss": Family(
        exact_output=True,
        block="GptOssMLP",
        hf_config="GptOssConfig",
        hf_fields=MIXTRAL,
        router=softmax_router(True, score_after_top_k=True, linear_bias=True),
        activation=ClampedSwiGLU(),
        bias=True,
        transposed=True,
        names=EXPERT_NAMES
        | {
            "router.weight": "router.weight",
            "router.bias": "router.bias",
            "experts.gate_up_proj_bias": "experts.gate_up_proj_bias",
            "experts.down_proj_bias": "experts.down_proj_bias",
        },
    ),
    "ernie4_5_moe": Family(
        block="Ernie4_5_MoeSparseMoeBlock",
        hf_config="Ernie4_5_MoeConfig",
        hf_fields={
            "moe_num_experts": E,
            "moe_k": K,
            "hidden_size": D,
            "moe_intermediate_size": F,
            "moe_num_shared_experts": 2,
        },
        router=softmax_router(True, expert_bias=True),
        shared=SHARED_2F,
        names=EXPERT_NAMES
        | shared_names("shared_experts")
        | {"router.expert_bias_E": "gate.moe_statics.e_score_correction_bias"},
    ),
    "minimax_m2": Family(
        block="MiniMaxM2SparseMoeBlock",
        hf_config="MiniMaxM2Config",
        hf_fields=MIXTRAL,
        router=sigmoid_router(expert_bias=True),
        names=EXPERT_NAMES | {"router.expert_bias_E": "e_score_correction_bias"},
    ),
    "deepseek_v2": Family(
        exact_output=True,
        block="DeepseekV2Moe",
        hf_config="DeepseekV2Config",
        hf_fields=DEEPSEEK
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_attention_heads": 2},
        router=softmax_router(False, scale=SCALE, num_groups=4, top_k_groups=2, group_score="max"),
        shared=SHARED_2F,
        names=EXPERT_NAMES | shared_names("shared_experts"),
    ),
    "deepseek_v3": Family(
        block="DeepseekV3MoE",
        hf_config="DeepseekV3Config",
        hf_fields=DEEPSEEK | {"n_group": 4, "topk_group": 2, "norm_topk_prob": True},
        router=sigmoid_router(
            expert_bias=True, scale=SCALE, num_groups=4, top_k_groups=2, group_score="top2_sum"
        ),
        shared=SHARED_2F,
        names=EXPERT_NAMES | shared_names("shared_experts") | BIAS,
    ),
    "glm4_moe": Family(
        block="Glm4MoeMoE",
        hf_config="Glm4MoeConfig",
        hf_fields=DEEPSEEK | {"n_group": 1, "topk_group": 1, "norm_topk_prob": True},
        router=sigmoid_router(expert_bias=True, scale=SCALE),
        shared=SHARED_2F,
        names=EXPERT_NAMES | shared_names("shared_experts") | BIAS,
    ),
    "llama4": Family(
        block="Llama4TextMoe",
        hf_config="Llama4TextConfig",
        hf_fields=MIXTRAL | {"num_experts_per_tok": 1},
        router=sigmoid_router(top_k=1, normalize_top_k=False),
        shared=SharedExperts.Config(dim=D, hidden_dim=F),
        score_before_experts=True,
        transposed=True,
        implementations=("eager",),
        names=EXPERT_NAMES | shared_names("shared_expert") | {"router.weight": "router.weight"},
    ),
}


def hf_module(name: str, kind: str):
    return importlib.import_module(f"transformers.models.{name}.{kind}_{name}")


def build_pair(name: str, family: Family, implementation: str, dtype: torch.dtype):
    config = getattr(hf_module(name, "configuration"), family.hf_config)(**family.hf_fields)
    config._experts_implementation = implementation
    theirs = getattr(hf_module(name, "modeling"), family.block)(config).to(dtype)
    ours = family.config().build(dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    state = theirs.state_dict()
    for value in state.values():
        value.copy_(0.5 * torch.randn(value.shape, generator=generator))
    mapped = {
        mine: state[their].reshape(ours.state_dict()[mine].shape) for mine, their in family.names.items()
    }
    assert set(family.names.values()) == set(state), "a tensor of the block is not mapped"
    ours.load_state_dict(mapped)
    return ours, theirs


def run(module: torch.nn.Module, output, x_BSD: torch.Tensor, grad_BSD: torch.Tensor):
    x_BSD = x_BSD.clone().requires_grad_()
    y_BSD = output(module(x_BSD)).reshape(x_BSD.shape)
    y_BSD.backward(grad_BSD)
    return y_BSD.detach(), x_BSD.grad, {n: p.grad for n, p in module.named_parameters() if p.requires_grad}


CASES = [(name, i) for name, family in FAMILIES.items() for i in family.implementations]


@pytest.mark.parametrize(("name", "implementation"), CASES)
def test_output_and_gradients_equal_transformers(name, implementation):
    family = FAMILIES[name]
    ours, theirs = build_pair(name, family, implementation, torch.float32)
    generator = torch.Generator().manual_seed(1)
    x_BSD = torch.randn(B, S, D, generator=generator)
    grad_BSD = torch.randn(B, S, D, generator=generator) / (B * S)
    y, dx, grads = run(ours, lambda y: y, x_BSD, grad_BSD)
    y_ref, dx_ref, grads_ref = run(theirs, family.output, x_BSD, grad_BSD)

    def close(actual, expected):
        scale = max(1.0, expected.abs().max().item())
        assert (actual - expected).abs().max().item() <= 1e-6 * scale

    close(y, y_ref)
    if family.exact_output and implementation == "grouped_mm":
        assert torch.equal(y, y_ref)
    close(dx, dx_ref)
    assert len(grads) == len(grads_ref)
    for mine, grad in grads.items():
        assert grad_is_informative(grad), mine
        close(grad, grads_ref[family.names[mine]])


def grad_is_informative(grad: torch.Tensor) -> bool:
    # A comparison of two zero gradients would pass with the feature removed.
    return grad.abs().max().item() > 1e-4


def test_the_expert_bias_and_the_groups_change_the_choice():
    # Guards the table: with a bias or groups that choose nothing, the rows above would pass without them.
    x_TD = torch.randn(64, D, generator=torch.Generator().manual_seed(2))
    for name in ("deepseek_v2", "deepseek_v3", "glm4_moe", "minimax_m2", "ernie4_5_moe"):
        ours, _ = build_pair(name, FAMILIES[name], "eager", torch.float32)
        logits_TE, _, ids_TK = ours.router(x_TD)
        plain_ids_TK = logits_TE.topk(K, dim=-1).indices
        changed = (ids_TK.sort(-1).values != plain_ids_TK.sort(-1).values).any(-1).float().mean()
        assert changed > 0.2, name


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_bfloat16_block_stays_within_rounding_of_transformers(name):
    family = FAMILIES[name]
    ours, theirs = build_pair(name, family, "eager", torch.bfloat16)
    x_BSD = torch.randn(B, S, D, generator=torch.Generator().manual_seed(3), dtype=torch.bfloat16)
    with torch.no_grad():
        # The gate's bfloat16 logits differ from ours in float32 and may choose other experts: replay theirs.
        router = theirs.gate if hasattr(theirs, "gate") else theirs.router
        *_, ids_TK = router(x_BSD if name == "deepseek_v3" else x_BSD.reshape(-1, D))
        y_BSD = ours(x_BSD, replay_ids_TK=ids_TK)
        expected_BSD = family.output(theirs(x_BSD)).reshape(x_BSD.shape)
    assert y_BSD.dtype == torch.bfloat16
    error = (y_BSD.float() - expected_BSD.float()).abs().max()
    assert error <= 2**-6 * expected_BSD.float().abs().max()


def test_sqrt_softplus_router_equals_deepseek_v4():
    modeling, configuration = hf_module("deepseek_v4", "modeling"), hf_module("deepseek_v4", "configuration")
    config = configuration.DeepseekV4Config(
        n_routed_experts=E, num_experts_per_tok=K, hidden_size=D, routed_scaling_factor=1.5
    )
    theirs = modeling.DeepseekV4TopKRouter(config)
    ours = Router.Config(
        dim=D,
        num_experts=E,
        top_k=K,
        score="sqrt_softplus",
        normalize_top_k=True,
        scale=1.5,
        expert_bias=True,
    ).build()
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        ours.weight.copy_(torch.randn(E, D, generator=generator))
        ours.expert_bias_E.copy_(torch.randn(E, generator=generator))
        theirs.weight.copy_(ours.weight)
        theirs.e_score_correction_bias.copy_(ours.expert_bias_E)
    x_TD = torch.randn(32, D, generator=generator)
    _, weights_TK, ids_TK = ours(x_TD)
    _, expected_TK, expected_ids_TK = theirs(x_TD)
    order, expected_order = ids_TK.argsort(-1), expected_ids_TK.argsort(-1)
    assert torch.equal(ids_TK.gather(1, order), expected_ids_TK.gather(1, expected_order))
    torch.testing.assert_close(
        weights_TK.gather(1, order), expected_TK.gather(1, expected_order), rtol=0, atol=1e-6
    )
