"""One batch through the encoder, as the programs that are compiled for it.

On a CPU a block is a program of its own, so that it is compiled once for a shape of rows and not
once for each layer.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference.block_graph import RunBlocks
from esm1nv_jax.model import contact_head, encoder, heads
from esm1nv_jax.model.encoder import ComputeConfig, EncoderConfig
from esm1nv_jax.model.heads import HeadConfig

KINDS = ("mean", "per_residue", "cls", "logits")


@dataclasses.dataclass(frozen=True)
class OutputSpec:
    """What to give back: some of KINDS, for these layers, or what a head reads of layer -1; `dtype`
    is what leaves the device. Or "attention" or "contacts", of rows of one sequence each."""

    kinds: tuple[str, ...] = ("mean", "per_residue")
    layers: tuple[int, ...] = (-1,)
    dtype: str = "float32"  # of per_residue, cls and logits; means are taken in fp32 first
    head: HeadConfig | None = None

    def names(self) -> list[str]:
        """Names of the arrays, such as `mean_-1`; `logits` belong to no layer."""
        layered = [k for k in KINDS if k in self.kinds and k != "logits"]
        names = [f"{kind}_{layer}" for kind in layered for layer in self.layers]
        return names + ["logits"] * ("logits" in self.kinds)


def forward(
    params,
    batch,
    config: EncoderConfig,
    compute: ComputeConfig,
    outputs: OutputSpec,
    run_blocks: RunBlocks | None = None,
):
    """One batch through the encoder, by three programs: embeddings, a block, and what is returned.
    `forward_at_once` is the same as one program.

    Args:
      batch: int32 `tokens_BT`, `segment_ids_BT` and `positions_BT`; for log-probabilities
        `prediction_positions_BM`; for embeddings `slot_BT` (which of the S sequences of its row
        owns a residue, else -1) and `starts_BS` (columns of their `<s>`).
      outputs: what else is wanted.
      run_blocks: computes the blocks; it has no attention weights.

    Returns `log_probs` fp32 [B, M, vocabulary] at `prediction_positions_BM` where it is given; sums
    over residues under `mean_*` fp32 [B, S, D], `cls_*` [B, S, D], `per_residue_*` [B, T, D],
    `logits` [B, T, V]; `attention` fp32 [B, L, N, T, S], `contacts` fp32 [B, T, S]; of a head
    on residues `head` fp32 [B, T, K], of one on proteins `pool` fp32 [B, S, D + 2]: a `heads.Pool`,
    its three arrays side by side.
    """
    ends = {name: value for name, value in params.items() if name != "blocks"}
    segment_ids_BT, positions_BT = batch["segment_ids_BT"], batch["positions_BT"]
    x_BTD, rope = _embed(ends, batch["tokens_BT"], segment_ids_BT, positions_BT, config, compute)
    with_attention = bool({"attention", "contacts"} & {*outputs.kinds})
    hidden, attention = {0: x_BTD} if 0 in outputs.layers else {}, []
    if run_blocks is not None:
        if with_attention:
            raise UserError("attention weights: int8 has none; take --precision fp32 or bf16")
        x_BTD, blocks_hidden = run_blocks(x_BTD, segment_ids_BT, rope, outputs.layers)
        hidden |= blocks_hidden
        return _results(ends, batch, x_BTD, hidden, (), config, compute, outputs)
    for i in range(config.layers):
        block = params["blocks"][str(i)]
        x_BTD, weights = _block(block, x_BTD, segment_ids_BT, rope, config, compute, with_attention)
        if with_attention:
            attention.append(weights)
        if i + 1 in outputs.layers:
            hidden[i + 1] = x_BTD
    return _results(ends, batch, x_BTD, hidden, tuple(attention), config, compute, outputs)


forward_at_once = jax.jit(forward, static_argnames=("config", "compute", "outputs"))


def _bind_ends(params, config: EncoderConfig, compute: ComputeConfig) -> encoder.Encoder:
    """The encoder without its blocks and without heads of other tasks."""
    own = {name: value for name, value in params.items() if name not in ("head", contact_head.NAME)}
    return encoder.bind(config, own, compute)


@functools.partial(jax.jit, static_argnames=("config", "compute"))
def _embed(params, tokens_BT, segment_ids_BT, positions_BT, config, compute):
    model = _bind_ends(params, config, compute)
    return model.embed(tokens_BT, segment_ids_BT, positions_BT, None), model.rope(positions_BT)


@functools.partial(jax.jit, static_argnames=("config", "compute", "with_attention"))
def _block(params, x_BTD, segment_ids_BT, rope, config, compute, with_attention):
    block = encoder.bind_block(config, params, compute)
    weights = None
    if with_attention:
        weights = block.attention_weights(x_BTD, segment_ids_BT, rope, None)
    return block(x_BTD, None, segment_ids_BT, rope, None)[0], weights


@functools.partial(jax.jit, static_argnames=("config", "compute", "outputs"))
def _results(params, batch, x_BTD, hidden, attention, config, compute, outputs):
    output = _bind_ends(params, config, compute).output(
        x_BTD, hidden, attention, batch.get("prediction_positions_BM"), outputs.layers
    )
    results = {}
    if "attention" in outputs.kinds:
        results["attention"] = jnp.stack(output.attention, axis=1)
    if "contacts" in outputs.kinds:
        tokens_BT = batch["tokens_BT"]
        is_residue_BT = (tokens_BT != tokenizer.BOS) & (tokens_BT != tokenizer.EOS)
        is_residue_BT &= batch["segment_ids_BT"] > 0
        params = params[contact_head.NAME]
        results["contacts"] = contact_head.predict(params, output.attention, is_residue_BT)
    if "prediction_positions_BM" in batch:
        log_probs_BMV = jax.nn.log_softmax(output.logits)
        results["log_probs"] = log_probs_BMV[..., : tokenizer.VOCABULARY]
    for layer, x_BTD in output.hidden.items():
        if "mean" in outputs.kinds:
            slots = jnp.arange(batch["starts_BS"].shape[1])
            owned_BST = (batch["slot_BT"][:, None] == slots[:, None]).astype(jnp.float32)
            results[f"mean_{layer}"] = jnp.einsum(
                "BST,BTD->BSD", owned_BST, x_BTD, precision=jax.lax.Precision.HIGHEST
            )
        if "cls" in outputs.kinds:
            results[f"cls_{layer}"] = jnp.take_along_axis(
                x_BTD, batch["starts_BS"][..., None], axis=1
            ).astype(outputs.dtype)
        if "per_residue" in outputs.kinds:
            results[f"per_residue_{layer}"] = x_BTD.astype(outputs.dtype)
    if "logits" in outputs.kinds:
        results["logits"] = output.logits[..., : tokenizer.VOCABULARY].astype(outputs.dtype)
    if (head := outputs.head) is not None and head.level == "residue":
        results["head"] = heads.project(params["head"], output.hidden[-1])
    elif head is not None:
        slot_BT = batch["slot_BT"]
        if head.pooling == "cls":
            slot_BT = heads.pooled_slots(head, batch["segment_ids_BT"], batch["positions_BT"])
        slots = batch["starts_BS"].shape[1]
        pool = heads.pool(head, params["head"], output.hidden[-1], slot_BT, slots)
        weights = [pool.weight_BS[..., None], pool.log_scale_BS[..., None]]
        results["pool"] = jnp.concatenate([pool.sum_BSD, *weights], axis=-1)
    return results
