"""Triton's kernels equal the torch functions: on CUDA where there is one, and in Triton's interpreter everywhere.

The interpreter must be chosen before Triton is imported, so `test_in_the_interpreter` runs this file once more in a
process of its own. About 10 ms per tile: shapes are small.
"""

import importlib.util
import logging
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trimtab import kernels, route_ops
from trimtab.fused import route
from trimtab.routing import Routing
from trimtab.scores import SCORE_NAMES

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed: pip install -e .[triton]")
needs_kernels = pytest.mark.skipif(
    not HAS_TRITON or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs CUDA and Triton, or TRITON_INTERPRET=1 as test_in_the_interpreter sets it",
)
needs_cuda = pytest.mark.skipif(not HAS_TRITON or DEVICE == "cpu", reason="needs CUDA and Triton")

# NumPy, which the interpreter computes with, warns of infinities that Triton's float arithmetic has anyway.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def routing(**options: Any) -> Routing:
    return Routing(**({"top_k": 2, "score": "softmax", "normalize_top_k": True} | options))


OPTIONS_OF_TIES: list[dict[str, Any]] = [
    {},
    {"score": "softmax", "score_after_top_k": True},
    {"num_expert_groups": 4, "top_k_groups": 2},
    {"num_expert_groups": 4, "top_k_groups": 2, "group_score": "top2_sum"},
]


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter")
def test_in_the_interpreter() -> None:
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__]
    done = subprocess.run(
        command,
        cwd=root,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed.group(1)) >= 30


# ---------------------------------------------------------------- equality


def check(
    settings: Routing,
    tokens: int,
    experts: int,
    *,
    groups: int = 1,
    documents: bool = False,
    masked: bool = False,
    biased: bool = False,
    replayed: bool = False,
    balanced: bool = True,
    dtype: torch.dtype = torch.float32,
    with_sums: bool = False,
    logits_TE: Tensor | None = None,
    seed: int = 0,
    **launch: int,
) -> None:
    """Kernels against torch functions: ids and counts exactly, floats to a few ulps of the largest."""
    from trimtab import triton_kernels

    draw = torch.Generator().manual_seed(seed)
    if logits_TE is None:
        logits_TE = 3 * torch.randn(tokens, experts, generator=draw)
    logits_TE = logits_TE.to(DEVICE, dtype)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(DEVICE)

    bias_E = randn(experts) if biased else None
    replay_TK = randn(tokens, experts).topk(settings.top_k).indices.int() if replayed else None
    valid_T = randn(tokens) > -0.5 if masked else None
    group_ids_T = torch.randint(groups, (tokens,), generator=draw).to(DEVICE) if documents else None
    given = (logits_TE, bias_E, replay_TK, valid_T, group_ids_T, groups, with_sums, settings)
    have, want = triton_kernels.forward(*given, **launch), route_ops.plain_forward(*given)
    assert torch.equal(have[1], want[1])
    assert torch.equal(have[2], want[2])
    for one, other in zip(have, want, strict=True):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=3e-6, atol=1e-6 * settings.scale, equal_nan=True)

    target_GE, z_weight = (randn(groups, experts), randn()) if balanced else (None, None)
    grad_TK = randn(tokens, settings.top_k)
    # Narrow, as the autograd node keeps them.
    given = (grad_TK, logits_TE, want[1].to(torch.int16), target_GE, z_weight, group_ids_T, valid_T, settings)
    launch.pop("num_programs", None)
    have_TE, want_TE = triton_kernels.backward(*given, **launch), route_ops.plain_backward(*given)
    assert have_TE.dtype == dtype
    # Rounding to 16 bits may fall on either neighbour.
    eps = 4e-6 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(have_TE, want_TE, rtol=eps, atol=eps, equal_nan=True)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "biased": {"biased": True},
    "masked": {"masked": True},
    "sequences": {"groups": 3},
    "documents": {"groups": 4, "documents": True, "masked": True},
    "replayed": {"replayed": True, "groups": 3, "masked": True},
    "no objectives": {"balanced": False},
}


@needs_kernels
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORE_NAMES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, score: str, normalize: bool) -> None:
    settings = routing(score=score, normalize_top_k=normalize, scale=2.5)
    check(settings, 9, 7, **OPTIONS[name])


@needs_kernels
@pytest.mark.parametrize("group_score", ["max", "top2_sum"])
@pytest.mark.parametrize(("num_groups", "kept", "size"), [(2, 1, 4), (3, 2, 3), (5, 3, 2)])
def test_expert_groups(num_groups: int, kept: int, size: int, group_score: str) -> None:
    settings = routing(
        score="sigmoid", num_expert_groups=num_groups, top_k_groups=kept, group_score=group_score
    )
    check(settings, 9, num_groups * size, biased=True, masked=True)


@needs_kernels
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"),
    [(0, 8, 2), (1, 2, 1), (4, 8, 8), (5, 13, 13), (3, 160, 6), (2, 300, 9), (3, 40, 17)],
)
def test_sizes(tokens: int, experts: int, top_k: int) -> None:
    check(routing(top_k=top_k, normalize_top_k=False), tokens, experts)


