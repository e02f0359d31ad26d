"""Attention divided over tp and cp equals the stock model in one process: logits, masks and every gradient."""

import copy
import warnings
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.hf_models import VOCAB, tiny_model
from tests.parallel.double import double_precision
from tests.parallel.pool import Ranks, mesh_of
from tests.parallel.reference import stock_arguments
from trimtab.integrations.attention import attention_masks, model_arguments, parallelize_attention
from trimtab.integrations.experts import use_trimtab_experts
from trimtab.parallel.mesh import Degrees, Mesh
from trimtab.parallel.tokens import TokenShard

B, S = 2, 16
TOLERANCE = 1e-10
PLANS = {
    "tp2": Degrees(tp=2),
    "cp2": Degrees(cp=2),
    "tp2_cp2": Degrees(tp=2, cp=2),
    "tp4": Degrees(tp=4),
    "cp4": Degrees(cp=4),
}
GROUPED = {"num_attention_heads": 8, "num_key_value_heads": 4}
REQUIRED: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"first_k_dense_replace": 1, "attention_bias": True},
    "deepseek_v3/full": {"q_lora_rank": None},
    "qwen3_moe": {**GROUPED},
    "gpt_oss": {**GROUPED, "sliding_window": 3, "attention_bias": True},
    "mixtral": {**GROUPED, "sliding_window": 5},
    # One layer in chunks with rotary angles, one with neither and with queries scaled by position.
    "llama4": {**GROUPED, "attention_chunk_size": 6, "no_rope_layers": [1, 0], "floor_scale": 3},
}
OTHERS: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 3},
    "cohere2_moe": {"attention_bias": True},
    "deepseek_v2": {},
    "dots1": {},
    "ernie4_5_moe": {"use_bias": True},
    "glm4_moe": {"use_qk_norm": True, "attention_bias": True},
    "granitemoe": {"embedding_multiplier": 12.0, "attention_multiplier": 0.3},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "minimax": {},
    "qwen2_moe": {},
}
# Their norm spans all heads, so tp is refused.
ONLY_CP = ("olmoe", "flex_olmo", "minimax_m2")


def make_model(name: str, **overrides: Any) -> nn.Module:
    family, _, _ = name.partition("/")
    settings = {**REQUIRED.get(name, OTHERS.get(name, {})), **overrides}
    model, _ = tiny_model(
        family, dtype=torch.float64, use_cache=False, experts_implementation="eager", **settings
    )
    # Stock initialisation leaves biases at zero and attention nearly uniform, where mistakes cost nothing.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def make_batch(packed: bool) -> tuple[Tensor, Tensor]:
    """Ids and positions; packed rows hold documents whose bounds lie inside and between the ranks' parts."""
    positions_BS = torch.arange(S).repeat(B, 1)
    if packed:
        for row, starts in enumerate([(3, 4, 10), (8,)]):
            for start in starts:
                positions_BS[row, start:] = torch.arange(S - start)
    return torch.randint(3, VOCAB, (B, S)), positions_BS


def shard_of(mesh: Mesh) -> TokenShard:
    degrees = mesh.degrees
    return TokenShard.make(S, cp=degrees.cp, cp_rank=mesh.rank("cp"), tp=degrees.tp, tp_rank=mesh.rank("tp"))


def gradient_errors(model: nn.Module, reference: nn.Module, mesh: Mesh) -> dict[str, float]:
    """Largest error of each parameter's gradient, relative to the reference's largest element."""
    errors = {}
    for (name, parameter), (_, expected) in zip(
        model.named_parameters(), reference.named_parameters(), strict=True
    ):
        if expected.grad is None:
            assert parameter.grad is None, name
            continue
        assert parameter.grad is not None, f"{name} has no gradient on this rank, which FSDP needs"
        grad, whole, axis = parameter.grad, expected.grad, "sequence"
        if isinstance(grad, DTensor):
            (placement,) = grad.placements
            whole = whole.chunk(mesh.size("tp"), dim=placement.dim)[mesh.rank("tp")]
            grad, axis = grad.to_local(), "cp"
        grad = grad.clone()
        if (group := mesh.group(axis)) is not None:
            dist.all_reduce(grad, group=group)
        errors[name] = ((grad - whole).abs().max() / expected.grad.abs().max().clamp(min=1e-30)).item()
    return errors


