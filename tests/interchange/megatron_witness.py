"""Megatron's BERT as NeMo 1.x has it, in plain PyTorch, and its `.nemo` file.

The layers have NeMo's names, so that `state_dict` is that of a released file. The sequence is the
first axis, as there.
"""

import io
import tarfile

import numpy as np
import torch
import yaml
from torch import nn

from tests.interchange.packed import TOKENS, our_ids

torch.set_num_threads(1)  # the tests share their cores
CONFIG = {
    "target": "bionemo.model.protein.esm1nv.esm1nv_model.ESM1nvModel",
    "num_layers": 3,
    "hidden_size": 48,
    "num_attention_heads": 4,
    "ffn_hidden_size": 96,
    "max_position_embeddings": 130,
    "layernorm_epsilon": 1e-5,
    "hidden_dropout": 0.1,
    "kv_channels": None,
    "bert_binary_head": False,
    "make_vocab_size_divisible_by": 128,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "tokenizer": {
        "library": "sentencepiece",
        "type": None,
        "model": "nemo:0123abcd_protein_sequence_sentencepiece.model",
        "vocab_file": None,
    },
}


class Group(nn.Module):
    """A module that only holds others."""

    def __init__(self, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)


def layer(config):
    D, F, epsilon = (config[k] for k in ("hidden_size", "ffn_hidden_size", "layernorm_epsilon"))
    return Group(
        input_layernorm=nn.LayerNorm(D, eps=epsilon),
        self_attention=Group(query_key_value=nn.Linear(D, 3 * D), dense=nn.Linear(D, D)),
        post_attention_layernorm=nn.LayerNorm(D, eps=epsilon),
        mlp=Group(dense_h_to_4h=nn.Linear(D, F), dense_4h_to_h=nn.Linear(F, D)),
    )


class MegatronBert(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, epsilon = config["hidden_size"], config["layernorm_epsilon"]
        self.config = config
        embedding = Group(
            word_embeddings=nn.Embedding(128, D),
            position_embeddings=nn.Embedding(config["max_position_embeddings"], D),
        )
        self.language_model = Group(
            embedding=embedding,
            encoder=Group(
                layers=nn.ModuleList([layer(config) for _ in range(config["num_layers"])]),
                final_layernorm=nn.LayerNorm(D, eps=epsilon),
            ),
        )
        self.lm_head = Group(dense=nn.Linear(D, D), layernorm=nn.LayerNorm(D, eps=epsilon))
        self.lm_head.bias = nn.Parameter(torch.zeros(128))
        if config["bert_binary_head"]:
            embedding.tokentype_embeddings = nn.Embedding(2, D)
            self.language_model.pooler = Group(dense=nn.Linear(D, D))
            self.binary_head = nn.Linear(D, 2)

    def attention(self, module, x, real):
        (s, b, D), heads = x.shape, self.config["num_attention_heads"]
        size = D // heads
        mixed = module.query_key_value(x)
        if self.config.get("megatron_legacy", False):
            mixed = mixed.view(s, b, 3, heads, size).transpose(2, 3).reshape(s, b, 3 * D)
        mixed = mixed.view(s, b, heads, 3 * size)  # head by head: query, key, value
        query, key, value = (mixed[..., i * size : (i + 1) * size] for i in range(3))
        scores = torch.einsum("sbnh,tbnh->bnst", query, key) / size**0.5
        scores = scores.masked_fill(~real[:, None, None, :], -10000.0)
        context = torch.einsum("bnst,tbnh->sbnh", torch.softmax(scores, -1), value)
        return module.dense(context.reshape(s, b, D))

    def forward(self, ids, real):
        """(hidden states [b, s, D], the last after the final norm; logits)."""
        embedding = self.language_model.embedding
        x = embedding.word_embeddings(ids) + embedding.position_embeddings.weight[: ids.shape[1]]
        if self.config["bert_binary_head"]:
            x = x + embedding.tokentype_embeddings(torch.zeros_like(ids))
        x = x.transpose(0, 1)
        hidden = [x]
        for block in self.language_model.encoder.layers:
            x = x + self.attention(block.self_attention, block.input_layernorm(x), real)
            y = block.mlp.dense_h_to_4h(block.post_attention_layernorm(x))
            if self.config.get("bias_gelu_fusion", True):
                y = y * 0.5 * (1.0 + torch.tanh(0.79788456 * y * (1 + 0.044715 * y * y)))
            else:
                y = nn.functional.gelu(y)
            x = x + block.mlp.dense_4h_to_h(y)
            hidden.append(x)
        hidden[-1] = x = self.language_model.encoder.final_layernorm(x)
        x = self.lm_head.layernorm(nn.functional.gelu(self.lm_head.dense(x)))
        logits = x @ embedding.word_embeddings.weight.T + self.lm_head.bias
        return [h.transpose(0, 1) for h in hidden], logits.transpose(0, 1)


def make(seed=0, **fields):
    """A model in which no bias and no scale is at its neutral value."""
    torch.manual_seed(seed)
    model = MegatronBert(CONFIG | fields).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter * 0.5 + 0.05 * torch.randn_like(parameter))
    return model


def run(model, sequences):
    """{sequence: (hidden states, logits of the 30 tokens)}, padded."""
    rows = [torch.tensor(our_ids(s)) for s in sequences]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=3).long()
    with torch.no_grad():
        hidden, logits = model(ids, ids != 3)
    return {
        s: ([h[i, : len(r)].numpy() for h in hidden], logits[i, : len(r), : len(TOKENS)].numpy())
        for i, (s, r) in enumerate(zip(sequences, rows, strict=True))
    }


def sentencepiece(tokens=TOKENS) -> bytes:
    """A SentencePiece model, written by hand: pieces with score and type, then a trainer spec."""
    content = b""
    for token in tokens:
        text = token.encode()
        piece = b"\x0a" + bytes([len(text)]) + text + b"\x15" + np.float32(-2.5).tobytes()
        content += b"\x0a" + bytes([len(piece) + 2]) + piece + b"\x18\x04"
    return content + b"\x12\x04\x0a\x02ab"


def members(model, prefix="model.", dtype=None, tokens=TOKENS) -> dict[str, bytes]:
    """The files of a `.nemo`, by name."""
    state = {f"{prefix}{k}": v.to(dtype or v.dtype) for k, v in model.state_dict().items()}
    weights = io.BytesIO()
    torch.save(state, weights)
    artifact = model.config["tokenizer"]["model"].removeprefix("nemo:")
    return {
        "model_config.yaml": yaml.safe_dump(model.config).encode(),
        "model_weights.ckpt": weights.getvalue(),
        artifact: sentencepiece(tokens),
    }


def save(path, files: dict[str, bytes], mode="w:") -> str:
    """Writes the tar, as NeMo does: names begin with `./`. Returns its path."""
    with tarfile.open(path, mode) as archive:
        folder = tarfile.TarInfo(".")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return str(path)
