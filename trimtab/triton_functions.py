"""What the Triton kernels compute with: scores, softmax along rows, and keys that order as `torch.topk` does.

Shapes: T tokens of a tile, C columns of a tile, H expert groups, N experts per expert group.
"""

# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False

import triton
import triton.language as tl

from trimtab.scores import SCORE_NAMES

# Kernels may read globals that are constants only.
SOFTMAX = tl.constexpr(SCORE_NAMES.index("softmax"))
SIGMOID = tl.constexpr(SCORE_NAMES.index("sigmoid"))


# ---------------------------------------------------------------- scores


@triton.jit
def _log1p_exp_minus_abs(z):
    """log(1 + exp(-|z|)) to the last bits, where 1 + exp(-|z|) alone would lose small terms."""
    u = tl.exp(-tl.abs(z))
    w = 1.0 + u
    return tl.where(w == 1.0, u, tl.log(w) * (u / (w - 1.0)))


@triton.jit
def log_score(z, SCORE: tl.constexpr):
    """`trimtab.scores.log_scores`."""
    if SCORE == SOFTMAX:
        return z
    elif SCORE == SIGMOID:
        return tl.minimum(z, 0.0) - _log1p_exp_minus_abs(z)
    else:
        direct = tl.log(tl.maximum(z, 0.0) + _log1p_exp_minus_abs(z))
        return 0.5 * tl.where(z < -18.0, z - 0.5 * tl.exp(tl.minimum(z, -18.0)), direct)


@triton.jit
def log_score_slope(z, SCORE: tl.constexpr):
    """`trimtab.scores.log_score_derivative`, for scores that have one."""
    if SCORE == SIGMOID:
        return tl.sigmoid(-z)
    else:
        softplus = tl.maximum(z, 0.0) + _log1p_exp_minus_abs(z)
        series = 0.5 - 0.25 * tl.exp(tl.minimum(z, -18.0))
        return tl.where(z < -18.0, series, tl.sigmoid(z) / (2.0 * softplus))


@triton.jit
def local_score(z, SCORE: tl.constexpr):
    """A score that needs one logit."""
    if SCORE == SIGMOID:
        return tl.sigmoid(z)
    else:
        return tl.exp(log_score(z, SCORE))


@triton.jit
def softmax_rows(x):
    """Softmax along rows; also the largest entry of each row, and the sum of exp(x - largest)."""
    largest = tl.max(x, axis=1)
    e = tl.exp(x - largest[:, None])
    total = tl.sum(e, axis=1)
    return e / total[:, None], largest, total


# ---------------------------------------------------------------- selection


@triton.jit
def order_key(x):
    """Integers in the order of floats: NaN above all, -0 equal to 0. No float has the smallest integer, -2^31."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def _unkey(key):
    """The float of a key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def best_in_rounds(key_TC, expert_C, K: tl.constexpr, K_PAD: tl.constexpr, T: tl.constexpr):
    """Ids of the K largest keys of each row, equal ones lowest id first, and the keys with these at -2^31.

    Each round is two reductions of 32-bit integers, for which a warp has an instruction; sorting moves all keys
    and their ids about, which is more work unless K is large.
    """
    k_K = tl.arange(0, K_PAD)
    ids_TK = tl.zeros((T, K_PAD), tl.int32)
    for k in range(K):
        best_T = tl.max(key_TC, axis=1)
        id_T = tl.min(tl.where(key_TC == best_T[:, None], expert_C[None, :], 0x7FFFFFFF), axis=1)
        ids_TK = tl.where((k_K == k)[None, :], id_T[:, None], ids_TK)
        key_TC = tl.where(expert_C[None, :] == id_T[:, None], -0x80000000, key_TC)
    return ids_TK, key_TC


@triton.jit
def limit_groups(
    key_TC,
    H: tl.constexpr,
    H_PAD: tl.constexpr,
    N_PAD: tl.constexpr,
    TOP_H: tl.constexpr,
    TOP_H_PAD: tl.constexpr,
    TOP2: tl.constexpr,
    T: tl.constexpr,
):
    """Keys with those outside each token's best groups moved behind all others."""
    key_THN = tl.reshape(key_TC, (T, H_PAD, N_PAD))
    best_TH = tl.max(key_THN, axis=2)
    if TOP2:
        place_N = tl.arange(0, N_PAD)[None, None, :]
        first_TH = tl.min(tl.where(key_THN == best_TH[:, :, None], place_N, N_PAD), axis=2)
        second_TH = tl.max(tl.where(place_N == first_TH[:, :, None], -0x80000000, key_THN), axis=2)
        best_TH = order_key(_unkey(best_TH) + _unkey(second_TH))
    group_H = tl.arange(0, H_PAD)[None, :]
    best_TH = tl.where(group_H < H, best_TH, -0x80000000)
    packed_TH = (best_TH.to(tl.int64) << 32) | (H_PAD - 1 - group_H).to(tl.int64)
    top_TH = tl.topk(packed_TH, TOP_H_PAD)
    wanted = tl.arange(0, TOP_H_PAD)[None, :] == TOP_H - 1
    last_kept_T = tl.sum(tl.where(wanted, top_TH, 0), axis=1)
    kept_TH = packed_TH >= last_kept_T[:, None]
    key_THN = tl.where(kept_TH[:, :, None], key_THN, -0x7FFFFFFF)
    return tl.reshape(key_THN, (T, H_PAD * N_PAD))
