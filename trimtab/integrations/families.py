"""Router families of Hugging Face transformers, one table row per router class.

Shapes: T tokens, D model, E experts, K top-k.

A row says what cannot be read off a router's output: which score function the model means, where the
selection bias lives, whether selection is limited to expert groups. transformers is not imported:
routers are recognised by class name, so a row also serves a fork or a subclass that keeps the name.
`trimtab.integrations.discovery.verify` checks every row against the class it finds.

Adding a family is one row here, one factory in ``tests/hf_models.py`` and its name in the tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from trimtab.integrations.layouts import (
    Repack,
    Replace,
    Unpack,
    repack_common,
    repack_dense_scores,
    replace_common,
    replace_dense_scores,
    unpack_common,
    unpack_dense_scores,
    unpack_probabilities,
)
from trimtab.scores import SCORE_NAMES, ScoreName

# Selection limited to expert groups.


def never_grouped(router: nn.Module) -> bool:
    """False: the family has no expert groups."""
    return False


def grouped_by_count(router: nn.Module) -> bool:
    """Whether fewer than all expert groups may be chosen (``num_group``, ``topk_group``)."""
    num_groups = getattr(router, "num_group", None)
    return num_groups is not None and int(getattr(router, "topk_group", num_groups)) < int(num_groups)


def grouped_by_method(router: nn.Module) -> bool:
    """DeepSeek-V2: groups count only under ``topk_method="group_limited_greedy"``."""
    return getattr(router, "topk_method", None) == "group_limited_greedy" and grouped_by_count(router)


# Who saves the router's input tensor itself, not a cast copy, for backward in a bfloat16 model. It tells the
# recompute mode whether holding the input is free; a frozen linear does not save its input.


def _trains(module: nn.Module | None) -> bool:
    return module is not None and any(p.requires_grad for p in module.parameters())


def input_kept_by_shared_expert(router: nn.Module, block: nn.Module) -> bool:
    """The gate casts to float32 first; a shared expert or a projection before the experts saves the input."""
    names = ("shared_experts", "shared_expert", "shared_mlp", "pre_expert_proj", "fc1_latent_proj")
    return any(_trains(getattr(block, name, None)) for name in names)


def input_kept_by_gate(router: nn.Module, block: nn.Module) -> bool:
    """The gate multiplies in the model's dtype, so its own linear saves the input, if not a shared expert."""
    return _trains(router) or input_kept_by_shared_expert(router, block)


def input_not_kept(router: nn.Module, block: nn.Module) -> bool:
    """The gate casts to float32 first and nothing else in the block saves the input."""
    return False


# Score functions that the model configuration chooses.


def score_from_selection_fn(router: nn.Module) -> ScoreName:
    """Cohere 2 MoE: ``expert_selection_fn`` names softmax or sigmoid."""
    return "sigmoid" if getattr(router, "expert_selection_fn", "softmax") == "sigmoid" else "softmax"


