"""Attention of packed rows and its gradient, in NumPy and fp64, one segment at a time."""

import numpy as np


def hash32(key, value):
    """The dropout hash from its published constants, in 64-bit integers cut to 32."""
    low = np.uint64(0xFFFFFFFF)

    def times(x, c):
        return (x * np.uint64(c)) & low

    def mix(x):
        x = times(x ^ (x >> np.uint64(16)), 0x7FEB352D)
        x = times(x ^ (x >> np.uint64(15)), 0x846CA68B)
        return x ^ (x >> np.uint64(16))

    key, value = np.asarray(key, np.uint64), np.asarray(value, np.uint64)
    x = times(value, 0x9E3779B9) ^ key
    x = times(x ^ (x >> np.uint64(16)), 0x7FEB352D) ^ mix((key + np.uint64(0x9E3779B9)) & low)
    x = times(x ^ (x >> np.uint64(15)), 0x846CA68B)
    return x ^ (x >> np.uint64(16))


def kept(row_key, head, query, key, length, rate):
    """Which probabilities dropout keeps: a byte each of the hash of one of four, bit 3 cleared."""
    query, key = np.broadcast_arrays(query, key)
    first = (head * length + query // 16 * 16 + query % 8) * length + key // 16 * 16 + key % 8
    hashes = hash32(row_key, first & 0xFFFFFFFF).astype("<u4")
    four = hashes[..., None].view(np.uint8)
    which = query // 8 % 2 * 2 + key // 8 % 2
    return np.take_along_axis(four, which[..., None], -1)[..., 0] >= round(rate * 256)


def attention(qkv_BTCNH, segment_ids_BT, g_BTNH, rate=0.0, row_keys_B=None):
    """(output [B, T, N, H], gradient of sum(output * g) [B, T, 3, N, H])."""
    B, T, _, N, H = qkv_BTCNH.shape
    qkv_BTCNH, g_BTNH = np.asarray(qkv_BTCNH, np.float64), np.asarray(g_BTNH, np.float64)
    out, grad = np.zeros((B, T, N, H)), np.zeros((B, T, 3, N, H))
    for b in range(B):
        for segment in np.unique(segment_ids_BT[b]):
            if segment == 0:
                continue
            at = np.flatnonzero(segment_ids_BT[b] == segment)
            for n in range(N):
                q, k, v = (qkv_BTCNH[b, at, c, n] for c in range(3))
                g = g_BTNH[b, at, n]
                scores = q @ k.T / np.sqrt(H)
                p = np.exp(scores - scores.max(axis=1, keepdims=True))
                p /= p.sum(axis=1, keepdims=True)
                factor = 1.0
                if rate:
                    keep = kept(row_keys_B[b], n, at[:, None], at[None, :], T, rate)
                    factor = keep / (1 - round(rate * 256) / 256)
                out[b, at, n] = (p * factor) @ v
                grad[b, at, 2, n] = (p * factor).T @ g
                dp = (g @ v.T) * factor
                ds = p * (dp - (dp * p).sum(axis=1, keepdims=True)) / np.sqrt(H)
                grad[b, at, 0, n], grad[b, at, 1, n] = ds @ k, ds.T @ q
    return out, grad
