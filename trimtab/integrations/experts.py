"""Runs the experts of transformers models on trimtab's dispatch and grouped multiply, on one rank or several.

transformers lets nearly every family choose how its stacked experts are computed by a name in the
configuration. Under the name registered here they compile as one graph in float32 and bfloat16, follow
autocast, and sum in a fixed order in forward and backward. Llama 4 chooses no name: its blocks run every
expert on every token, and are replaced by `trimtab.integrations.llama4`.

Shape suffixes: T tokens, D model, F hidden, E experts, K top-k, N rows sorted by expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trimtab.dispatch import Dispatcher, LocalDispatcher
from trimtab.experts import grouped_linear, read_whole
from trimtab.integrations.expert_adapters import expert_adapter
from trimtab.moe import MoE
from trimtab.parallel.dispatch import ExpertParallelDispatcher
from trimtab.parallel.experts import ExpertLayout, parallelize_moe, shard_experts
from trimtab.parallel.mesh import Mesh

IMPLEMENTATION = "trimtab"
# Attributes of the stacked experts of a model that is divided over ranks.
DISPATCHER = "_trimtab_dispatcher"
READ = "_trimtab_read"


def use_trimtab_experts(model: nn.Module) -> None:
    """Let a transformers model run its experts on trimtab's kernels, in place.

    Args:
        model: a model whose experts transformers dispatches by name, or a Llama 4.

    Raises:
        ValueError: the model chooses no experts implementation.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    dense = [m for m in model.modules() if type(m).__name__ in ("Llama4TextMoe", "SparseLlama4TextMoe")]
    if dense:
        from trimtab.integrations.llama4 import make_sparse

        for block in dense:
            make_sparse(block)
        return
    setter = getattr(model, "set_experts_implementation", None)
    if setter is None:
        raise ValueError(
            f"{type(model).__name__} does not choose its experts by name; use it as it is, with compile disabled"
        )
    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, experts_forward)
    setter(IMPLEMENTATION)


def parallelize_experts(model: nn.Module, mesh: Mesh) -> list[nn.Module]:
    """Divide the experts of a model over the ep and etp axes of a mesh, in place.

    Args:
        model: a transformers model, or any module that contains its stacked experts or `trimtab.MoE` layers;
            the same parameters on each rank. Experts outside a transformers model must run on
            `experts_forward`.
        mesh: the mesh.

    Returns:
        The modules that hold experts: one group of FSDP each, over efsdp. None in a pipeline stage without
        MoE layers.

    Raises:
        ValueError: sizes that cannot be divided, or experts that share parameters.
    """
    divided: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, MoE):
            parallelize_moe(module, mesh)
            divided.append(module.experts)
        elif (layout := layout_of(module)) is not None:
            dispatcher = ExpertParallelDispatcher.make(int(module.num_experts), mesh)  # type: ignore[arg-type]
            if mesh.size("etp") > 1 and getattr(module, "has_post_expert_norm", False):
                raise ValueError(
                    f"{type(module).__name__} normalises each expert's output, of which ranks of etp have parts "
                    "of a sum; set etp=1"
                )
            setattr(module, READ, shard_experts(module, mesh, layout))
            setattr(module, DISPATCHER, dispatcher)
            divided.append(module)
    if hasattr(model, "set_experts_implementation"):
        use_trimtab_experts(model)
    return divided


def layout_of(module: nn.Module) -> ExpertLayout | None:
    """How a module of transformers stacks its experts; None if it is something else."""
    if type(module).__name__ in ("Llama4TextExperts", "SparseLlama4TextExperts"):
        return ExpertLayout(transposed=True)
    if not hasattr(module, "is_concatenated") or not hasattr(module, "num_experts"):
        return None
    return ExpertLayout(
        transposed=bool(module.is_transposed),
        gated=bool(module.has_gate),
        interleaved=bool(module.has_gate and not module.is_concatenated),
    )


def dispatcher_of(experts: Any) -> Dispatcher:
    """What brings tokens to these experts."""
    dispatcher: Dispatcher | None = getattr(experts, DISPATCHER, None)
    return LocalDispatcher(num_experts=experts.num_experts) if dispatcher is None else dispatcher


def reader_of(experts: Any) -> Callable[[nn.Module, str], Tensor]:
    """What reads this rank's parts of these experts' parameters."""
    reader: Callable[[nn.Module, str], Tensor] = getattr(experts, READ, read_whole)
    return reader


def experts_forward(module: Any, x_TD: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor) -> Tensor:
    """Outputs of a module's experts, weighted and summed over each token's K.

    Args:
        module: transformers' stacked experts: ``gate_up_proj`` or ``up_proj``, ``down_proj``, their biases;
            all of them, or after `parallelize_experts` this rank's part.
        x_TD: (T, D) tokens. Gradient flows.
        topk_ids_TK: (T, K) int64 experts of each token. No gradient.
        topk_weights_TK: (T, K) weights. Gradient flows.

    Returns:
        (T, D) in x's dtype.
    """
    dispatcher = dispatcher_of(module)
    x_ND, counts_e, plan = dispatcher.dispatch(x_TD, topk_ids_TK, topk_weights_TK, score_before_experts=False)
    h = _linear(module, "gate_up_proj" if module.has_gate else "up_proj", x_ND, counts_e)
    h = module._apply_gate(h) if module.has_gate else module.act_fn(h)
    y_ND = _linear(module, "down_proj", h, counts_e)
    if module.has_post_expert_norm:
        y_ND = module.post_expert_norm(y_ND)
    return dispatcher.combine(y_ND, plan).to(x_TD.dtype)


def _linear(module: Any, name: str, x_ND: Tensor, counts_e: Tensor) -> Tensor:
    read = reader_of(module)
    bias_eF = read(module, f"{name}_bias") if module.has_bias else None
    y_NF = grouped_linear(x_ND, read(module, name), bias_eF, counts_e, transposed=module.is_transposed)
    added_NF = expert_adapter(module, name, x_ND, counts_e)
    return y_NF if added_NF is None else y_NF + added_NF