def score_from_activation(router: nn.Module) -> ScoreName:
    """DeepSeek-V4, Inkling 2: ``scoring_func`` names an activation class."""
    name = type(getattr(router, "score_fn", None)).__name__.lower()
    return "sigmoid" if "sigmoid" in name else "sqrt_softplus"


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What trimtab knows about one router class.

    Args:
        router_class: class name of the router module.
        model_types: ``config.model_type`` of the models that use it; documentation only.
        score: score function s whose normalised value p = s / sum_j s_j the balance loss uses, or a function
            of the router where its configuration chooses. Routers that take the softmax after the top-k
            are "softmax" over all logits.
        source: where the row's facts come from.
        unpack: (output, top_k) -> (logits_TE, weights, ids_TK); weights are (T, K), or (T, E) in a dense
            layout. Traced by torch.compile.
        repack: (output, weights) -> output with the weights replaced. Traced by torch.compile.
        replace: (output, weights_TK, ids_TK) -> output with weights and ids replaced, to replay a routing
            (`trimtab.replay_routing`); not needed where none is replayed. Traced by torch.compile.
        dense_weights: the weights are (T, E), zero where an expert is not chosen.
        num_experts: attribute path on the router of E, the number of logits.
        top_k: attribute path on the router of K.
        weight: attribute path on the router of the gate's (E, D) weight.
        bias: attribute path on the router of the gate's own (E,) bias, a part of the logits.
        expert_bias: attribute path of the selection bias, from ``router.`` or ``block.``. A ``block.`` bias
            is handed to the router's forward as the second argument.
        bias_on_logits: the selection bias is added to the logits instead of the scores.
        grouped: router -> whether selection is limited to expert groups, so that the executed top-k is
            not the plain top-k of scores plus bias.
        keeps_input: (router, block) -> whether the router's input tensor itself (not a cast copy) is saved
            for backward anyway in a bfloat16 model.
        linear_logits: logits are F.linear(x, weight, bias), possibly in a higher dtype, and nothing else.
        exact_logits: False where only probabilities are returned and `unpack` gives their logarithm:
            balance losses are exact, a z-loss is meaningless.
        weights_follow_score: weights are proportional to the score at the chosen experts, per token. False
            where a router weights by something else; the probe then cannot confirm the score function.
        input_ndim: rank of the router's input: 2 for (T, D), 3 for (B, S, D). Used by the probe.
        probe_ones: attribute paths of learned factors that the probe sets to one.

    Raises:
        ValueError: an unknown score function, a path without ``router.`` or ``block.``, or another rank.
    """

    router_class: str
    model_types: tuple[str, ...]
    score: ScoreName | Callable[[nn.Module], ScoreName]
    source: str
    unpack: Unpack = unpack_common
    repack: Repack = repack_common
    replace: Replace = replace_common
    dense_weights: bool = False
    num_experts: str = "num_experts"
    top_k: str = "top_k"
    weight: str = "weight"
    bias: str | None = None
    expert_bias: str | None = None
    bias_on_logits: bool = False
    grouped: Callable[[nn.Module], bool] = never_grouped
    keeps_input: Callable[[nn.Module, nn.Module], bool] = input_kept_by_gate
    linear_logits: bool = True
    exact_logits: bool = True
    weights_follow_score: bool = True
    input_ndim: int = 2
    probe_ones: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.score, str) and self.score not in SCORE_NAMES:
            choices = ", ".join(map(repr, SCORE_NAMES))
            raise ValueError(
                f"Family({self.router_class}): score={self.score!r} is unknown; choose one of {choices}"
            )
        if self.expert_bias is not None and self.expert_bias.split(".")[0] not in ("router", "block"):
            raise ValueError(
                f"Family({self.router_class}): expert_bias={self.expert_bias!r} must start with 'router.' or "
                f"'block.'; write 'router.{self.expert_bias}' if the router holds it"
            )
        if self.input_ndim not in (2, 3):
            raise ValueError(f"Family({self.router_class}): input_ndim={self.input_ndim} must be 2 or 3")

    def score_of(self, router: nn.Module) -> ScoreName:
        """The score function of this router instance."""
        return self.score(router) if callable(self.score) else self.score

    @property
    def bias_is_argument(self) -> bool:
        """Whether the block hands the selection bias to the router's forward."""
        return self.expert_bias is not None and self.expert_bias.startswith("block.")


def _row(router_class: str, *model_types: str, **facts: Any) -> Family:
    folder = facts.pop("folder", model_types[0])
    source = f"transformers 5.23, models/{folder}/modeling_{folder}.py, {router_class}"
    return Family(router_class=router_class, model_types=model_types, source=source, **facts)


def _deepseek_row(router_class: str, *model_types: str, **facts: Any) -> Family:
    # Sigmoid scores in float32, groups ranked by the sum of their two best, bias buffer on the router.
    defaults: dict[str, Any] = {
        "score": "sigmoid",
        "expert_bias": "router.e_score_correction_bias",
        "grouped": grouped_by_count,
        "keeps_input": input_kept_by_shared_expert,
    }
    return _row(router_class, *model_types, **(defaults | facts))


