"""The ESM-1nv encoder and its masked-LM head. The only file that names flax.

Shapes: B rows, T tokens, D width, N heads, H head size, F FFN width, V vocabulary (padded), M
predictions a row, L layers.

NNX is used in the part that its graph and tree modes share: modules are built once, taken apart
into a static graph and a plain dict of parameters, and put together again inside a pure function.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from esm1nv_jax.data.vocabulary import vocabulary
from esm1nv_jax.model import dropout as drop
from esm1nv_jax.model import esm2
from esm1nv_jax.model.attention import FUSED_ATTENTION, attention
from esm1nv_jax.model.dropout import DropoutKey, dropout
from esm1nv_jax.model.encoder_config import ACTIVATIONS, DTYPES, Compute, EncoderConfig
from esm1nv_jax.model.kernels.layer_norm import layer_norm, recomputed, rematerialised, stored, take
from esm1nv_jax.model.kernels.matmul import product

_QKV, _FFN = "qkv", "ffn"  # with fused attention, all that remat `dots` keeps of a block
INIT_STD = 0.02
NEVER = -1e30  # logit of a padding row of the vocabulary


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["logits", "hidden"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Output:
    """`logits`: fp32 [B, T, V] (or [B, M, V]); rows of V beyond the vocabulary are never predicted.
    `hidden`: the layers asked for, each fp32 [B, T, D]: 0 is the embeddings, k the output of block
    k, -1 the last after the final LayerNorm, as the head sees it."""

    logits: jax.Array
    hidden: dict[int, jax.Array]


class Dense(nnx.Module):
    def __init__(self, inputs: int, outputs: int, std: float, rngs: nnx.Rngs):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), (inputs, outputs)))
        self.bias = nnx.Param(jnp.zeros(outputs))

    def __call__(self, x, compute: Compute):
        y = product(x, self.kernel[...], compute.operands) + self.bias[...]
        return y if compute.activations == "float32" else stored(y, DTYPES[compute.activations])


class LayerNorm(nnx.Module):
    def __init__(self, width: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))
        self.epsilon = epsilon

    def __call__(self, x, compute: Compute | None = None):
        """In the dtype of activations, or fp32 where no product follows."""
        dtype = DTYPES[compute.activations] if compute else jnp.float32
        return layer_norm(x, self.scale[...], self.bias[...], self.epsilon, dtype)


class Block(nnx.Module):
    def __init__(self, config: EncoderConfig, layer: int, rngs: nnx.Rngs):
        D, F = config.width, config.ffn
        output_std = INIT_STD / (2 * config.layers) ** 0.5  # 2 L branches add up in the residual
        self.attention_norm = LayerNorm(D, config.norm_epsilon)
        self.qkv = Dense(D, 3 * D, INIT_STD, rngs)
        self.attention_output = Dense(D, D, output_std, rngs)
        self.ffn_norm = LayerNorm(D, config.norm_epsilon)
        self.ffn_input = Dense(D, F, INIT_STD, rngs)
        self.ffn_output = Dense(F, D, output_std, rngs)
        self.config, self.layer = config, layer

    def attend(self, x_BTD, segment_ids_BT, turn, compute: Compute, key: DropoutKey | None):
        B, T, D = x_BTD.shape
        N, rate = self.config.heads, self.config.attention_dropout
        qkv_BTCNH = checkpoint_name(self.qkv(x_BTD, compute).reshape(B, T, 3, N, D // N), _QKV)
        if turn is not None:
            qkv_BTCNH = esm2.rotate(qkv_BTCNH, turn)
        row_keys_B = key.rows(self.layer, drop.ATTENTION) if key is not None and rate else None
        mixed_BTNH = attention(
            qkv_BTCNH, segment_ids_BT, compute.operands, rate, row_keys_B, compute.attention
        )
        return self.attention_output(mixed_BTNH.reshape(B, T, D), compute)

    def ffn(self, x_BTD, compute: Compute):
        x_BTF = checkpoint_name(self.ffn_input(x_BTD, compute), _FFN)
        x_BTF = _activate(self.config.ffn_activation, x_BTF, compute)
        return self.ffn_output(x_BTF, compute)

    def __call__(self, x_BTD, segment_ids_BT, turn, compute: Compute, key: DropoutKey | None):
        def add(x_BTD, branch_BTD, site):
            return _add(x_BTD, branch_BTD, self.config.dropout, key, self.layer, site)

        if self.config.norm == "pre":
            normed_BTD = self.attention_norm(x_BTD, compute)
            branch_BTD = self.attend(normed_BTD, segment_ids_BT, turn, compute, key)
            x_BTD = add(x_BTD, branch_BTD, drop.ATTENTION_OUTPUT)
            branch_BTD = self.ffn(self.ffn_norm(x_BTD, compute), compute)
            return add(x_BTD, branch_BTD, drop.FFN_OUTPUT)
        branch_BTD = self.attend(x_BTD, segment_ids_BT, turn, compute, key)
        x_BTD = self.attention_norm(add(x_BTD, branch_BTD, drop.ATTENTION_OUTPUT))
        branch_BTD = self.ffn(x_BTD, compute)
        return self.ffn_norm(add(x_BTD, branch_BTD, drop.FFN_OUTPUT))


def _activate(name: str, x, compute: Compute):
    """A GELU in fp32, given in the dtype of activations."""
    activation = ACTIVATIONS[name]
    if compute.activations == "float32":
        return activation(x)
    return recomputed(lambda x: activation(x.astype(jnp.float32)).astype(x.dtype))(x)


def _add(x_BTD, branch_BTD, rate: float, key: DropoutKey | None, layer: int, site: int):
    """The residual, fp32, plus a branch under dropout."""

    def dropped(branch_BTD, key):
        return dropout(branch_BTD.astype(jnp.float32), rate, key, layer, site)

    return x_BTD + recomputed(dropped)(branch_BTD, key)


class Encoder(nnx.Module):
    """Embeddings, blocks and the LM head, whose output matrix is the token embedding."""

    def __init__(self, config: EncoderConfig, rngs: nnx.Rngs):
        D = config.width

        def normal(rows):
            return nnx.Param(INIT_STD * jax.random.normal(rngs.params(), (rows, D)))

        self.config = config
        self.tokens = vocabulary(config.vocabulary)
        self.token_embedding = normal(self.tokens.size)
        if config.position_kind == "learned":
            self.position_embedding = normal(config.positions)
        else:
            self.rotary_frequency = nnx.Param(jnp.asarray(esm2.frequencies(D // config.heads)))
        self.blocks = nnx.List([Block(config, i, rngs) for i in range(config.layers)])
        if config.embedding_norm:
            self.embedding_norm = LayerNorm(D, config.norm_epsilon)
        # One more LayerNorm than the blocks have: after them (pre), or on the embeddings (post).
        self.outer_norm = LayerNorm(D, config.norm_epsilon)
        self.head_dense = Dense(D, D, INIT_STD, rngs)
        self.head_norm = LayerNorm(D, config.norm_epsilon)
        self.head_bias = nnx.Param(jnp.zeros(self.tokens.size))

    def embed(self, tokens_BT, segment_ids_BT, positions_BT, key: DropoutKey | None):
        x_BTD = self.token_embedding[...][esm2.readable(self.config.vocabulary, tokens_BT)]
        if self.config.token_dropout:
            x_BTD = esm2.token_dropout(x_BTD, tokens_BT, segment_ids_BT)
        if self.config.position_kind == "learned":
            x_BTD = x_BTD + self.position_embedding[...][positions_BT]
        if self.config.embedding_norm:
            x_BTD = self.embedding_norm(x_BTD)
        if self.config.norm == "post":
            x_BTD = self.outer_norm(x_BTD)
        return _add(0.0, x_BTD, self.config.dropout, key, 0, drop.EMBEDDING)

    def head(self, x_BMD, compute: Compute):
        x_BMD = self.head_dense(x_BMD, compute)
        x_BMD = _activate(self.config.head_activation, x_BMD, compute)
        x_BMD = self.head_norm(x_BMD, compute)
        logits_BMV = product(x_BMD, self.token_embedding[...], compute.operands, True)
        logits_BMV = logits_BMV + self.head_bias[...]
        return jnp.where(self.tokens.predicted(), logits_BMV, NEVER)


def forward(
    config: EncoderConfig,
    params: dict,
    tokens_BT,
    segment_ids_BT,
    positions_BT,
    *,
    compute: Compute = Compute(),
    dropout_key: DropoutKey | None = None,
    index_BM=None,
    hidden_layers: tuple[int, ...] = (),
) -> Output:
    """Runs the encoder over packed rows; pure, for use inside `jax.jit`.

    Args:
      config: the architecture that `params` belongs to.
      params: a plain nested dict, as `init` makes it.
      tokens_BT: int32 token ids.
      segment_ids_BT: int32; 0 is padding, and no token sees another segment.
      positions_BT: int32, counted from 0 in each segment, below `config.positions`.
      compute: dtype and rematerialisation.
      dropout_key: no dropout where None.
      index_BM: if given, logits only at these columns of each row.
      hidden_layers: which hidden states to return, 0..layers or -1.
    """
    model = nnx.merge(_graph(config), _to_state(params))
    x_BTD = model.embed(tokens_BT, segment_ids_BT, positions_BT, dropout_key)
    turn = None
    if config.position_kind == "rotary":
        turn = esm2.rotation(positions_BT, model.rotary_frequency[...])
    hidden = {0: x_BTD}
    for i, block in enumerate(model.blocks):
        graph, state = nnx.split(block)

        def run(floats, others, graph=graph):
            (state, x_BTD, turn), (segment_ids_BT, key) = floats, others
            return nnx.merge(graph, state)(x_BTD, segment_ids_BT, turn, compute, key)

        if compute.remat != "none":
            kept = (_QKV, _FFN, FUSED_ATTENTION) if compute.remat == "dots" else ()
            run = rematerialised(run, kept)
        x_BTD = run((state, x_BTD, turn), (segment_ids_BT, dropout_key))
        hidden[i + 1] = x_BTD
    last = model.outer_norm if config.norm == "pre" else lambda x: x
    hidden[-1] = last(x_BTD)
    x_BMD = hidden[-1]
    if index_BM is not None:  # the LayerNorm, too, at these columns only
        x_BMD = last(take(x_BTD, index_BM))
    return Output(model.head(x_BMD, compute), {layer: hidden[layer] for layer in hidden_layers})


def init(config: EncoderConfig, seed) -> dict:
    """Fresh parameters: N(0, 0.02), the two output products of a block scaled by 1/sqrt(2 L)."""
    state = nnx.state(Encoder(config, nnx.Rngs(params=jax.random.key(seed))), nnx.Param)
    return _from_state(state)


def abstract(config: EncoderConfig) -> dict:
    """The shapes and dtypes of the parameters, without allocating them."""
    return jax.eval_shape(lambda: init(config, 0))


def parameter_count(config: EncoderConfig) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(abstract(config)))


@functools.cache
def _graph(config: EncoderConfig):
    return nnx.split(nnx.eval_shape(lambda: Encoder(config, nnx.Rngs(params=0))))[0]


def _from_state(state) -> dict:
    """NNX state as nested dicts with string keys, as checkpoints and other tools know them."""

    def plain(node):
        return {str(k): plain(v) for k, v in node.items()} if isinstance(node, dict) else node

    return plain(nnx.to_pure_dict(state))


def _to_state(params: dict):
    def stated(node):
        if isinstance(node, dict):
            return {int(k) if k.isdigit() else k: stated(v) for k, v in node.items()}
        return nnx.Param(node)

    return nnx.State(stated(params))
