"""A trained model in Python: sequences in, NumPy arrays out; no knowledge of JAX needed.

    from esm1nv_jax import load
    model = load("runs/first")
    e = model.embed(["MKTVRQ", "MA"])
    e.per_residue[0].shape, e.mean.shape  # (6, 768), (2, 768)

A model is immutable and safe to use from several threads.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.checkpoints.model_folder import NO_LM_HEAD
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import SPECIALS
from esm1nv_jax.inference import contact_maps
from esm1nv_jax.inference.device_model import DeviceModel, place
from esm1nv_jax.inference.engine import OutputSpec, embed_sequences
from esm1nv_jax.inference.mutants import parse_mutants
from esm1nv_jax.inference.pseudo_likelihood import (
    copy_log_odds,
    one_pass_log_likelihood,
    pseudo_log_likelihood,
)
from esm1nv_jax.inference.results import Embeddings, HeadPredictions, Prediction
from esm1nv_jax.inference.sequence_input import as_list, residue_ids, residue_letters
from esm1nv_jax.inference.variant_scores import MODES, score_mutants
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import contact_head, encoder, soft_tokens
from esm1nv_jax.model.encoder import ComputeConfig, EncoderConfig, EncoderOutput
from esm1nv_jax.model.heads import HeadConfig, to_predictions
from esm1nv_jax.model.masking import MaskingConfig, recipe

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
# Attention scores [heads, T, T] of the longest row, in fp32: some three times this is in use.
SCORES_BYTES = 1 << 30


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters, architecture and where they came from. Made by `load`."""

    config: EncoderConfig
    params: dict  # jax arrays of the encoder; for `apply`
    provenance: dict[str, Any]
    precision: str = "fp32"
    max_residues: int | None = None  # read at once, instead of what `longest` would choose
    head: HeadConfig | None = None  # of a fine-tuned model
    head_params: dict | None = None
    contact_head_params: dict | None = None

    @property
    def longest(self) -> int:
        """Residues read at once: as many as the positions hold, training has used, and attention
        scores of a gigabyte allow."""
        room = self.config.positions - SPECIALS
        if self.max_residues is not None:
            return min(room, self.max_residues)
        affordable = math.isqrt(SCORES_BYTES // (4 * self.config.heads)) - SPECIALS
        return min(room, self._data.get("max_residues") or room, affordable)

    @property
    def prefixes_only(self) -> bool:
        """Whether training is known to have seen nothing but the beginnings of long proteins."""
        return self._data.get("crop") == "prefix"

    @property
    def _data(self) -> dict:
        """How sequences were cropped in training, where it is known."""
        return (self.provenance.get("config") or {}).get("data") or {}

    @functools.cached_property
    def digest(self) -> str:
        """A hash of the names and values of the encoder's parameters."""
        return _digest(self.params)

    @functools.cached_property
    def head_digest(self) -> str:
        return _digest(self.head_params or {})

    @property
    def compute(self) -> ComputeConfig:
        return ComputeConfig(dtype=PRECISIONS[self.precision])

    @functools.cached_property
    def on_devices(self) -> DeviceModel:
        """The model on all devices of this host; on a CPU, on the first one."""
        devices = jax.local_devices()
        return self.to_devices(devices[:1] if devices[0].platform == "cpu" else devices)

    def to_devices(self, devices: Sequence[jax.Device]) -> DeviceModel:
        """The model on these devices, over which the rows of a batch are spread."""
        heads = {"head": self.head_params, contact_head.NAME: self.contact_head_params}
        heads = {name: params for name, params in heads.items() if params is not None}
        longest = self.longest + SPECIALS
        return place(self.config, self.compute, self.params, heads, longest, devices)

    def embed(
        self, sequences: Iterable[str | bytes], layer: int = -1, deterministic: bool = False
    ) -> Embeddings:
        """Embeds proteins; those longer than `longest` residues in overlapping windows.

        Args:
          sequences: residue letters, read as from FASTA: lower case is raised, white space, gaps
            and final stops are removed. `<mask>` may stand in them. `Bio.Seq` and `SeqRecord` will
            do. One token a residue.
          layer: 0 the embeddings, k the output of block k, -1 the last after the final LayerNorm.
          deterministic: the same bits whatever else is embedded; slower.

        Raises UserError, a ValueError, for an unknown layer or for what is no sequence.
        """
        check_layers((layer,), self.config)
        ids = [residue_ids(s, f"sequence {i}") for i, s in enumerate(as_list(sequences))]
        if not ids:
            none = np.zeros((0, self.config.width), np.float32)
            return Embeddings([], none, none)
        outputs = OutputSpec(("mean", "per_residue", "cls"), (layer,))
        results = embed_sequences(self.on_devices, ids, outputs, self.longest, deterministic)
        return Embeddings(
            _split_by_sequence(results[f"per_residue_{layer}"], ids),
            results[f"mean_{layer}"],
            results[f"cls_{layer}"],
        )

    def logits(self, sequences: Iterable[str | bytes]) -> list[np.ndarray]:
        """Scores of every token at every residue: float32 [residues, vocabulary] for each sequence.

        Columns are `esm1nv_jax.data.tokenizer.TOKENS`; `<mask>` may stand in a sequence.
        """
        self.require_lm_head()
        ids = [residue_ids(s, f"sequence {i}") for i, s in enumerate(as_list(sequences))]
        if not ids:
            return []
        results = embed_sequences(self.on_devices, ids, OutputSpec(("logits",), ()), self.longest)
        return _split_by_sequence(results["logits"], ids)

    def attention(self, sequence: str | bytes) -> np.ndarray:
        """Attention weights: float32 [layers, heads, residues + 2, residues + 2].

        Row i holds the weights of query i, which add up to 1; `<s>` comes first and `</s>` last.

        Raises UserError for a sequence that is too long to be read at once.
        """
        return contact_maps.attention_maps(self.on_devices, self.read_whole(sequence))

    def contacts(
        self,
        sequence: str | bytes,
        method: str = contact_maps.METHODS[0],
        on_progress: Callable[[int], None] = lambda passes: None,
    ) -> np.ndarray:
        """Scores of contact between residues, higher is likelier: float32 [residues, residues].

        Args:
          sequence: one protein, short enough to be read at once.
          method: "jacobian" (the categorical Jacobian: 20 passes for each residue), or "attention"
            (probabilities by the contact head, in one pass).
          on_progress: called with how many passes are done.

        Raises UserError where the model has no contact head, or no LM head for a Jacobian.
        """
        if method != "attention":
            self.require_lm_head()
        ids = self.read_whole(sequence)
        return contact_maps.predict_contacts(self.on_devices, ids, method, on_progress)

    def read_whole(self, sequence: str | bytes, name: str = "the sequence") -> np.ndarray:
        """Token ids of the residues. Raises UserError where they are more than `longest`."""
        ids = residue_ids(sequence, name)
        if len(ids) > self.longest:
            raise UserError(
                f"{name} has {len(ids):,} residues, and the model reads {self.longest:,} at once; "
                "cut it into domains"
            )
        return ids

    def predict(
        self, sequences: Iterable[str | bytes], deterministic: bool = False
    ) -> HeadPredictions:
        """What the head of a fine-tuned model predicts, of every residue or of every protein.

        Proteins longer than `longest` residues are read in overlapping windows: a residue is taken
        from the window in which it is farthest from a cut, and a protein is predicted from a pool
        over the residues of all windows (of `cls`, from `<s>` of the first one).

        Raises UserError where the model has no head.
        """
        head = self.require_head()
        ids = [residue_ids(s, f"sequence {i}") for i, s in enumerate(as_list(sequences))]
        if not ids:
            return HeadPredictions(head, [])
        outputs = OutputSpec((), head=head)
        results = embed_sequences(self.on_devices, ids, outputs, self.longest, deterministic)
        values = to_predictions(head, results["head"])
        by_residue = head.level == "residue"
        return HeadPredictions(head, _split_by_sequence(values, ids) if by_residue else [*values])

    def require_head(self) -> HeadConfig:
        """The head's config. Raises UserError where the model has none."""
        if self.head is None:
            raise UserError(
                "this model predicts no labels, for it was not fine-tuned on any; make one that "
                "does: esm1nv finetune --checkpoint MODEL --csv FILE --task TASK --out RUN"
            )
        return self.head

    def require_lm_head(self) -> None:
        """Raises UserError where the model came without a masked-LM head."""
        if self.provenance.items() >= NO_LM_HEAD.items():
            raise UserError(
                "this model came without a masked-LM head and predicts no residues; take the model "
                "that it was fine-tuned from"
            )

    def fill_mask(self, sequence: str, top: int = 5) -> list[Prediction]:
        """The `top` likeliest of the 20 standard residues at each `<mask>` of a sequence.

        Probabilities are among the 20.
        """
        at = np.flatnonzero(residue_ids(sequence, "the sequence") == tokenizer.MASK)
        if not at.size:
            raise UserError("the sequence holds no <mask>; write one, as in MK<mask>V")
        first = tokenizer.FIRST_RESIDUE
        letters = tokenizer.TOKENS[first : first + tokenizer.STANDARD]
        scores = self.logits([sequence])[0][at, first : first + tokenizer.STANDARD]
        odds = np.exp(scores - scores.max(axis=1, keepdims=True))
        predictions = []
        for position, p in zip(at, odds / odds.sum(axis=1, keepdims=True), strict=True):
            best = np.argsort(-p, kind="stable")[:top]
            predictions.append(
                Prediction(int(position) + 1, [(letters[i], float(p[i])) for i in best])
            )
        return predictions

    @property
    def sees_wrong_residues_only(self) -> bool:
        """Whether in training a visible residue at a predicted position was always a wrong one, so
        that predictions at visible positions mean nothing."""
        trained = self.masking
        if trained is None:
            return False
        return trained.mask + trained.random >= 1 and not trained.may_repeat

    @property
    def masking(self) -> MaskingConfig | None:
        """How training corrupted its input, where it is known."""
        masking = (self.provenance.get("config") or {}).get("masking") or {}
        return recipe(masking["recipe"]) if "recipe" in masking else None

    def score_sequences(self, sequences: Iterable[str | bytes], exact: bool = True) -> np.ndarray:
        """Sums over residues of log p(residue | the others), in nats: float64 [sequences].

        Args:
          sequences: of any lengths, so that insertions and deletions can be compared.
          exact: one forward pass for each residue, with only that one masked; otherwise one for
            each sequence with nothing masked, from which the residue's own visibility is removed.
        """
        self.check_mode("pseudo-perplexity" if exact else "one-pass")
        letters = [residue_letters(s, f"sequence {i}") for i, s in enumerate(as_list(sequences))]
        if exact:
            return pseudo_log_likelihood(self.on_devices, letters, self.longest)[1]
        copied = copy_log_odds(self.masking)
        return one_pass_log_likelihood(self.on_devices, letters, self.longest, copied)[1]

    def check_mode(self, mode: str, force: bool = False) -> None:
        """Raises UserError where a mode of scoring means nothing for this model."""
        self.require_lm_head()
        instead = {"wt-marginals": "masked-marginals", "one-pass": "pseudo-perplexity"}
        if mode in instead and self.sees_wrong_residues_only and not force:
            raise UserError(
                f"{mode}: this model was trained without unchanged targets, so what it predicts at "
                f"visible residues means nothing; take {instead[mode]} (or force it)"
            )

    def score_variants(
        self,
        sequence: str,
        mutants: Sequence[str],
        mode: str = MODES[0],
        additive: bool = False,
        offset: int = 0,
        force: bool = False,
        on_progress: Callable[[float], None] = lambda done: None,
    ) -> np.ndarray:
        """How much likelier than the wild type each mutant is: float64 [mutants], higher is fitter.

        Args:
          sequence: the wild type.
          mutants: such as "A4G" or "A4G:L10P"; the first residue has number 1 + `offset`.
          mode: "masked-marginals" (log p(mutant) - log p(wild type) with all mutated sites masked),
            "wt-marginals" (nothing masked) or "pseudo-perplexity" (PLL(mutant) - PLL(wild type)).
          additive: mask the sites of a mutant one at a time, and add up.
          force: allow wt-marginals for a model whose visible positions mean nothing.
          on_progress: called with how many mutants are done.

        Raises UserError for what is no substitution of the sequence, and for sites too far apart
        for one window of a long protein.
        """
        self.check_mode(mode, force)
        wild_type = residue_letters(sequence, "the sequence").decode()
        parsed = parse_mutants(as_list(mutants), wild_type, offset)
        return score_mutants(
            self.on_devices, wild_type, parsed, self.longest, mode, additive, on_progress
        )

    def apply(
        self,
        params: dict,
        tokens_BT,
        segment_ids_BT=None,
        positions_BT=None,
        layers=(),
        return_attention: bool = False,
    ) -> EncoderOutput:
        """The pure function itself, for use under `jax.jit`, `jax.grad` and the like.

        Args:
          params: as `model.params`.
          tokens_BT: int32 ids with `<s>` and `</s>`; see `esm1nv_jax.data.tokenizer.encode`. Or
            fp32 [B, T, V], a probability for each of `tokenizer.TOKENS`, of which gradients can be
            taken; see `esm1nv_jax.model.soft_tokens.from_residues`.
          segment_ids_BT: which sequence of its row a token belongs to, 0 for padding; one sequence
            a row where None.
          positions_BT: from 0 in each segment; counted along the row where None.
          layers: hidden states to return.
          return_attention: also return the attention weights of every block.
        """
        tokens_BT = jnp.asarray(tokens_BT)
        soft_tokens.check(tokens_BT)
        tokens_BT = tokens_BT.astype(jnp.int32 if tokens_BT.ndim == 2 else jnp.float32)
        if segment_ids_BT is None:
            segment_ids_BT = soft_tokens.is_real(tokens_BT).astype(jnp.int32)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape[:2])
        return encoder.forward(
            self.config,
            params,
            tokens_BT,
            segment_ids_BT,
            positions_BT,
            compute=self.compute,
            hidden_layers=tuple(layers),
            return_attention=return_attention,
        )

    def pseudo_log_likelihood(self, params: dict, probabilities_TV) -> jax.Array:
        """The pseudo-log-likelihood, in nats, of a sequence of probabilities over tokens.

        Differentiable and pure, as `apply`. fp32 [T, V] with `<s>` and `</s>` at the ends; see
        `esm1nv_jax.model.soft_tokens`.
        """
        self.require_lm_head()
        soft_tokens.check(probabilities_TV[None])
        return soft_tokens.pseudo_log_likelihood(
            lambda tokens_BTV: self.apply(params, tokens_BTV).logits,
            probabilities_TV,
            self.config.vocabulary,
        )