def run_parity(
    name: str, plan: str, packed: bool, checkpointing: bool = False, **overrides: Any
) -> dict[str, float]:
    mesh = mesh_of(PLANS[plan])
    model = make_model(name, **overrides)
    reference = copy.deepcopy(model)
    ids_BS, positions_BS = make_batch(packed)
    weights_BSV = torch.randn(B, S, VOCAB, dtype=torch.float64)
    shard = shard_of(mesh)
    with double_precision():
        expected_BSV = reference(input_ids=ids_BS, **stock_arguments(reference, positions_BS)).logits
        (expected_BSV * weights_BSV).sum().backward()
        parallelize_attention(model, mesh)
        runs: list[nn.Module] = []
        if checkpointing:
            # transformers 5.23 renames it, 5.20 has only this name.
            warnings.filterwarnings("ignore", message="`gradient_checkpointing_enable` is deprecated")
            model.gradient_checkpointing_enable({"use_reentrant": False})
            for layer in model.model.layers:
                layer.self_attn.register_forward_hook(lambda attention, args, output: runs.append(attention))
        logits_BsV = model(**model_arguments(model, ids_BS, positions_BS, shard)).logits
        (logits_BsV * weights_BSV[:, shard.own_s]).sum().backward()
    assert len(runs) == 2 * len(model.model.layers) * checkpointing
    error = (logits_BsV - expected_BSV[:, shard.own_s]).abs().max() / expected_BSV.abs().max()
    return {"logits": error.item(), **gradient_errors(model, reference, mesh)}


def check_parity(ranks: Ranks, name: str, plan: str, packed: bool, **overrides: Any) -> None:
    for errors in ranks.run(run_parity, PLANS[plan].world_size, name, plan, packed, **overrides):
        assert max(errors.values()) < TOLERANCE, {k: e for k, e in errors.items() if e >= TOLERANCE}


@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", REQUIRED)
def test_gradients_equal_one_process(ranks: Ranks, name: str, plan: str, packed: bool) -> None:
    check_parity(ranks, name, plan, packed)


@pytest.mark.parametrize("name", OTHERS)
def test_other_families_equal_one_process(ranks: Ranks, name: str) -> None:
    check_parity(ranks, name, "tp2_cp2", packed=True)


@pytest.mark.parametrize("name", ONLY_CP)
def test_norms_over_all_heads_equal_one_process_under_cp(ranks: Ranks, name: str) -> None:
    check_parity(ranks, name, "cp2", packed=True)


@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
@pytest.mark.parametrize("plan", ["tp2", "tp2_cp2"])
@pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe", "mixtral", "llama4"])
def test_sdpa_equals_one_process(ranks: Ranks, name: str, plan: str, packed: bool) -> None:
    check_parity(ranks, name, plan, packed, attn_implementation="sdpa")


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_recomputed_layers_equal_one_process(ranks: Ranks, name: str) -> None:
    check_parity(ranks, name, "tp2_cp2", packed=True, checkpointing=True)


# ------------------------------------------------------------------ masks and arguments


class _MasksSeen:
    """The masks that a model gives its layers."""

    def __init__(self, model: nn.Module) -> None:
        self.masks: list[Tensor | None] = []
        for layer in model.model.layers:
            layer.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, layer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.masks.append(kwargs["attention_mask"])


def run_masks(name: str, implementation: str, packed: bool) -> None:
    mesh = mesh_of(PLANS["tp2_cp2"])
    model = make_model(name, attn_implementation=implementation)
    ids_BS, positions_BS = make_batch(packed)
    seen = _MasksSeen(model)
    model(input_ids=ids_BS, **stock_arguments(model, positions_BS))
    stock, seen.masks = seen.masks, []
    parallelize_attention(model, mesh)
    shard = shard_of(mesh)
    model(**model_arguments(model, ids_BS, positions_BS, shard))
    assert len(stock) == len(seen.masks) == len(model.model.layers)
    for expected, mask in zip(stock, seen.masks, strict=True):
        if expected is None:  # sdpa's own causal mask
            expected = torch.ones(S, S, dtype=torch.bool).tril().expand(B, 1, S, S)
        assert mask is not None
        assert mask.dtype == expected.dtype
        assert torch.equal(mask, expected[:, :, shard.queries_c][..., shard.keys_S])


@pytest.mark.parametrize("packed", [False, True], ids=["one_document", "packed"])
@pytest.mark.parametrize(
    ("name", "implementation"),
    [*((name, "eager") for name in REQUIRED), ("mixtral", "sdpa"), ("llama4", "sdpa"), ("qwen3_moe", "sdpa")],
)
def test_masks_are_this_ranks_part_of_the_stock_masks(
    ranks: Ranks, name: str, implementation: str, packed: bool
) -> None:
    ranks.run(run_masks, 4, name, implementation, packed)


