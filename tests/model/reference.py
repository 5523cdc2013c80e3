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
    """(hidden states 0, 1, .., last after the final LayerNorm; logits [length, 30])."""

    def ffn(x, p):
        x = ffn_activation(x @ p["fc1"]["kernel"] + p["fc1"]["bias"])
        return x @ p["fc2"]["kernel"] + p["fc2"]["bias"]

    embedding = params["token_embedding"]["embedding"]
    x = embedding[tokens] + params["position_embedding"]["embedding"][: len(tokens)]
    if norm == "post":
        x = layer_norm(x, params["embedding_norm"])
    hidden = [x]
    for i in range(len(params["blocks"])):
        p = params["blocks"][str(i)]
        if norm == "pre":
            normed = layer_norm(x, p["attention_norm"])
            x = x + self_attention(normed, p["qkv"], p["out_proj"], heads)
            x = x + ffn(layer_norm(x, p["ffn_norm"]), p)
        else:
            attended = x + self_attention(x, p["qkv"], p["out_proj"], heads)
            x = layer_norm(attended, p["attention_norm"])
            x = layer_norm(x + ffn(x, p), p["ffn_norm"])
        hidden.append(x)
    if norm == "pre":
        x = layer_norm(x, params["final_norm"])
    hidden.append(x)
    head = params["lm_head"]
    x = head_activation(x @ head["dense"]["kernel"] + head["dense"]["bias"])
    x = layer_norm(x, head["layer_norm"])
    return hidden, (x @ embedding.T + head["bias"])[:, :30]