@needs_kernels
def test_after_top_k() -> None:
    check(routing(score_after_top_k=True), 6, 8, biased=True)


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    check(routing(), 6, 9, dtype=dtype, groups=2, seed=3)


@needs_kernels
def test_largest() -> None:
    check(routing(top_k=kernels.MAX_TOP_K, score="sigmoid"), 2, kernels.MAX_EXPERTS)


@needs_kernels
@pytest.mark.parametrize("groups", [1, 3])
def test_several_tiles_and_programs(groups: int) -> None:
    """Seven or more tiles over few programs, the last of them not full."""
    check(routing(), 27, 8, groups=groups, masked=True, with_sums=True, tile=32, num_programs=3)


@needs_kernels
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_sums_for_logging(score: str, documents: bool) -> None:
    check(routing(score=score), 8, 5, groups=2, documents=documents, masked=True, with_sums=True)


@needs_kernels
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("score", SCORE_NAMES)
def test_what_is_not_finite_or_far_from_zero(score: str, normalize: bool) -> None:
    logits_TE = torch.randn(7, 8, generator=torch.Generator().manual_seed(4))
    logits_TE[0, 3], logits_TE[1, 3], logits_TE[2, 3] = math.nan, -math.inf, math.inf
    logits_TE[3, :6] = -math.inf
    logits_TE[4] = -200.0 + logits_TE[4]
    logits_TE[5] = 90.0 + logits_TE[5]
    logits_TE[6] = -12.0 + logits_TE[6]  # where 1 + e^z alone loses most digits of e^z
    check(routing(score=score, normalize_top_k=normalize), 7, 8, logits_TE=logits_TE)


@needs_kernels
def test_ties_go_to_the_lowest_id_and_rows_of_nan_are_in_range() -> None:
    from trimtab import triton_kernels

    logits_TE = torch.tensor([[1.0, 2.0, 2.0, 2.0, 1.0], [0.0, -0.0, 0.0, -0.0, 0.0], [math.nan] * 5])
    logits_TE[2, ::2].neg_()  # NaN with a sign ranks as any
    given = (logits_TE.to(DEVICE), None, None, None, None, 1, False)
    weights_TK, ids_TK, counts_GE, *_ = triton_kernels.forward(*given, routing(top_k=3))
    assert ids_TK.tolist() == [[1, 2, 3], [0, 1, 2], [0, 1, 2]]
    assert counts_GE.tolist() == [[2, 3, 3, 1, 0]]
    assert weights_TK[2].isnan().all()
    # So many that they are sorted, and not taken one by one.
    many_TE = logits_TE.repeat(1, 4).to(DEVICE)
    ids_TK = triton_kernels.forward(many_TE, *given[1:], routing(top_k=17))[1]
    ties = [one for row in range(4) for one in (5 * row + 1, 5 * row + 2, 5 * row + 3)]
    assert ids_TK.tolist()[0] == [*ties, 0, 4, 5, 9, 10]
    assert ids_TK.tolist()[1:] == [list(range(17))] * 2


@needs_kernels
@pytest.mark.parametrize("options", OPTIONS_OF_TIES, ids=str)
def test_ties_are_decided_as_on_a_cpu(options: dict[str, Any]) -> None:
    from trimtab import triton_kernels

    logits_TE = torch.randint(0, 3, (64, 16), generator=torch.Generator().manual_seed(0)).float()
    bias_E = torch.randint(0, 2, (16,), generator=torch.Generator().manual_seed(1)).float()
    settings = routing(**{"top_k": 4, "score": "sigmoid", **options})
    given = (logits_TE, bias_E, None, None, None, 1, False)
    want_TK = route_ops.plain_forward(*given, settings)[1]
    moved = [value.to(DEVICE) if isinstance(value, Tensor) else value for value in given]
    assert triton_kernels.forward(*moved, settings)[1].tolist() == want_TK.tolist()


@needs_kernels
def test_replayed_ids_out_of_range_are_seen_and_not_counted() -> None:
    from trimtab import triton_kernels

    replay_TK = torch.tensor([[0, 5], [-1, 1], [2, 3]], device=DEVICE)
    logits_TE = torch.zeros(3, 5, device=DEVICE)
    weights_TK, _, counts_GE, *_ = triton_kernels.forward(
        logits_TE, None, replay_TK, None, None, 1, False, routing()
    )
    assert weights_TK.isnan().any(dim=1).tolist() == [True, True, False]
    assert counts_GE.tolist() == [[1, 1, 1, 1, 0]]


# ---------------------------------------------------------------- where they run