def test_a_rank_with_all_tokens_calls_the_model_as_ever() -> None:
    ids_BS, positions_BS = make_batch(packed=True)
    arguments = model_arguments(make_model("qwen3_moe"), ids_BS, positions_BS, TokenShard.make(S))
    assert set(arguments) == {"input_ids", "position_ids"}
    assert arguments["input_ids"] is ids_BS
    assert arguments["position_ids"] is positions_BS


def run_hidden(name: str) -> None:
    mesh = mesh_of(PLANS["tp2_cp2"])
    model = make_model(name)
    ids_BS, positions_BS = make_batch(packed=True)
    shard = shard_of(mesh)
    parallelize_attention(model, mesh)
    expected = model(**model_arguments(model, ids_BS, positions_BS, shard)).logits
    hidden_BsD = model.get_input_embeddings()(ids_BS[:, shard.own_s])
    arguments = model_arguments(model, ids_BS, positions_BS, shard, hidden_BsD)
    assert "input_ids" not in arguments
    assert torch.equal(model(**arguments).logits, expected)


@pytest.mark.parametrize("name", ["deepseek_v3", "llama4"])
def test_hidden_states_take_the_place_of_ids(ranks: Ranks, name: str) -> None:
    ranks.run(run_hidden, 4, name)


def run_dtype() -> None:
    mesh = mesh_of(PLANS["cp2"])
    model = make_model("qwen3_moe")
    parallelize_attention(model, mesh)
    _, positions_BS = make_batch(packed=True)
    mask = attention_masks(model, positions_BS, shard_of(mesh), dtype=torch.bfloat16)
    assert isinstance(mask, Tensor)
    assert mask.dtype == torch.bfloat16
    assert mask.min() == torch.finfo(torch.bfloat16).min


def test_additive_masks_have_the_given_dtype(ranks: Ranks) -> None:
    ranks.run(run_dtype, 2)


# ------------------------------------------------------------------ what it costs, and what it leaves


