"""A block of the encoder: self-attention and a feed-forward network. Axes of names: `encoder`."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from esm1nv_jax.model import dropout as drop
from esm1nv_jax.model import esm2
from esm1nv_jax.model.attention import attention
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.model.encoder_config import ComputeConfig, EncoderConfig
from esm1nv_jax.model.kernels import remat
from esm1nv_jax.model.kernels.attention_xla import attention_weights
from esm1nv_jax.model.layers import LayerNorm, Linear, activate, add_residual, add_residual_and_norm
from esm1nv_jax.model.lora import LoraBlock


class Block(nnx.Module):
    """Self-attention and a feed-forward network, each added to the residual stream."""

    def __init__(self, config: EncoderConfig, compute: ComputeConfig, layer: int, rngs: nnx.Rngs):
        D, F, bias = config.width, config.ffn, config.bias
        # Before a product a norm returns its operand, after a sum the residual.
        pre = config.norm == "pre"
        norm_dtype = compute.activation_dtype if pre else compute.residual_dtype
        self.attention_norm = LayerNorm(config, norm_dtype, rngs)
        self.qkv = Linear(D, 3 * D, compute, rngs, bias)
        if config.qk_norm:
            self.q_norm = LayerNorm(config, compute.activation_dtype, rngs, bias=False)
            self.k_norm = LayerNorm(config, compute.activation_dtype, rngs, bias=False)
        if config.bias_kv:
            self.bias_kv = nnx.Param(jnp.zeros((2, D)))
        self.out_proj = Linear(D, D, compute, rngs, bias)
        self.ffn_norm = LayerNorm(config, norm_dtype, rngs)
        self.fc1 = Linear(D, config.fc1_width, compute, rngs, bias)
        self.fc2 = Linear(F, D, compute, rngs, bias)
        self.config, self.compute, self.layer = config, compute, layer

    def linear(
        self, name: str, x_BTK, key: DropoutKey | None, lora: LoraBlock | None, bias="trained"
    ):
        y_BTN = getattr(self, name)(x_BTK, bias)
        if lora is None:
            return y_BTN
        return lora.add(name, y_BTN, x_BTK, key, self.layer, self.compute.operand_dtype)

    def queries_keys_values(self, x_BTD, segment_ids_BT, rope, key: DropoutKey | None, lora):
        """Queries, keys and values of each head, [B, T, C, N, H]."""
        (B, T, D), N = x_BTD.shape, self.config.heads
        qkv_BTCD = self.linear("qkv", x_BTD, key, lora).reshape(B, T, 3, D)
        qkv_BTCD = checkpoint_name(qkv_BTCD, remat.QKV)
        if self.config.qk_norm:
            q_BTD, k_BTD, v_BTD = (qkv_BTCD[:, :, c] for c in range(3))
            qkv_BTCD = jnp.stack([self.q_norm(q_BTD), self.k_norm(k_BTD), v_BTD], axis=2)
        if self.config.bias_kv:
            qkv_BTCD = esm2.replace_end(qkv_BTCD, segment_ids_BT, self.bias_kv[...])
        qkv_BTCNH = qkv_BTCD.reshape(B, T, 3, N, D // N)
        return qkv_BTCNH if rope is None else esm2.apply_rope(qkv_BTCNH, rope)

    def attention(self, x_BTD, segment_ids_BT, rope, key: DropoutKey | None, lora, columns_BM=None):
        """What `out_proj` projects; [B, M, D] where `columns_BM` are given."""
        dtype = self.compute.operand_dtype
        rate = self.config.attention_dropout
        qkv_BTCNH = self.queries_keys_values(x_BTD, segment_ids_BT, rope, key, lora)
        keys_B = key.rows(self.layer, drop.ATTENTION) if key is not None and rate else None
        backend, chip = self.compute.attention, self.compute.chip
        out_BTNH = attention(
            qkv_BTCNH, segment_ids_BT, dtype, rate, keys_B, backend, chip, columns_BM
        )
        return out_BTNH.reshape(*out_BTNH.shape[:2], -1)

    def attention_weights(self, x_BTD, segment_ids_BT, rope, lora):
        """fp32 [B, N, T, S], of the block's input and without dropout, whatever the backend."""
        if self.config.norm == "pre":
            x_BTD = self.attention_norm(x_BTD)
        qkv_BTCNH = self.queries_keys_values(x_BTD, segment_ids_BT, rope, None, lora)
        return attention_weights(qkv_BTCNH, segment_ids_BT, self.compute.operand_dtype)

    def ffn(self, x_BTD, key: DropoutKey | None, lora):
        """What `fc2` projects."""
        activation, bias = self.config.ffn_activation, self.fc1.bias
        backend = self.compute.backend("gelu")
        if backend == "xla" or activation != "gelu_tanh" or bias is None:
            x_BTF = checkpoint_name(self.linear("fc1", x_BTD, key, lora), remat.FC1)
            return activate(activation, x_BTF)
        # Pallas takes 0.1 s to import, and a CPU never needs it.
        from esm1nv_jax.model.kernels.gelu import gelu_of_biased

        x_BTF = checkpoint_name(self.linear("fc1", x_BTD, key, lora, "constant"), remat.FC1)
        return gelu_of_biased(backend, x_BTF, bias[...])

    def add(self, x_BTD, name: str, y_BTK, key: DropoutKey | None, lora, norm: LayerNorm | None):
        """The residual with what the last layer of a branch, `name`, makes of y; and that under
        `norm`, if there is one."""
        config, backend = self.config, self.compute.backend("residual_norm")
        rate, scale = config.dropout, config.branch_scale
        site = drop.ATTENTION_OUTPUT if name == "out_proj" else drop.FFN_OUTPUT
        whole_rows = key is None or key.columns_BM is None  # as the kernel counts columns
        if norm is not None and backend != "xla" and whole_rows:
            branch_BTD = self.linear(name, y_BTK, key, lora, "none")
            keys_B = key.rows(self.layer, site) if key is not None and rate else None
            bias = getattr(self, name).bias
            return add_residual_and_norm(
                x_BTD, branch_BTD, bias, norm, keys_B, rate, scale, backend
            )
        branch_BTD = self.linear(name, y_BTK, key, lora)
        if scale != 1:
            branch_BTD = branch_BTD.astype(jnp.float32) * scale
        x_BTD = add_residual(x_BTD, branch_BTD, rate, key, self.layer, site)
        return x_BTD, None if norm is None else norm(x_BTD)

    def __call__(
        self,
        x_BTD,
        normed_BTD,
        segment_ids_BT,
        rope,
        key: DropoutKey | None,
        lora=None,
        next_norm: LayerNorm | None = None,
        columns_BM=None,
    ):
        """The block's output, and that under `next_norm`, if there is one.

        `normed_BTD` is the input under `attention_norm`, or None: the block computes it itself.
        `columns_BM`, if given, are the columns of each row that the output [B, M, D] is needed at.
        The others are attended to, and neither attend nor pass through the FFN.
        """
        pre = self.config.norm == "pre"
        if pre and normed_BTD is None:
            normed_BTD = self.attention_norm(x_BTD)
        attended_BTD = normed_BTD if pre else x_BTD
        y_BTD = self.attention(attended_BTD, segment_ids_BT, rope, key, lora, columns_BM)
        if columns_BM is not None:
            x_BTD = remat.gather_positions(x_BTD, columns_BM)
            key = key.at_columns(columns_BM) if key is not None else None
        if pre:
            x_BTD, normed_BTD = self.add(x_BTD, "out_proj", y_BTD, key, lora, self.ffn_norm)
            return self.add(x_BTD, "fc2", self.ffn(normed_BTD, key, lora), key, lora, next_norm)
        _, x_BTD = self.add(x_BTD, "out_proj", y_BTD, key, lora, self.attention_norm)
        y_BTF = self.ffn(x_BTD, key, lora)
        return self.add(x_BTD, "fc2", y_BTF, key, lora, self.ffn_norm)[1], None


def run_block(
    block: Block,
    x_BTD,
    normed_BTD,
    segment_ids_BT,
    rope,
    key: DropoutKey | None,
    lora: LoraBlock | None = None,
    next_norm: LayerNorm | None = None,
    columns_BM=None,
):
    """As the block itself; the backward computes again what `compute.remat` does not keep, and with
    that the block normalizes its input itself, so that nothing else is kept of it.

    With `lora` the block's own parameters get no gradient.
    """
    if block.compute.remat == "none":
        return block(x_BTD, normed_BTD, segment_ids_BT, rope, key, lora, next_norm, columns_BM)
    graph, params = nnx.split(block)

    def run(differentiable, others):
        (trained, x_BTD, rope), (frozen, segment_ids_BT, key, columns_BM) = differentiable, others
        params, lora = (trained, None) if frozen is None else (frozen, trained)
        block = nnx.merge(graph, params)
        return block(x_BTD, None, segment_ids_BT, rope, key, lora, None, columns_BM)[0]

    run = remat.checkpoint_block(run, block.compute.remat)
    trained, frozen = (params, None) if lora is None else (lora, params)
    return run((trained, x_BTD, rope), (frozen, segment_ids_BT, key, columns_BM)), None