def compiled_for_hopper(kernel: Any, constants: dict[str, Any], types: dict[str, str]) -> Any:
    import triton
    from triton.backends.compiler import GPUTarget

    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constexprs=constants)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"E": 8, "N": 8, "N_PAD": 8, "K": 1, "K_PAD": 1, "BLOCK": 64, "NORMALIZES": False},
        {"E": 1000, "N": 1000, "N_PAD": 1024, "K": 32, "K_PAD": 32, "BLOCK": 2, "SUMS": True},
        {"H": 8, "H_PAD": 8, "N": 32, "N_PAD": 32, "TOP_H": 4, "TOP_H_PAD": 4, "TOP2": True},
    ],
    ids=["plain", "one expert", "largest", "expert groups"],
)
def test_the_forward_kernel_compiles_for_a_gpu_without_one(change: dict[str, Any]) -> None:
    from trimtab import triton_kernels

    floats = ("logits_ptr", "bias_ptr", "weights_ptr", "prob_sums_ptr", "lse_ptr", "entropy_ptr")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("replay_ptr", "group_ptr", "ids_ptr"), "*i64")
    types |= {"mask_ptr": "*u8", "counts_ptr": "*i32", "scale": "fp32"}
    types |= dict.fromkeys(("num_tokens_of_group", "num_groups", "tiles_of_program"), "i32")
    constants: dict[str, Any] = {"E": 256, "K": 8, "K_PAD": 8, "H": 1, "H_PAD": 1, "N": 256, "N_PAD": 256}
    constants |= {"TOP_H": 1, "TOP_H_PAD": 1, "TOP2": False, "SCORE": 1, "NORMALIZES": True, "BLOCK": 8}
    constants |= dict.fromkeys(("HAS_BIAS", "HAS_MASK", "COUNTS"), True)
    constants |= dict.fromkeys(("RANKS_LOGITS", "HAS_REPLAY", "HAS_GROUPS", "SUMS"), False)
    compiled = compiled_for_hopper(triton_kernels._forward_kernel, constants | change, types)
    assert ".local" not in compiled.asm["ptx"]
    assert compiled.metadata.shared <= 48 * 1024


@needs_triton
@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
def test_the_backward_kernel_compiles_for_a_gpu_without_one() -> None:
    """The interpreter accepts what the compiler may not; local memory would mean that registers ran out."""
    from trimtab import triton_kernels

    floats = ("grad_weights_ptr", "logits_ptr", "target_ptr", "z_weight_ptr", "grad_ptr")
    types = dict.fromkeys(floats, "*fp32") | {"ids_ptr": "*i16", "group_ptr": "*i64", "mask_ptr": "*u8"}
    types |= {"num_tokens": "i32", "num_tokens_of_group": "i32", "num_groups": "i32", "scale": "fp32"}
    constants = {"E": 256, "C": 256, "K": 8, "K_PAD": 8, "SCORE": 1, "NORMALIZES": True, "BLOCK": 8}
    constants |= {
        "HAS_TARGET": True,
        "ONE_TARGET": False,
        "HAS_Z": True,
        "HAS_GROUPS": False,
        "HAS_MASK": True,
    }
    compiled = compiled_for_hopper(triton_kernels._backward_kernel, constants, types)
    assert ".local" not in compiled.asm["ptx"]


@pytest.mark.parametrize(
    ("reason", "dtype", "num_experts", "top_k"),
    [
        ("logits are torch.float64", torch.float64, 8, 2),
        ("num_experts=1025 is more than the 1024", torch.float32, 1025, 2),
        ("top_k=33 is more than the 32", torch.bfloat16, 64, 33),
    ],
)
def test_why_not(reason: str, dtype: torch.dtype, num_experts: int, top_k: int) -> None:
    assert reason in str(kernels.why_not(dtype, num_experts, top_k))


def test_a_fallback_says_its_reason_once(monkeypatch: Any, caplog: Any) -> None:
    class OnCuda:
        device = torch.device("cuda")
        dtype = torch.float32
        shape = (4, 8)

    monkeypatch.setattr(kernels, "_load", lambda: None)
    kernels._say_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert kernels.kernels_for(OnCuda(), 2) is None  # type: ignore[arg-type]
        assert kernels.kernels_for(OnCuda(), 2) is None  # type: ignore[arg-type]
    assert caplog.text.count("Triton is not installed; pip install triton") == 1
    kernels._say_once.cache_clear()
    assert kernels.kernels_for(torch.zeros(4, 8), 2) is None
    assert len(caplog.records) == 1


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_route_on_cuda(dtype: torch.dtype) -> None:
    """Through the operators and their autograd node, kernels or not, as on the CPU."""
    draw = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(512, 60, generator=draw, dtype=dtype)
    target_GE, grad_TK = torch.rand(4, 60, generator=draw, dtype=dtype), torch.randn(512, 2, generator=draw)
    results = []
    for device in ("cpu", "cuda"):
        leaf_TE = logits_TE.to(device).requires_grad_()
        targets = {"target_GE": target_GE.to(device), "z_weight": torch.ones((), dtype=dtype, device=device)}
        routed = route(leaf_TE, routing(), num_groups=4, **targets)
        routed.weights_TK.backward(grad_TK.to(device, dtype))
        assert leaf_TE.grad is not None
        results.append(
            (routed.weights_TK.cpu(), routed.ids_TK.cpu(), routed.counts_GE.cpu(), leaf_TE.grad.cpu())
        )
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
