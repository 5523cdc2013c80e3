"""ESM-1nv written again from its published description: NumPy, fp64, one sequence at a time."""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x):
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def layer_norm(x, p, epsilon=1e-5):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * p["scale"] + p["bias"]


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def self_attention(x, p, p_out, heads):
    length, width = x.shape
    size = width // heads
    qkv = x @ p["kernel"] + p["bias"]
    mixed = np.empty((length, width))
    for h in range(heads):
        q, k, v = (qkv[:, i * width + h * size : i * width + (h + 1) * size] for i in range(3))
        mixed[:, h * size : (h + 1) * size] = softmax(q @ k.T / math.sqrt(size)) @ v
    return mixed @ p_out["kernel"] + p_out["bias"]


def forward(params, tokens, heads, norm="pre", ffn_activation=gelu_tanh, head_activation=gelu_erf):
    """(hidden states 0, 1, .., last after the outer LN; logits [length, 30]) of one sequence."""

    def ffn(x, p):
        x = ffn_activation(x @ p["ffn_input"]["kernel"] + p["ffn_input"]["bias"])
        return x @ p["ffn_output"]["kernel"] + p["ffn_output"]["bias"]

    x = params["token_embedding"][tokens] + params["position_embedding"][: len(tokens)]
    if norm == "post":
        x = layer_norm(x, params["outer_norm"])
    hidden = [x]
    for i in range(len(params["blocks"])):
        p = params["blocks"][str(i)]
        if norm == "pre":
            normed = layer_norm(x, p["attention_norm"])
            x = x + self_attention(normed, p["qkv"], p["attention_output"], heads)
            x = x + ffn(layer_norm(x, p["ffn_norm"]), p)
        else:
            attended = x + self_attention(x, p["qkv"], p["attention_output"], heads)
            x = layer_norm(attended, p["attention_norm"])
            x = layer_norm(x + ffn(x, p), p["ffn_norm"])
        hidden.append(x)
    if norm == "pre":
        x = layer_norm(x, params["outer_norm"])
    hidden.append(x)
    x = head_activation(x @ params["head_dense"]["kernel"] + params["head_dense"]["bias"])
    x = layer_norm(x, params["head_norm"])
    return hidden, (x @ params["token_embedding"].T + params["head_bias"])[:, :30]
