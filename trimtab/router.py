"""Router: a linear gate that chooses K of E experts for every token and weights them.

Shape suffixes: T tokens, B sequences, S length, D model, E experts, K top-k, G expert groups.
"""

import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.balanced_routing import route_balanced
from trimtab.hooks import ROUTER_STATE, RouterState, after_router
from trimtab.route_ops import choose_and_weigh
from trimtab.routing import GroupScore, Routing
from trimtab.scores import ScoreName, check_score


class Router(nn.Module):
    """Choose `top-k(s(x @ weight.T) + expert_bias)` and weight the chosen experts by their scores s.

    The returned logits are those of the scores, before the expert bias. Losses attach to `topk_weights_TK`: with a
    balancer attached, the forward runs as one node that counts and whose backward holds every objective
    (`trimtab.fused`).

    Attributes:
        num_experts: E.
        top_k: K.
        score: name of the score function.
        routing: how experts are chosen and weighted.
        weight: (E, D) parameter.
        bias: (E,) parameter added to the logits, or None.
        expert_bias_E: (E,) float32 buffer added for selection only, or None. It stays float32 whatever dtype
            the module is cast to: updates of 1e-3 would be lost in bfloat16.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """Settings of `Router`.

        Attributes:
            dim: D, width of the model.
            num_experts: E.
            top_k: K, experts per token.
            score: score function s of the logits.
            normalize_top_k: divide the K weights by their sum.
            scale: factor on the weights, applied last.
            score_after_top_k: choose by the logits and take the softmax over the K chosen ones (gpt-oss,
                Granite), whose weights sum to 1 whatever `normalize_top_k` says.
            num_groups: G, groups of E / G consecutive experts.
            top_k_groups: groups a token may choose from.
            group_score: value of a group: its best expert ("max", DeepSeek-V2) or the sum of its best two
                ("top2_sum", DeepSeek-V3).
            expert_bias: hold `expert_bias_E`, added to what top-k ranks (the scores; the logits under
                `score_after_top_k`), never to the weights.
            linear_bias: add a learned bias to the logits.
            dtype: the gate computes in this dtype or in the input's if that is wider; None: in the input's.
                Scores and weights are computed in float32 at least.
            input_jitter: j in [0, 1): in training multiply the gate's input by uniform(1 - j, 1 + j).
            forced_balance: ignore the scores and deal experts round-robin, for benchmarks and debugging;
                weights are the scores of the experts dealt.
            init_std: standard deviation of the normal that initialises `weight`; biases start at 0.

        Raises:
            ValueError: fields out of range or in contradiction.

        Source: input jitter, Fedus et al. 2021, arXiv:2101.03961, appendix C; groups, DeepSeek-V2,
            arXiv:2405.04434, section 2.2.2; expert bias, DeepSeek-V3, arXiv:2412.19437, eq. 12-16. Deviation:
            weights are normalised in log space, without an epsilon in the denominator.
        """

        dim: int
        num_experts: int
        top_k: int
        score: ScoreName
        normalize_top_k: bool
        scale: float = 1.0
        score_after_top_k: bool = False
        num_groups: int = 1
        top_k_groups: int = 1
        group_score: GroupScore = "max"
        expert_bias: bool = False
        linear_bias: bool = False
        dtype: torch.dtype | None = torch.float32
        input_jitter: float = 0.0
        forced_balance: bool = False
        init_std: float = 0.02

        def __post_init__(self) -> None:
            _check_sizes(self)
            _check_groups(self)
            check_score(self.score)
            if self.score_after_top_k and self.score != "softmax":
                raise ValueError(
                    f"score_after_top_k=True needs score='softmax', got {self.score!r}; "
                    "set router.score_after_top_k=False: an elementwise score is the same before and after"
                )
            if self.dtype not in (None, torch.float32, torch.float64):
                raise ValueError(
                    f"dtype={self.dtype} must be torch.float32, torch.float64 or None (the input's dtype); "
                    "set router.dtype"
                )
            if not 0 <= self.input_jitter < 1:
                raise ValueError(
                    f"input_jitter={self.input_jitter} must be in [0, 1); set router.input_jitter"
                )
            if not (self.scale > 0 and self.scale != float("inf")):
                raise ValueError(f"scale={self.scale} must be finite and > 0; set router.scale")
            if not self.init_std >= 0:
                raise ValueError(f"init_std={self.init_std} must be >= 0; set router.init_std")
            if self.top_k == 1 and (self.normalize_top_k or self.score_after_top_k):
                warnings.warn(
                    "top_k=1 with normalised weights makes every weight equal to router.scale: the gate gets "
                    "no gradient from the model's loss; set router.normalize_top_k=False",
                    stacklevel=3,
                )

        def build(
            self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
        ) -> "Router":
            """Build the module with initialised parameters on `device` in `dtype`."""
            return Router(self, device=device, dtype=dtype)

    weight: nn.Parameter
    bias: nn.Parameter | None
    expert_bias_E: Tensor | None

    def __init__(
        self, config: Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.top_k = config.top_k
        self.score: ScoreName = config.score
        self.routing = Routing(
            top_k=config.top_k,
            score=config.score,
            normalize_top_k=config.normalize_top_k,
            scale=config.scale,
            score_after_top_k=config.score_after_top_k,
            num_expert_groups=config.num_groups,
            top_k_groups=config.top_k_groups,
            group_score=config.group_score,
        )
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.dim, device=device, dtype=dtype))
        bias = torch.empty(config.num_experts, device=device, dtype=dtype)
        self.register_parameter("bias", nn.Parameter(bias) if config.linear_bias else None)
        expert_bias_E = torch.empty(config.num_experts, device=device, dtype=torch.float32)
        self.register_buffer("expert_bias_E", expert_bias_E if config.expert_bias else None)
        self.reset_parameters()

    @property
    def selection_is_plain(self) -> bool:
        """Whether top-k ranks the scores alone: no expert bias, no group limit, no forced balance."""
        return self.expert_bias_E is None and not self._limits_groups and not self.config.forced_balance

    @property
    def _limits_groups(self) -> bool:
        return self.routing.limits_groups

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw `weight` from a normal of `init_std`; set the biases to 0."""
        self.weight.normal_(std=self.config.init_std)
        for bias_E in (self.bias, self.expert_bias_E):
            if bias_E is not None:
                bias_E.zero_()

    def forward(self, x: Tensor, *, replay_ids_TK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Route every token.

        Args:
            x: (T, D), (B, S, D) or any (..., D) floating input; leading axes are flattened. Gradient flows.
            replay_ids_TK: (T, K) integer ids to use instead of the router's own choice; the weights are the
                current scores of these experts. Ids must lie in [0, E) (checked by the gather only). No
                gradient.

        Returns:
            logits_TE: (T, E) before the expert bias, in the gate's dtype, at least float32. Gradient flows.
            topk_weights_TK: (T, K) in the same dtype; rows sum to `scale` if normalised. Gradient flows.
            topk_ids_TK: (T, K) int64, distinct within a row. Equal inputs give equal ids, also under ties.

        Raises:
            ValueError: the last axis of x is not D, or `replay_ids_TK` is not an integer (T, K) tensor.
        """
        if x.shape[-1] != self.config.dim:
            raise ValueError(
                f"x has shape {tuple(x.shape)}, expected (..., D) with D = {self.config.dim}; "
                "set router.dim to the model's width"
            )
        logits_TE = self._logits(x.reshape(-1, self.config.dim))
        state: RouterState | None = getattr(self, ROUTER_STATE, None)
        if replay_ids_TK is not None:
            self._check_replay(replay_ids_TK, logits_TE.shape[0])
            if state is not None and state.context.taps is not None and state.context.taps.replay is not None:
                raise ValueError(
                    "replay_ids_TK is given inside replay_routing(...), which says already which experts to use; "
                    "leave one of the two out"
                )
            replay_ids_TK = replay_ids_TK.to(torch.int64)
        elif self.config.forced_balance:
            replay_ids_TK = self._dealt(logits_TE)
        balanced = state is not None and state.fused
        if state is not None and balanced:
            routed = route_balanced(
                state, self, x, logits_TE, self.routing, self.expert_bias_E, replay_ids_TK
            )
            if routed is not None:
                return logits_TE, *routed
        output = (
            logits_TE,
            *choose_and_weigh(logits_TE, self.expert_bias_E, replay_ids_TK, self.routing),
        )
        if balanced:
            output = after_router(self, (x,), {}, output) or output
        return output

    def _logits(self, x_TD: Tensor) -> Tensor:
        if self.config.dtype is not None:
            x_TD = x_TD.to(torch.promote_types(x_TD.dtype, self.config.dtype))
        if self.training and self.config.input_jitter > 0:
            j = self.config.input_jitter
            x_TD = x_TD * torch.empty_like(x_TD).uniform_(1 - j, 1 + j)
        bias_E = None if self.bias is None else self.bias.to(x_TD.dtype)
        with _autocast_off(x_TD) if self.config.dtype is not None else nullcontext():
            logits_TE = F.linear(x_TD, self.weight.to(x_TD.dtype), bias_E)
        return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32))

    def _dealt(self, logits_TE: Tensor) -> Tensor:
        num_tokens = logits_TE.shape[0]
        pairs_N = torch.arange(num_tokens * self.top_k, device=logits_TE.device)
        return (pairs_N % self.num_experts).view(num_tokens, self.top_k)

    def _check_replay(self, replay_ids_TK: Tensor, num_tokens: int) -> None:
        expected = (num_tokens, self.top_k)
        if tuple(replay_ids_TK.shape) != expected or replay_ids_TK.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"replay_ids_TK is {replay_ids_TK.dtype} of shape {tuple(replay_ids_TK.shape)}, expected "
                f"int64 or int32 of shape {expected} (T, K); replay the topk_ids_TK of the same tokens"
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Router":
        before_E = self.expert_bias_E
        super()._apply(fn, recurse)
        after_E = self.expert_bias_E
        if before_E is not None and after_E is not None and after_E.dtype != torch.float32:
            self.expert_bias_E = after_E.float() if before_E.is_meta else before_E.to(after_E.device)
        return self

    def extra_repr(self) -> str:
        """Return the settings that matter for routing, for `repr`."""
        c = self.config
        return (
            f"dim={c.dim}, num_experts={c.num_experts}, top_k={c.top_k}, score={c.score!r}, scale={c.scale}"
        )


def _autocast_off(x: Tensor) -> Any:
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


def _check_sizes(c: Router.Config) -> None:
    for name in ("dim", "num_experts"):
        if getattr(c, name) < 1:
            raise ValueError(f"{name}={getattr(c, name)} must be at least 1; set router.{name}")
    if not 1 <= c.top_k <= c.num_experts:
        verb = "raise" if c.top_k < 1 else "lower"
        raise ValueError(f"top_k={c.top_k} must be in [1, num_experts={c.num_experts}]; {verb} router.top_k")


def _check_groups(c: Router.Config) -> None:
    if c.num_groups < 1 or c.num_experts % c.num_groups:
        raise ValueError(
            f"num_groups={c.num_groups} must divide num_experts={c.num_experts}; set router.num_groups"
        )
    if not 1 <= c.top_k_groups <= c.num_groups:
        raise ValueError(
            f"top_k_groups={c.top_k_groups} must be in [1, num_groups={c.num_groups}]; "
            "set router.top_k_groups"
        )
    group_size = c.num_experts // c.num_groups
    if c.top_k > c.top_k_groups * group_size:
        raise ValueError(
            f"top_k={c.top_k} must be at most {c.top_k_groups * group_size}, the experts in "
            f"top_k_groups={c.top_k_groups} groups of {group_size}; "
            "lower router.top_k or raise router.top_k_groups"
        )
    if c.group_score not in ("max", "top2_sum"):
        raise ValueError(f"group_score={c.group_score!r} must be 'max' or 'top2_sum'; set router.group_score")
    if c.group_score == "top2_sum" and c.num_groups > 1 and group_size < 2:
        raise ValueError(
            f"group_score='top2_sum' needs 2 experts per group, got {group_size}; "
            "lower router.num_groups or set router.group_score='max'"
        )