def load(path: str, precision: str = "fp32", max_residues: int | None = None) -> Model:
    """Loads a model from a run's folder, one of its steps, a model folder or an exported folder.

    Args:
      path: where it lies.
      precision: of matrix products, "fp32" or "bf16".
      max_residues: read at once; by default what training has used.

    Raises UserError where there is no model.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown; there are {', '.join(PRECISIONS)}")
    weights = load_weights(path)
    room = weights.model.positions - SPECIALS
    if max_residues is not None and not 1 <= max_residues <= room:
        raise UserError(
            f"max_residues={max_residues}: this model has {weights.model.positions} positions; "
            f"give 1 to {room}"
        )
    params = jax.device_put(weights.encoder_params)
    head_params = jax.device_put(weights.params.get("head"))
    return Model(
        weights.model,
        params,
        weights.provenance,
        precision,
        max_residues,
        weights.head,
        head_params,
        jax.device_put(weights.contact_head),
    )


def check_layers(layers: Sequence[int], config: EncoderConfig) -> None:
    for layer in layers:
        if not -1 <= layer <= config.layers:
            raise UserError(
                f"layer {layer} is unknown; there are 0 (embeddings) to {config.layers} (the last "
                "block) and -1 (after the final LayerNorm)"
            )


def _digest(params: dict) -> str:
    total = hashlib.blake2b(digest_size=16)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total.update(jax.tree_util.keystr(path).encode())
        total.update(np.ascontiguousarray(leaf).data)
    return total.hexdigest()


def _split_by_sequence(flat: np.ndarray, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([len(i) for i in ids])[:-1])