_ROWS = (
    # softmax over all experts, then top-k; renormalised always or by flag
    _row("Qwen2MoeTopKRouter", "qwen2_moe", score="softmax"),
    _row("Qwen3MoeTopKRouter", "qwen3_moe", score="softmax"),
    _row("Qwen3NextTopKRouter", "qwen3_next", score="softmax"),
    _row("Qwen3VLMoeTextTopKRouter", "qwen3_vl_moe", "qwen3_vl_moe_text", score="softmax"),
    _row("Qwen3_5MoeTopKRouter", "qwen3_5_moe", "qwen3_5_moe_text", score="softmax"),
    _row("Qwen3OmniMoeTextTopKRouter", "qwen3_omni_moe", score="softmax"),
    _row("Qwen3OmniMoeThinkerTextTopKRouter", "qwen3_omni_moe", score="softmax"),
    _row("Qwen3OmniMoeTalkerTextTopKRouter", "qwen3_omni_moe", score="softmax"),
    _row("Qwen4ExpTextTopKRouter", "qwen4_exp", "qwen4_exp_text", score="softmax"),
    _row("MixtralTopKRouter", "mixtral", score="softmax"),
    _row("MiniMaxTopKRouter", "minimax", score="softmax"),
    _row("OlmoeTopKRouter", "olmoe", score="softmax"),
    _row("FlexOlmoTopKRouter", "flex_olmo", score="softmax"),
    _row("MellumTopKRouter", "mellum", score="softmax"),
    _row("JambaTopKRouter", "jamba", score="softmax"),
    _row(
        "HunYuanMoEV1Gate",
        "hunyuan_v1_moe",
        score="softmax",
        weight="wg.weight",
        keeps_input=input_kept_by_shared_expert,
    ),
    _row(
        "Ernie4_5_MoeTopKRouter",
        "ernie4_5_moe",
        score="softmax",
        expert_bias="router.moe_statics.e_score_correction_bias",
        keeps_input=input_kept_by_shared_expert,
    ),
    # top-k of the logits, then softmax over the chosen
    _row("GptOssTopKRouter", "gpt_oss", score="softmax", bias="bias"),
    _row(
        "OpenAIPrivacyFilterTopKRouter",
        "openai_privacy_filter",
        score="softmax",
        bias="bias",
        keeps_input=input_not_kept,
    ),
    _row("GraniteMoeTopKRouter", "granitemoe", score="softmax"),
    _row("GraniteMoeSharedTopKRouter", "granitemoeshared", score="softmax"),
    _row("GraniteMoeHybridTopKRouter", "granitemoehybrid", score="softmax"),
    _row("GraniteMoeSWATopKRouter", "granitemoe_swa", score="softmax"),
    _row("AriaTextTopKRouter", "aria", "aria_text", score="softmax"),
    _row("Cohere2MoeTopKRouter", "cohere2_moe", score=score_from_selection_fn),
    # softmax, experts limited to groups, scaled
    _row(
        "DeepseekV2TopkRouter",
        "deepseek_v2",
        score="softmax",
        grouped=grouped_by_method,
        keeps_input=input_kept_by_shared_expert,
    ),
    _row(
        "DeepseekOcr2TextTopkRouter",
        "deepseek_ocr2",
        score="softmax",
        grouped=grouped_by_method,
        keeps_input=input_kept_by_shared_expert,
    ),
    _row(
        "UnlimitedOcrTextTopkRouter",
        "unlimited_ocr",
        score="softmax",
        grouped=grouped_by_method,
        keeps_input=input_kept_by_shared_expert,
    ),
    _row("Mistral4TopkRouter", "mistral4", score="softmax", grouped=grouped_by_count),
    _row(
        "MistralLarge4TextTopkRouter",
        "mistral_large4",
        score="softmax",
        grouped=grouped_by_count,
        keeps_input=input_kept_by_shared_expert,
    ),
    # E counts the zero-computation experts too
    _row(
        "LongcatFlashTopkRouter",
        "longcat_flash",
        score="softmax",
        num_experts="n_routed_experts",
        weight="classifier.weight",
        expert_bias="router.e_score_correction_bias",
        keeps_input=input_not_kept,
    ),
    # sigmoid, bias buffer on the router, groups
    _deepseek_row("DeepseekV3TopkRouter", "deepseek_v3"),
    _deepseek_row("DeepseekV32TopkRouter", "deepseek_v32"),
    _deepseek_row("Glm4MoeTopkRouter", "glm4_moe"),
    _deepseek_row("Glm4MoeLiteTopkRouter", "glm4_moe_lite"),
    _deepseek_row("Glm4vMoeTextTopkRouter", "glm4v_moe", "glm4v_moe_text"),
    _deepseek_row("GlmMoeDsaTopkRouter", "glm_moe_dsa"),
    _deepseek_row("Glm5NextTextTopkRouter", "glm5_next", "glm5_next_text"),
    _deepseek_row("Dots1TopkRouter", "dots1"),
    _deepseek_row("Dots3NoteTextTopkRouter", "dots3_note", "dots3_note_text"),
    _deepseek_row("KimiLinearTopkRouter", "kimi_linear"),
    _deepseek_row("ExaoneMoeTopkRouter", "exaone_moe"),
    _deepseek_row("SolarOpenTopkRouter", "solar_open"),
    _deepseek_row("AXK1TopkRouter", "axk1"),
    _deepseek_row("AXK2TopkRouter", "axk2"),
    _deepseek_row("BailingHybridTopkRouter", "bailing_hybrid"),
    _deepseek_row("HYV4TopkRouter", "hy_v4"),
    _deepseek_row("NemotronHTopkRouter", "nemotron_h"),
    _deepseek_row("MiMoV2FlashTopkRouter", "mimo_v2_flash", keeps_input=input_not_kept),
    _deepseek_row("BeamTopKRouter", "beam", keeps_input=input_not_kept),
    # sigmoid, no groups
    _row(
        "Llama4Router",
        "llama4",
        "llama4_text",
        score="sigmoid",
        unpack=unpack_dense_scores,
        repack=repack_dense_scores,
        replace=replace_dense_scores,
        dense_weights=True,
    ),
    _row("FlintTopKRouter", "flint", score="sigmoid", keeps_input=input_kept_by_shared_expert),
    _row("MiniMaxM2TopKRouter", "minimax_m2", score="sigmoid", expert_bias="block.e_score_correction_bias"),
    _row(
        "MiniMaxM3VLTopKRouter",
        "minimax_m3_vl",
        "minimax_m3_vl_text",
        score="sigmoid",
        expert_bias="router.e_score_correction_bias",
    ),
    _row("Step3p7TopKRouter", "step3p7", score="sigmoid", expert_bias="router.e_score_correction_bias"),
    _row(
        "HYV3TopKRouter",
        "hy_v3",
        score="sigmoid",
        expert_bias="block.e_score_correction_bias",
        keeps_input=input_kept_by_shared_expert,
    ),
    _row(
        "AfmoeTokenChoiceRouter",
        "afmoe",
        score="sigmoid",
        weight="gate.weight",
        expert_bias="block.expert_bias",
        input_ndim=3,
    ),
    _row("Lfm2MoeTopKRouter", "lfm2_moe", score="sigmoid", expert_bias="block.expert_bias"),
    _row(
        "Kolibri1TopKRouter",
        "kolibri1",
        score="sigmoid",
        expert_bias="router.e_score_correction_bias",
        bias_on_logits=True,
        keeps_input=input_kept_by_shared_expert,
    ),
    # soft-capped and scaled logits: what the score sees is not the gate's plain output
    _row(
        "LagunaTopKRouter",
        "laguna",
        score="sigmoid",
        expert_bias="router.e_score_correction_bias",
        linear_logits=False,
    ),
    _row(
        "MuseSparkTopkRouter",
        "muse_spark",
        score="sigmoid",
        expert_bias="router.e_score_correction_bias",
        keeps_input=input_kept_by_shared_expert,
        linear_logits=False,
    ),
    # the shared experts' logits are rows of the same gate, cut off the returned logits
    _row(
        "InklingTopkRouter",
        "inkling",
        "inkling_text",
        score="sigmoid",
        expert_bias="router.e_score_correction_bias",
        keeps_input=input_kept_by_shared_expert,
        linear_logits=False,
        probe_ones=("global_scale",),
    ),
    # sqrt-softplus
    _row(
        "DeepseekV4TopKRouter",
        "deepseek_v4",
        score=score_from_activation,
        expert_bias="router.e_score_correction_bias",
    ),
    _row(
        "Inkling2TopKRouter",
        "inkling2",
        score=score_from_activation,
        expert_bias="router.e_score_correction_bias",
        keeps_input=input_not_kept,
    ),
    # sampled in training, masked softmax weights: the ids and logits it returns are still what it did
    _row("PhimoeTopKRouter", "phimoe", score="softmax", weights_follow_score=False),
    # probabilities in place of logits, gate behind a norm
    _row(
        "Gemma4TextRouter",
        "gemma4",
        "gemma4_text",
        score="softmax",
        unpack=unpack_probabilities,
        num_experts="config.num_experts",
        top_k="config.top_k_experts",
        weight="proj.weight",
        linear_logits=False,
        exact_logits=False,
        keeps_input=input_not_kept,
        probe_ones=("per_expert_scale",),
    ),
    _row(
        "DiffusionGemmaTextRouter",
        "diffusion_gemma",
        score="softmax",
        unpack=unpack_probabilities,
        num_experts="config.num_experts",
        top_k="config.top_k_experts",
        weight="proj.weight",
        linear_logits=False,
        exact_logits=False,
        keeps_input=input_not_kept,
        probe_ones=("per_expert_scale",),
    ),
)

