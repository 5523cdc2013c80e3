"""The ESM-1nv encoder with its masked-LM head.

A Transformer encoder on packed rows. Tokens and learned positions are embedded; each block adds
self-attention and a feed-forward network to a residual stream, which is fp32 or, by the compute
config, bf16; the LM head shares its output matrix with the token embedding. LayerNorm stands before
each branch (`norm='pre'`, and once more at the end) or after each sum (`'post'`, and once more on
the embeddings). Other fields of the config make of it an ESM-1, an ESM-1b, an ESM-2 or an ESMC.

The names of arrays end in their axes:
  B rows                T tokens of a row         S keys, where T are queries
  D model width         F FFN width               V vocabulary, a multiple of 128
  N heads               H head size               C query, key and value: 3
  M predictions a row   1 an axis of length 1     L layers

Only this file, `block` and `layers` use NNX, in the part that its graph and tree modes share.
Modules are built once, split into a static graph and a plain dict of parameters, and merged again
inside a pure function.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from esm1nv_jax.data.tokenizer import MASK, vocabulary
from esm1nv_jax.model import dropout as drop
from esm1nv_jax.model import esm2, soft_tokens
from esm1nv_jax.model.block import Block, run_block
from esm1nv_jax.model.dropout import DropoutKey
from esm1nv_jax.model.encoder_config import DTYPES, ComputeConfig, EncoderConfig
from esm1nv_jax.model.kernels import remat
from esm1nv_jax.model.kernels.matmul import matmul
from esm1nv_jax.model.layers import LayerNorm, Linear, activate, add_residual
from esm1nv_jax.model.lora import LoraBlock, LoraConfig

INIT_STD = 0.02
PADDING_LOGIT = -1e30  # of rows of the vocabulary that hold no token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class EncoderOutput:
    """`logits`: fp32 [B, T, V] (or [B, M, V]); rows of V beyond the vocabulary are never predicted.
    `hidden`: the layers asked for, each fp32 [B, T, D]: 0 is the embeddings, k the output of block
    k, -1 the last after the final LayerNorm, which is what the LM head reads.
    `attention`: where asked for, the weights of each block, fp32 [B, N, T, S]."""

    logits: jax.Array
    hidden: dict[int, jax.Array]
    attention: tuple[jax.Array, ...] = ()


class LMHead(nnx.Module):
    """A linear layer, GELU and LayerNorm, unless the head is bare; then logits by the matrix of the
    token embedding, or by one of its own."""

    def __init__(self, config: EncoderConfig, compute: ComputeConfig, rngs: nnx.Rngs):
        if not config.bare_head:
            self.dense = Linear(config.width, config.width, compute, rngs)
            self.layer_norm = LayerNorm(config, compute.activation_dtype, rngs)
        if not config.tied_head:
            self.decoder = nnx.Embed(vocabulary(config.vocabulary).size, config.width, rngs=rngs)
        self.bias = nnx.Param(jnp.zeros(vocabulary(config.vocabulary).size))
        self.config, self.compute = config, compute

    def __call__(self, x_BMD, embedding_VD):
        if not self.config.tied_head:
            embedding_VD = self.decoder.embedding[...]
        if not self.config.bare_head:
            x_BMD = self.layer_norm(activate(self.config.head_activation, self.dense(x_BMD)))
        logits_BMV = matmul(x_BMD, embedding_VD, self.compute.operand_dtype, True)
        is_token_V = vocabulary(self.config.vocabulary).predicted()
        return jnp.where(is_token_V, logits_BMV + self.bias[...], PADDING_LOGIT)


class Encoder(nnx.Module):
    """Embeddings, blocks (`layers` of them) and the LM head."""

    def __init__(self, config: EncoderConfig, compute: ComputeConfig, layers: int, rngs: nnx.Rngs):
        D = config.width
        self.token_embedding = nnx.Embed(vocabulary(config.vocabulary).size, D, rngs=rngs)
        if config.position_kind == "learned":
            self.position_embedding = nnx.Embed(config.positions, D, rngs=rngs)
        else:
            self.rotary_frequency = nnx.Param(jnp.zeros(D // config.heads // 2))
        if config.embedding_norm or config.norm == "post":
            self.embedding_norm = LayerNorm(config, "float32", rngs)
        self.blocks = nnx.List([Block(config, compute, i, rngs) for i in range(layers)])
        if config.final_norm:
            self.final_norm = LayerNorm(config, "float32", rngs, config.bias)
        self.lm_head = LMHead(config, compute, rngs)
        self.config, self.compute = config, compute

    def embed(self, tokens_BT, segment_ids_BT, positions_BT, key: DropoutKey | None):
        config = self.config
        if tokens_BT.ndim == 2:
            x_BTD = self.token_embedding(esm2.map_missing_to_unk(config.vocabulary, tokens_BT))
            mask_BT = tokens_BT == MASK
        else:
            table_VD = self.token_embedding.embedding[...]
            x_BTD, mask_BT = soft_tokens.embed(
                config.vocabulary, table_VD, tokens_BT, config.token_dropout
            )
        if config.token_dropout:
            x_BTD = esm2.token_dropout(x_BTD, mask_BT, segment_ids_BT)
        if config.position_kind == "learned":
            x_BTD = x_BTD + self.position_embedding(positions_BT)
        if config.embedding_norm or config.norm == "post":
            x_BTD = self.embedding_norm(x_BTD)
        nothing = jnp.zeros((), DTYPES[self.compute.residual_dtype])
        return add_residual(nothing, x_BTD, config.dropout, key, 0, drop.EMBEDDING)

    def rope(self, positions_BT):
        """Cosines and sines of rotary positions; None where positions are learned."""
        if self.config.position_kind == "learned":
            return None
        return esm2.rope_cos_sin(positions_BT, self.rotary_frequency[...])

    def output(self, x_BTD, hidden, weights, predictions_BM, layers) -> EncoderOutput:
        """What `forward` returns, of the output of the last block and the states `hidden`."""
        final_norm = self.final_norm if self.config.final_norm else lambda x_BTD: x_BTD
        x_BMD = final_norm(x_BTD)
        hidden = hidden | {-1: x_BMD}
        if predictions_BM is not None:  # the LayerNorm, too, at these positions only
            x_BMD = final_norm(remat.gather_positions(x_BTD, predictions_BM))
        logits = self.lm_head(x_BMD, self.token_embedding.embedding[...])
        hidden = {layer: hidden[layer].astype(jnp.float32) for layer in layers}
        return EncoderOutput(logits, hidden, weights)


def forward(
    config: EncoderConfig,
    params: dict,
    tokens_BT,
    segment_ids_BT,
    positions_BT,
    *,
    compute: ComputeConfig = ComputeConfig(),
    dropout_key: DropoutKey | None = None,
    prediction_positions_BM=None,
    hidden_layers: tuple[int, ...] = (),
    lora: tuple[LoraConfig, dict] | None = None,
    return_attention: bool = False,
) -> EncoderOutput:
    """Runs the encoder over packed rows; pure, for use inside `jax.jit`.

    Args:
      config: the architecture that `params` belongs to.
      params: a plain nested dict, as `init` returns it.
      tokens_BT: int32 token ids; or fp32 [B, T, V'], a probability for each of
        `tokenizer.TOKENS`. One-hot vectors give what the ids give.
      segment_ids_BT: int32; 0 is padding, and no token attends to another segment.
      positions_BT: int32, counted from 0 in each segment, below `config.positions`.
      compute: dtypes, rematerialisation and attention backend.
      dropout_key: no dropout where None.
      prediction_positions_BM: int32; if given, logits only at these columns of each row.
      hidden_layers: which hidden states to return, 0..layers or -1.
      lora: a config of LoRA and its parameters, not merged into `params`.
      return_attention: also return the attention weights, with T x T numbers a head.
    """
    model = bind(config, params, compute)
    rope = model.rope(positions_BT)
    x_BTD = model.embed(tokens_BT, segment_ids_BT, positions_BT, dropout_key)
    hidden, weights, normed_BTD = {0: x_BTD}, [], None
    # In one kernel with a block's last sum: the norm that the next block begins with.
    fused = compute.backend("residual_norm") != "xla" and config.norm == "pre"
    for i, block in enumerate(model.blocks):
        last = i + 1 == len(model.blocks)
        next_norm = model.blocks[i + 1].attention_norm if fused and not last else None
        # Of the last block nothing but the predictions is read, unless its output is asked for.
        columns_BM = prediction_positions_BM if last and not hidden_layers else None
        block_lora = LoraBlock(lora[1][str(i)], lora[0]) if lora is not None else None
        if return_attention:
            weights.append(block.attention_weights(x_BTD, segment_ids_BT, rope, block_lora))
        x_BTD, normed_BTD = run_block(
            block,
            x_BTD,
            normed_BTD,
            segment_ids_BT,
            rope,
            dropout_key,
            block_lora,
            next_norm,
            columns_BM,
        )
        hidden[i + 1] = x_BTD
    if not hidden_layers:
        prediction_positions_BM = None  # the only ones that x has
    return model.output(x_BTD, hidden, tuple(weights), prediction_positions_BM, hidden_layers)


def bind(config: EncoderConfig, params: dict, compute: ComputeConfig) -> Encoder:
    """The encoder with these parameters, for calls of its parts inside `jax.jit`; it has no blocks
    where `params` has none."""
    graph, _ = _split(config, compute, len(params.get("blocks", ())))
    return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, nnx.restore_int_paths(params))))


def bind_block(config: EncoderConfig, params: dict, compute: ComputeConfig) -> Block:
    """A block with these parameters. Without dropout all blocks are the same function of them."""
    graph, _ = _split_block(config, compute)
    return nnx.merge(graph, nnx.State(jax.tree.map(nnx.Param, params)))


def init(config: EncoderConfig, seed) -> dict:
    """Fresh parameters: embeddings and kernels from N(0, 0.02), the last kernel of each residual
    branch narrower by sqrt(2 L), for 2 L branches add up; scales 1, biases 0.

    Layer n of those below draws from key n of the seed.
    """
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.full(leaf.shape, path[-1].key == "scale", leaf.dtype),
        abstract(config),
    )
    branch_std = INIT_STD / (2 * config.layers) ** 0.5
    layers = [(params["token_embedding"], INIT_STD)]
    if config.position_kind == "learned":
        layers.append((params["position_embedding"], INIT_STD))
    else:
        params["rotary_frequency"] = jnp.asarray(esm2.rope_frequencies(config.head_size))
    for block in (params["blocks"][str(i)] for i in range(config.layers)):
        layers += [(block["qkv"], INIT_STD), (block["out_proj"], branch_std)]
        layers += [(block["fc1"], INIT_STD), (block["fc2"], branch_std)]
    if not config.bare_head:
        layers.append((params["lm_head"]["dense"], INIT_STD))
    if not config.tied_head:
        layers.append((params["lm_head"]["decoder"], INIT_STD))
    for n, (layer, std) in enumerate(layers):
        name = "kernel" if "kernel" in layer else "embedding"
        key = jax.random.fold_in(jax.random.key(seed), n)
        layer[name] = std * jax.random.normal(key, layer[name].shape)
    return params


def abstract(config: EncoderConfig) -> dict:
    """Shapes and dtypes of the parameters, without allocating them."""

    def to_dict(node):  # string keys for the blocks, too, as checkpoints and other tools have them
        return {str(k): to_dict(v) for k, v in node.items()} if isinstance(node, dict) else node

    return to_dict(nnx.to_pure_dict(_split(config, ComputeConfig(), config.layers)[1]))


def parameter_count(config: EncoderConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))


@functools.cache
def _split(config: EncoderConfig, compute: ComputeConfig, layers: int):
    """(graph, abstract parameters): what the layers would draw themselves is never computed."""
    return nnx.split(nnx.eval_shape(lambda: Encoder(config, compute, layers, nnx.Rngs(0))))


@functools.cache
def _split_block(config: EncoderConfig, compute: ComputeConfig):
    return nnx.split(nnx.eval_shape(lambda: Block(config, compute, 0, nnx.Rngs(0))))
