"""Fused routing in Triton: one kernel from logits to weights, ids and counts, one for the whole gradient.

Shapes: T tokens, E experts, K top-k, G groups of tokens, H expert groups, N experts per expert group, P programs,
C columns of a tile: E, or H by N, each padded to a power of two.

A program holds tiles of a few tokens by all experts in registers, so that a logit is read once and its gradient
written once. Arithmetic is float32. Nothing depends on the order in which programs run: counts are sums of
integers, and logged sums are formed per program and added in the order of programs. Equal experts are taken lowest
id first, where `torch.topk` promises nothing; NaN ranks first and -inf last, as there.

Call through `trimtab.route_ops`; the functions here take what its functions take, with float32, bfloat16 or float16
logits on a CUDA device.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from trimtab.counts import sum_groups
from trimtab.routing import Routing
from trimtab.scores import SCORE_NAMES, probs
from trimtab.triton_functions import (
    SOFTMAX,
    best_in_rounds,
    limit_groups,
    local_score,
    log_score,
    log_score_slope,
    order_key,
    softmax_rows,
)

_TILE = 2048  # elements of a tile: 16 for each thread of four warps
_PROGRAMS = 1024  # of a forward: a few for each multiprocessor
MAX_ROUNDS = tl.constexpr(16)  # top-k up to which the best are taken one by one
# Said, because Triton's default of the latter depends on its version.
_COMPILER = {"num_warps": 4, "enable_fp_fusion": True}


@triton.jit
def _forward_kernel(
    logits_ptr,
    bias_ptr,
    replay_ptr,
    mask_ptr,
    group_ptr,
    weights_ptr,
    ids_ptr,
    counts_ptr,
    prob_sums_ptr,
    lse_ptr,
    entropy_ptr,
    num_tokens_of_group,
    num_groups,
    tiles_of_program,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    N: tl.constexpr,
    N_PAD: tl.constexpr,
    TOP_H: tl.constexpr,
    TOP_H_PAD: tl.constexpr,
    TOP2: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZES: tl.constexpr,
    RANKS_LOGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_REPLAY: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    COUNTS: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a run of tiles of tokens of one contiguous group (axis 0), and its part of the counts."""
    group = tl.program_id(0)
    column_C = tl.arange(0, H_PAD * N_PAD)
    expert_C = column_C // N_PAD * N + column_C % N_PAD
    exists_C = (column_C // N_PAD < H) & (column_C % N_PAD < N)
    k_K = tl.arange(0, K_PAD)
    if COUNTS and not (HAS_GROUPS or HAS_REPLAY):
        count_TC = tl.zeros((BLOCK, H_PAD * N_PAD), tl.int32)
    if SUMS and not HAS_GROUPS:
        prob_sum_TC = tl.zeros((BLOCK, H_PAD * N_PAD), tl.float32)
    for tile in range(tiles_of_program):
        place_T = (tl.program_id(1) * tiles_of_program + tile) * BLOCK + tl.arange(0, BLOCK)
        in_range_T = place_T < num_tokens_of_group
        token_T = group.to(tl.int64) * num_tokens_of_group + place_T
        valid_T = in_range_T
        if HAS_MASK:
            valid_T = valid_T & (tl.load(mask_ptr + token_T, mask=in_range_T, other=0) != 0)
        row_T = logits_ptr + token_T * E
        there_TC = in_range_T[:, None] & exists_C[None, :]
        z_TC = tl.load(row_T[:, None] + expert_C[None, :], mask=there_TC, other=-float("inf")).to(tl.float32)
        # Rows past the end hold zeros, whose softmax is finite.
        z_TC = tl.where(in_range_T[:, None], z_TC, 0.0)
        if SCORE == SOFTMAX and not (NORMALIZES and RANKS_LOGITS):
            p_TC, largest_T, total_T = softmax_rows(z_TC)
        place_TK = token_T[:, None] * K + k_K[None, :]
        wanted_TK = in_range_T[:, None] & (k_K < K)[None, :]
        there_TK = wanted_TK
        if HAS_REPLAY:
            ids_TK = tl.load(replay_ptr + place_TK, mask=wanted_TK, other=0)
            # An id out of range is neither read nor counted, and shows as a weight of NaN.
            there_TK = wanted_TK & (ids_TK >= 0) & (ids_TK < E)
        else:
            if RANKS_LOGITS:
                rank_TC = z_TC
            elif SCORE == SOFTMAX:
                rank_TC = p_TC
            else:
                rank_TC = local_score(z_TC, SCORE)
            if HAS_BIAS:
                rank_TC += tl.load(bias_ptr + expert_C, mask=exists_C, other=0.0)[None, :]
            key_TC = tl.where(exists_C[None, :], order_key(rank_TC), -0x80000000)
            if TOP_H < H:
                key_TC = limit_groups(key_TC, H, H_PAD, N_PAD, TOP_H, TOP_H_PAD, TOP2, BLOCK)
                key_TC = tl.where(exists_C[None, :], key_TC, -0x80000000)
            if K <= MAX_ROUNDS:
                ids_TK, key_TC = best_in_rounds(key_TC, expert_C, K, K_PAD, BLOCK)
                chosen_TC = key_TC == -0x80000000
            else:
                # Each id below its key: all are different, and equal keys are in the order of ids.
                packed_TC = (key_TC.to(tl.int64) << 32) | (1023 - expert_C[None, :] % 1024).to(tl.int64)
                top_TK = tl.topk(packed_TC, K_PAD)
                ids_TK = 1023 - (top_TK & 1023).to(tl.int32)
                last_T = tl.sum(tl.where((k_K == K - 1)[None, :], top_TK, 0), axis=1)
                chosen_TC = packed_TC >= last_T[:, None]
            if COUNTS and not HAS_GROUPS:
                count_TC += (chosen_TC & exists_C[None, :] & valid_T[:, None]).to(tl.int32)
        # The row was just read, so this comes from the cache.
        z_TK = tl.load(row_T[:, None] + ids_TK, mask=there_TK, other=float("nan")).to(tl.float32)
        if NORMALIZES:
            log_TK = tl.where((k_K < K)[None, :], log_score(z_TK, SCORE), -float("inf"))
            w_TK, _, _ = softmax_rows(log_TK)
        elif SCORE == SOFTMAX:
            w_TK = tl.exp(z_TK - largest_T[:, None]) / total_T[:, None]
        else:
            w_TK = local_score(z_TK, SCORE)
        tl.store(weights_ptr + place_TK, w_TK * scale, mask=wanted_TK)
        tl.store(ids_ptr + place_TK, ids_TK.to(tl.int64), mask=wanted_TK)
        if COUNTS and (HAS_GROUPS or HAS_REPLAY):
            group_T = tl.zeros((BLOCK,), tl.int64) + group
            if HAS_GROUPS:
                group_T = tl.load(group_ptr + token_T, mask=in_range_T, other=0)
            known_T = valid_T & (group_T >= 0) & (group_T < num_groups)
            counted_TK = there_TK & known_T[:, None]
            one_TK = tl.full((BLOCK, K_PAD), 1, tl.int32)
            tl.atomic_add(counts_ptr + group_T[:, None] * E + ids_TK, one_TK, mask=counted_TK, sem="relaxed")
        if SUMS:
            log_TC = tl.where(exists_C[None, :], log_score(z_TC, SCORE), -float("inf"))
            q_TC, top_T, sum_T = softmax_rows(log_TC)
            log_q_TC = tl.where(q_TC > 0.0, log_TC - top_T[:, None] - tl.log(sum_T)[:, None], 0.0)
            tl.store(entropy_ptr + token_T, -tl.sum(q_TC * log_q_TC, axis=1), mask=in_range_T)
            if SCORE != SOFTMAX:
                _, top_T, sum_T = softmax_rows(z_TC)
            tl.store(lse_ptr + token_T, top_T + tl.log(sum_T), mask=in_range_T)
            if not HAS_GROUPS:
                prob_sum_TC += tl.where(valid_T[:, None], q_TC, 0.0)
    if COUNTS and not (HAS_GROUPS or HAS_REPLAY):
        count_C = tl.sum(count_TC, axis=0)
        row = counts_ptr + group.to(tl.int64) * E
        tl.atomic_add(row + expert_C, count_C, mask=exists_C & (count_C > 0), sem="relaxed")
    if SUMS and not HAS_GROUPS:
        program = group.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        tl.store(prob_sums_ptr + program * E + expert_C, tl.sum(prob_sum_TC, axis=0), mask=exists_C)


# ---------------------------------------------------------------- backward


@triton.jit
def _backward_kernel(
    grad_weights_ptr,
    logits_ptr,
    ids_ptr,
    target_ptr,
    z_weight_ptr,
    group_ptr,
    mask_ptr,
    grad_ptr,
    num_tokens,
    num_tokens_of_group,
    num_groups,
    scale,
    E: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    K_PAD: tl.constexpr,
    SCORE: tl.constexpr,
    NORMALIZES: tl.constexpr,
    HAS_TARGET: tl.constexpr,
    ONE_TARGET: tl.constexpr,
    HAS_Z: tl.constexpr,
    HAS_GROUPS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the gradient of a tile of tokens by all experts."""
    token_T = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    in_range_T = token_T < num_tokens
    expert_C = tl.arange(0, C)
    exists_C = expert_C < E
    there_TC = in_range_T[:, None] & exists_C[None, :]
    row_T = logits_ptr + token_T * E
    z_TC = tl.load(row_T[:, None] + expert_C[None, :], mask=there_TC, other=-float("inf")).to(tl.float32)
    z_TC = tl.where(in_range_T[:, None], z_TC, 0.0)
    grad_TC = tl.zeros((BLOCK, C), tl.float32)
    if SCORE == SOFTMAX:
        p_TC, largest_T, total_T = softmax_rows(z_TC)
    elif HAS_TARGET:
        log_TC = tl.where(exists_C[None, :], log_score(z_TC, SCORE), -float("inf"))
        p_TC, _, _ = softmax_rows(log_TC)
    if HAS_TARGET:
        if ONE_TARGET:
            target_TC = tl.load(target_ptr + expert_C, mask=exists_C, other=0.0)[None, :]
        else:
            if HAS_GROUPS:
                group_T = tl.load(group_ptr + token_T, mask=in_range_T, other=0)
            else:
                group_T = token_T // num_tokens_of_group
            known_TC = there_TC & ((group_T >= 0) & (group_T < num_groups))[:, None]
            target_TC = tl.load(
                target_ptr + group_T[:, None] * E + expert_C[None, :], mask=known_TC, other=0.0
            )
        mean_T = tl.sum(target_TC * p_TC, axis=1)
        grad_TC = p_TC * (target_TC - mean_T[:, None])
        if SCORE != SOFTMAX:
            grad_TC *= log_score_slope(z_TC, SCORE)
    if HAS_Z:
        slope = 2.0 * tl.load(z_weight_ptr)
        if SCORE == SOFTMAX:
            grad_TC += p_TC * (slope * (largest_T + tl.log(total_T)))[:, None]
        else:
            softmax_TC, largest_T, total_T = softmax_rows(z_TC)
            grad_TC += softmax_TC * (slope * (largest_T + tl.log(total_T)))[:, None]
    if HAS_MASK:
        valid_T = tl.load(mask_ptr + token_T, mask=in_range_T, other=0) != 0
        grad_TC = tl.where(valid_T[:, None], grad_TC, 0.0)
    # Of the weights: values at the chosen experts, and for a softmax over all experts a share of every p.
    k_K = tl.arange(0, K_PAD)
    there_TK = in_range_T[:, None] & (k_K < K)[None, :]
    place_TK = token_T[:, None] * K + k_K[None, :]
    ids_TK = tl.load(ids_ptr + place_TK, mask=there_TK, other=0).to(tl.int32)
    g_TK = tl.load(grad_weights_ptr + place_TK, mask=there_TK, other=0.0).to(tl.float32) * scale
    known_TK = there_TK & (ids_TK >= 0) & (ids_TK < E)
    z_TK = tl.load(row_T[:, None] + ids_TK, mask=known_TK, other=0.0).to(tl.float32)
    if NORMALIZES:
        log_TK = tl.where((k_K < K)[None, :], log_score(z_TK, SCORE), -float("inf"))
        w_TK, _, _ = softmax_rows(log_TK)
        g_TK = w_TK * (g_TK - tl.sum(g_TK * w_TK, axis=1)[:, None])
    elif SCORE == SOFTMAX:
        g_TK = g_TK * (tl.exp(z_TK - largest_T[:, None]) / total_T[:, None])
        grad_TC -= p_TC * tl.sum(tl.where(there_TK, g_TK, 0.0), axis=1)[:, None]
    else:
        g_TK = g_TK * local_score(z_TK, SCORE)
    if SCORE != SOFTMAX:
        g_TK = g_TK * log_score_slope(z_TK, SCORE)
    for k in range(K):
        id_T = tl.sum(tl.where((k_K == k)[None, :], ids_TK, 0), axis=1)
        g_T = tl.sum(tl.where((k_K == k)[None, :], g_TK, 0.0), axis=1)
        grad_TC += tl.where(expert_C[None, :] == id_T[:, None], g_T[:, None], 0.0)
    place_TC = token_T[:, None] * E + expert_C[None, :]
    tl.store(grad_ptr + place_TC, grad_TC.to(grad_ptr.dtype.element_ty), mask=there_TC)


# ---------------------------------------------------------------- launches


def forward(
    logits_TE: Tensor,
    expert_bias_E: Tensor | None,
    replay_ids_TK: Tensor | None,
    valid_mask_T: Tensor | None,
    group_ids_T: Tensor | None,
    num_groups: int,
    with_sums: bool,
    routing: Routing,
    *,
    tile: int = _TILE,
    num_programs: int = _PROGRAMS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`trimtab.route_ops.forward` in one kernel.

    Args:
        logits_TE: as there, and so on.
        expert_bias_E: same.
        replay_ids_TK: same.
        valid_mask_T: same.
        group_ids_T: same.
        num_groups: same.
        with_sums: same. Sums of p over groups of unequal sizes are formed by torch operators.
        routing: same.
        tile: elements that a program holds at a time, at least C.
        num_programs: programs to spread tokens over.
    """
    num_tokens, num_experts = logits_TE.shape
    logits_TE = logits_TE.contiguous()
    if num_groups <= 1:
        group_ids_T = None
    weights_TK = logits_TE.new_empty(num_tokens, routing.top_k, dtype=torch.float32)
    ids_TK = torch.empty_like(weights_TK, dtype=torch.int64)
    counts_GE = logits_TE.new_zeros(num_groups, num_experts, dtype=torch.int32)
    lse_T = logits_TE.new_empty(num_tokens if with_sums else 0, dtype=torch.float32)
    entropy_T = torch.empty_like(lse_T)
    limits = routing.limits_groups and replay_ids_TK is None
    num_expert_groups = routing.num_expert_groups if limits else 1
    group_size = num_experts // num_expert_groups
    columns = triton.next_power_of_2(num_expert_groups) * triton.next_power_of_2(group_size)
    block = max(1, min(tile // columns, 64))
    # Contiguous groups have programs of their own; others are told apart token by token.
    parts = 1 if group_ids_T is not None else max(num_groups, 1)
    num_tokens_of_part = num_tokens // parts
    num_tiles = triton.cdiv(num_tokens_of_part, block)
    tiles_of_program = max(1, triton.cdiv(num_tiles * parts, num_programs))
    programs_of_part = triton.cdiv(num_tiles, tiles_of_program)
    sums_here = with_sums and group_ids_T is None
    prob_sums_PE = logits_TE.new_empty(
        parts * programs_of_part if sums_here else 0, num_experts, dtype=torch.float32
    )
    if num_tokens > 0:
        # Triton launches on the current device, which may be another.
        with torch.cuda.device_of(logits_TE):
            _forward_kernel[(parts, programs_of_part)](
                logits_TE,
                logits_TE if expert_bias_E is None else expert_bias_E.to(torch.float32).contiguous(),
                logits_TE if replay_ids_TK is None else replay_ids_TK.contiguous(),
                logits_TE if valid_mask_T is None else valid_mask_T.contiguous().view(torch.uint8),
                logits_TE if group_ids_T is None else group_ids_T.contiguous(),
                weights_TK,
                ids_TK,
                counts_GE,
                prob_sums_PE,
                lse_T,
                entropy_T,
                num_tokens_of_part,
                num_groups,
                tiles_of_program,
                routing.scale,
                E=num_experts,
                K=routing.top_k,
                K_PAD=triton.next_power_of_2(routing.top_k),
                H=num_expert_groups,
                H_PAD=triton.next_power_of_2(num_expert_groups),
                N=group_size,
                N_PAD=triton.next_power_of_2(group_size),
                TOP_H=routing.top_k_groups if limits else 1,
                TOP_H_PAD=triton.next_power_of_2(routing.top_k_groups) if limits else 1,
                TOP2=routing.group_score == "top2_sum",
                SCORE=SCORE_NAMES.index(routing.score),
                NORMALIZES=routing.normalizes,
                RANKS_LOGITS=replay_ids_TK is not None or routing.ranks_logits(expert_bias_E is not None),
                HAS_BIAS=expert_bias_E is not None,
                HAS_REPLAY=replay_ids_TK is not None,
                HAS_MASK=valid_mask_T is not None,
                HAS_GROUPS=group_ids_T is not None,
                COUNTS=num_groups > 0,
                SUMS=with_sums,
                BLOCK=block,
                **_COMPILER,
            )
    if not with_sums:
        prob_sums_GE = prob_sums_PE
    elif sums_here:
        prob_sums_GE = prob_sums_PE.view(parts, programs_of_part, num_experts).sum(dim=1)[:num_groups]
    else:
        probs_TE = probs(logits_TE, routing.score)
        if valid_mask_T is not None:
            probs_TE = probs_TE.masked_fill(~valid_mask_T[:, None], 0)
        prob_sums_GE = sum_groups(probs_TE, group_ids_T, num_groups)
    return weights_TK, ids_TK, counts_GE.to(torch.int64), prob_sums_GE, lse_T, entropy_T


def backward(
    grad_weights_TK: Tensor,
    logits_TE: Tensor,
    ids_TK: Tensor,
    target_GE: Tensor | None,
    z_weight: Tensor | None,
    group_ids_T: Tensor | None,
    valid_mask_T: Tensor | None,
    routing: Routing,
    *,
    tile: int = _TILE,
) -> Tensor:
    """`trimtab.route_ops.backward` in one kernel.

    Args:
        grad_weights_TK: as there, and so on.
        logits_TE: same.
        ids_TK: same.
        target_GE: same.
        z_weight: same.
        group_ids_T: same.
        valid_mask_T: same.
        routing: same.
        tile: elements that a program holds, at least C.
    """
    num_tokens, num_experts = logits_TE.shape
    logits_TE = logits_TE.contiguous()
    grad_TE = torch.empty_like(logits_TE)
    if num_tokens == 0:
        return grad_TE
    columns = triton.next_power_of_2(num_experts)
    block = max(1, min(tile // columns, 64))
    num_targets = 1 if target_GE is None else len(target_GE)
    with torch.cuda.device_of(logits_TE):
        _backward_kernel[(triton.cdiv(num_tokens, block),)](
            grad_weights_TK.contiguous(),
            logits_TE,
            ids_TK.contiguous(),
            logits_TE if target_GE is None else target_GE.to(torch.float32).contiguous(),
            logits_TE if z_weight is None else z_weight.to(torch.float32),
            logits_TE if group_ids_T is None else group_ids_T.contiguous(),
            logits_TE if valid_mask_T is None else valid_mask_T.contiguous().view(torch.uint8),
            grad_TE,
            num_tokens,
            max(num_tokens // num_targets, 1),
            num_targets,
            routing.scale,
            E=num_experts,
            C=columns,
            K=routing.top_k,
            K_PAD=triton.next_power_of_2(routing.top_k),
            SCORE=SCORE_NAMES.index(routing.score),
            NORMALIZES=routing.normalizes,
            HAS_TARGET=target_GE is not None,
            ONE_TARGET=num_targets == 1,
            HAS_Z=z_weight is not None,
            HAS_GROUPS=group_ids_T is not None,
            HAS_MASK=valid_mask_T is not None,
            BLOCK=block,
            **_COMPILER,
        )
    return grad_TE