FAMILIES: dict[str, Family] = {family.router_class: family for family in _ROWS}


def _own_score(router: nn.Module) -> ScoreName:
    return cast(ScoreName, router.score)


def _own_restriction(router: nn.Module) -> bool:
    return bool(router._limits_groups or router.config.forced_balance)  # type: ignore[union-attr]


def trimtab_family(router: nn.Module) -> Family:
    """The row of trimtab's own router, recognised by its package as well as its name."""
    config = cast(Any, router.config)
    return Family(
        router_class="Router",
        model_types=("trimtab",),
        score=_own_score,
        source="trimtab/router.py, Router",
        bias="bias",
        expert_bias="router.expert_bias_E",
        bias_on_logits=bool(config.score_after_top_k),
        grouped=_own_restriction,
        # Input jitter happens inside the router, and without a dtype the gate's own casts are not known here.
        linear_logits=bool(config.input_jitter == 0 and config.dtype is not None),
    )


# Router-like classes that are known not to fit, each with the reason the error gives.
UNSERVABLE: dict[str, str] = {
    "DbrxRouter": "it returns logits only; its block takes the top-k, out of reach of a hook on the router",
    "JetMoeTopKGating": "it returns expert-sorted indices and gates, not one row of ids per token, and the "
    "model routes its attention too",
    "DogeCDMoE": "its block routes by product keys; there is no router module to hook",
    "SwitchTransformersTop1Router": "it returns capacity-limited dispatch masks instead of expert ids",
    "NllbMoeTop2Router": "it returns capacity-limited dispatch masks instead of expert ids",
    "DeepseekV4HashRouter": "it routes by token id, so no balance loss can change its load",
    "ZayaRouter": "it routes to a skip class besides the experts, reports skipped tokens as expert 0 and "
    "carries router state from layer to layer",
    "Ernie4_5_VLMoeMoeTopKRouter": "it sees only the tokens of one modality, gathered without their batch "
    "position",
    "Dots3NoteVisionTopKRouter": "it routes image patches inside the vision tower, outside the text batch",
}
