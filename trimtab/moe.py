"""The Mixture-of-Experts layer: router, dispatch, experts, combine, shared experts.

Shape suffixes: B sequences, S length, T = B * S tokens, D model, E experts, e local experts, K top-k, N rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trimtab.dispatch import Dispatcher, LocalDispatcher
from trimtab.experts import Experts, SharedExperts
from trimtab.router import Router


class MoE(nn.Module):
    """`y_t = sum_k w_tk expert_{i_tk}(x_t) + g(x_t) shared(x_t)`.

    Attributes:
        router: chooses experts and weights. Called as a module, so that hooks on it may replace the weights.
        experts: the routed experts.
        shared_experts: dense network for every token, or None.
        shared_expert_gate: linear map (D -> 1) whose sigmoid multiplies the shared output, or None (g = 1).
        dispatcher: moves tokens to experts; replaced to place experts on several ranks.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config:
        """Settings of `MoE`.

        Attributes:
            router: settings of the router.
            experts: settings of the routed experts.
            shared_experts: settings of the shared experts, or None for none.
            score_before_experts: multiply the experts' input by the router's weights instead of their output
                (Llama 4).

        Raises:
            ValueError: the parts disagree on the width or on the number of experts.
        """

        router: Router.Config
        experts: Experts.Config
        shared_experts: SharedExperts.Config | None = None
        score_before_experts: bool = False

        def __post_init__(self) -> None:
            if self.experts.num_experts != self.router.num_experts:
                raise ValueError(
                    f"experts.num_experts={self.experts.num_experts} must equal "
                    f"router.num_experts={self.router.num_experts}; set both to the same number"
                )
            for name in ("experts", "shared_experts"):
                part = getattr(self, name)
                if part is not None and part.dim != self.router.dim:
                    raise ValueError(
                        f"{name}.dim={part.dim} must equal router.dim={self.router.dim}; "
                        "set both to the model's width"
                    )

        def build(
            self, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
        ) -> "MoE":
            """Build the layer with initialised parameters, all experts on this rank."""
            return MoE(self, device=device, dtype=dtype)

    def __init__(
        self, config: Config, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.router = config.router.build(device=device, dtype=dtype)
        self.experts = config.experts.build(device=device, dtype=dtype)
        self.dispatcher: Dispatcher = LocalDispatcher(num_experts=config.experts.num_experts)
        self.shared_experts: SharedExperts | None = None
        self.shared_expert_gate: nn.Linear | None = None
        if config.shared_experts is not None:
            self.shared_experts = config.shared_experts.build(device=device, dtype=dtype)
            if config.shared_experts.gated:
                self.shared_expert_gate = nn.Linear(
                    config.router.dim, 1, bias=False, device=device, dtype=dtype
                )
                nn.init.normal_(self.shared_expert_gate.weight, std=config.shared_experts.init_std)

    def forward(self, x_BSD: Tensor, *, replay_ids_TK: Tensor | None = None) -> Tensor:
        """Run the layer.

        Args:
            x_BSD: (B, S, D) hidden states, or any (..., D); zero tokens are ordinary. Gradient flows.
            replay_ids_TK: (T, K) integer expert ids to use instead of the router's choice. No gradient.

        Returns:
            Output of x's shape and dtype. Gradient flows to x, to all parameters and through the weights.

        Raises:
            ValueError: shapes disagree (see `Router.forward`).
        """
        # The router sees x unflattened: where sequences begin is known to hooks on it, and to nothing below.
        if replay_ids_TK is None:
            _, topk_weights_TK, topk_ids_TK = self.router(x_BSD)
        else:
            _, topk_weights_TK, topk_ids_TK = self.router(x_BSD, replay_ids_TK=replay_ids_TK)
        x_TD = x_BSD.reshape(-1, x_BSD.shape[-1])
        tokens = self.dispatcher.dispatch(
            x_TD, topk_ids_TK, topk_weights_TK, score_before_experts=self.config.score_before_experts
        )
        y_ND = self.experts(tokens.x_ND, tokens.num_tokens_per_expert_e)
        y_TD = self.dispatcher.combine(y_ND, tokens.plan)
        if self.shared_experts is not None:
            shared_TD = self.shared_experts(x_TD)
            if self.shared_expert_gate is not None:
                shared_TD = torch.sigmoid(self.shared_expert_gate(x_TD)) * shared_TD
            y_TD = y_TD + shared_TD
        return y_TD.to(x_BSD.dtype).reshape(x_BSD.shape)