class _Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("trimtab", "c10d", "_c10d_functional"):
            self.counts[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def run_collectives(name: str, plan: str) -> tuple[dict[str, int], dict[str, int]]:
    mesh = mesh_of(PLANS[plan])
    model = make_model(name, num_layers=1)
    ids_BS, positions_BS = make_batch(packed=True)
    parallelize_attention(model, mesh)
    with _Collectives() as forward:
        logits = model(**model_arguments(model, ids_BS, positions_BS, shard_of(mesh))).logits
    with _Collectives() as backward:
        logits.square().sum().backward()
    return dict(forward.counts), dict(backward.counts)


@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss"])
def test_a_layer_takes_no_collective_beyond_the_necessary(ranks: Ranks, name: str) -> None:
    once = {"gather": 1, "reduce_scatter": 1}
    for forward, backward in ranks.run(run_collectives, 2, name, "tp2"):
        assert forward == once
        assert backward == once
    for forward, backward in ranks.run(run_collectives, 2, name, "cp2"):
        assert forward == {"gather": 2}
        assert backward == {"reduce_scatter": 2}
    for forward, backward in ranks.run(run_collectives, 4, name, "tp2_cp2"):
        assert forward == {"gather": 3, "reduce_scatter": 1}
        assert backward == {"gather": 1, "reduce_scatter": 3}


def run_groups(name: str) -> list[list[str]]:
    mesh = mesh_of(PLANS["tp2"])
    model = make_model(name)
    before = {key: tensor.shape for key, tensor in model.state_dict().items()}
    blocks = parallelize_attention(model, mesh)
    assert {key: tensor.shape for key, tensor in model.state_dict().items()} == before
    grouped = {id(parameter) for block in blocks for module in block for parameter in module.parameters()}
    for key, parameter in model.named_parameters():
        assert isinstance(parameter, DTensor) == (id(parameter) in grouped), key
        if isinstance(parameter, DTensor):
            assert parameter.to_local().untyped_storage().nbytes() == parameter.numel() * 8 // 2
    names = {id(module): path for path, module in model.named_modules()}
    return [[names[id(module)].removeprefix("model.layers.") for module in block] for block in blocks]


def test_modules_with_divided_parameters_are_returned(ranks: Ranks) -> None:
    for blocks in ranks.run(run_groups, 2, "gpt_oss"):
        assert blocks == [[f"{i}.self_attn.{x}_proj" for x in "qkvo"] for i in range(2)]
    for blocks in ranks.run(run_groups, 2, "deepseek_v3"):
        assert blocks == [[f"{i}.self_attn.{x}_proj" for x in ("q_b", "kv_b", "o")] for i in range(2)]


def run_counts() -> None:
    model = make_model("llama4")
    parallelize_attention(model, mesh_of(PLANS["tp2"]))
    for layer in model.model.layers:
        assert (layer.self_attn.num_attention_heads, layer.self_attn.num_key_value_heads) == (4, 2)


def test_attention_knows_its_number_of_heads(ranks: Ranks) -> None:
    ranks.run(run_counts, 2)


def run_autocast() -> None:
    model = make_model("gpt_oss").float()
    parallelize_attention(model, mesh_of(PLANS["tp2"]))
    with torch.autocast("cpu", torch.bfloat16):
        out = model.model.layers[0].self_attn.o_proj(torch.ones(1, 2, 32))
    assert out.dtype == torch.bfloat16


def test_the_output_bias_follows_autocast(ranks: Ranks) -> None:
    ranks.run(run_autocast, 2)


def run_shared_configuration() -> None:
    mesh = mesh_of(PLANS["tp2_cp2"])
    first = make_model("mixtral")
    second = copy.deepcopy(first)
    second.model.config = second.config = first.config
    for layer in second.model.layers:
        layer.self_attn.config = first.config
    ids_BS, positions_BS = make_batch(packed=True)
    outputs = []
    for model in (first, second):
        parallelize_attention(model, mesh)
        outputs.append(model(**model_arguments(model, ids_BS, positions_BS, shard_of(mesh))).logits)
    assert torch.equal(*outputs)
    with pytest.raises(ValueError, match="is divided already"):
        parallelize_attention(first, mesh)


def test_stages_may_share_a_configuration(ranks: Ranks) -> None:
    ranks.run(run_shared_configuration, 4)


def run_copy(name: str) -> None:
    mesh = mesh_of(PLANS["tp2_cp2"])
    model = make_model(name)
    parallelize_attention(model, mesh)
    ids_BS, positions_BS = make_batch(packed=True)
    twin = copy.deepcopy(model)
    arguments = model_arguments(twin, ids_BS, positions_BS, shard_of(mesh))
    assert torch.equal(twin(**arguments).logits, model(**arguments).logits)


def test_copies_work(ranks: Ranks) -> None:
    ranks.run(run_copy, 4, "gpt_oss")


def run_compiled(name: str, num_graphs: int, overrides: dict[str, Any]) -> None:
    # dynamo looks at .grad of every input of a compiled layer and filters its own warning, below our filter.
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
    torch._dynamo.reset()
    mesh = mesh_of(PLANS["tp2_cp2"])
    model = make_model(name, num_layers=4, **overrides)
    use_trimtab_experts(model)
    parallelize_attention(model, mesh)
    ids_BS, positions_BS = make_batch(packed=True)
    arguments = model_arguments(model, ids_BS, positions_BS, shard_of(mesh))
    reference = copy.deepcopy(model)
    reference(**arguments).logits.square().sum().backward()
    backend = CompileCounterWithBackend("aot_eager")
    for layer in model.model.layers:
        layer.compile(fullgraph=True, backend=backend)
    model(**arguments).logits.square().sum().backward()
    assert backend.frame_count == num_graphs
    for (key, parameter), expected in zip(model.named_parameters(), reference.parameters(), strict=True):
        # The model's own casts to float32 bound what two orders of the same sums can agree on.
        torch.testing.assert_close(parameter.grad, expected.grad, rtol=1e-5, atol=1e-5, msg=key)


@pytest.mark.parametrize(
    ("name", "num_graphs", "overrides"),
    [
        ("qwen3_moe", 1, {}),
        ("deepseek_v3", 1, {"first_k_dense_replace": 0}),
        ("gpt_oss", 1, {}),
        # Layers with and without rotary angles.
        ("llama4", 2, {"no_rope_layers": [1, 0, 1, 0]}),
    ],
)
def test_layers_of_a_kind_compile_to_one_graph(
    ranks: Ranks, name: str, num_graphs: int, overrides: dict[str, Any]
) -> None:
    ranks.run(run_compiled, 4, name, num_graphs, overrides, timeout=240)


@pytest.mark.parametrize("name", ["gpt_oss", "mixtral"])
def test_documents_of_one_rank_do_not_see_each_other(name: str) -> None:
    """Also in models whose own masks do not look at positions."""
    model = make_model(name)
    with double_precision(), torch.no_grad():
        ids_BS, positions_BS = make_batch(packed=True)
        logits_BSV = model(
            **model_arguments(model, ids_BS, positions_BS, TokenShard.make(S)), use_cache=False
        ).logits
        for row in range(B):
            starts = [*(positions_BS[row] == 0).nonzero()[:, 0].tolist(), S]
            for start, end in pairwise(starts):
                alone = model(input_ids=ids_BS[row : row + 1, start:end], use_cache=False).logits[0]
                torch.testing.assert_close(logits_BSV[row, start:end], alone, rtol=1e-10, atol=1e-10)
