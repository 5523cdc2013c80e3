"""A trained model in Python: sequences in, NumPy arrays out; no knowledge of JAX needed.

    from esm1nv_jax import load
    model = load("runs/first")
    e = model.embed(["MKTVRQ", "MA"])
    e.per_residue[0].shape, e.mean.shape  # (6, 768), (2, 768)

A model is immutable and safe to use from several threads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.common.console import console
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.packing import SPECIALS
from esm1nv_jax.inference import contact_maps, likelihood
from esm1nv_jax.inference.api_types import (
    Embeddings,
    HeadPredictions,
    Prediction,
    as_list,
    residue_ids,
    residue_letters,
    sequence_ids,
)
from esm1nv_jax.inference.cpu_engines import NAMES, check_names, select_engine
from esm1nv_jax.inference.engine import OutputSpec, embed_sequences
from esm1nv_jax.inference.likelihood import EXACT, MASKED, ONE_PASS
from esm1nv_jax.inference.loaded_model import LoadedModel
from esm1nv_jax.inference.mutants import parse_mutants
from esm1nv_jax.interchange.loader import load_weights
from esm1nv_jax.model import encoder, soft_tokens
from esm1nv_jax.model.encoder import EncoderConfig, EncoderOutput
from esm1nv_jax.model.heads import to_predictions


@dataclasses.dataclass(frozen=True, eq=False)
class Model(LoadedModel):
    """What a model computes of sequences. Made by `load`."""

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
        ids = sequence_ids(sequences)
        if not ids:
            none = np.zeros((0, self.config.width), np.float32)
            return Embeddings([], none, none)
        longest = max(range(len(ids)), key=lambda i: len(ids[i]))
        self.check_fits(len(ids[longest]), f"sequence {longest}")
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
        ids = sequence_ids(sequences)
        if not ids:
            return []
        results = embed_sequences(self.on_devices, ids, OutputSpec(("logits",), ()), self.longest)
        return _split_by_sequence(results["logits"], ids)

    def attention(self, sequence: str | bytes) -> np.ndarray:
        """Attention weights: float32 [layers, heads, residues + 2, residues + 2].

        Row i holds the weights of query i, which add up to 1; `<s>` comes first and `</s>` last.

        Raises UserError for a sequence that is too long to be read at once.
        """
        model = self.with_attention_weights
        return contact_maps.attention_maps(model.on_devices, self.read_whole(sequence))

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
        model = self.with_attention_weights if method == "attention" else self
        ids = self.read_whole(sequence)
        return contact_maps.predict_contacts(model.on_devices, ids, method, on_progress)

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
        ids = sequence_ids(sequences)
        if not ids:
            return HeadPredictions(head, [])
        outputs = OutputSpec((), head=head)
        results = embed_sequences(self.on_devices, ids, outputs, self.longest, deterministic)
        values = to_predictions(head, results["head"])
        by_residue = head.level == "residue"
        return HeadPredictions(head, _split_by_sequence(values, ids) if by_residue else [*values])

    def fill_mask(self, sequence: str, top: int = 5) -> list[Prediction]:
        """The `top` likeliest of the 20 standard residues at each `<mask>` of a sequence.

        Probabilities are among the 20.
        """
        at = np.flatnonzero(residue_ids(sequence, "the sequence") == tokenizer.MASK)
        if not at.size:
            raise UserError("the sequence holds no <mask>; write one, as in MK<mask>V")
        if top < 1:
            raise UserError(f"top={top} must be at least 1")
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

    def score_sequences(self, sequences: Iterable[str | bytes], exact: bool = True) -> np.ndarray:
        """Sums over residues of log p(residue | the others), in nats: float64 [sequences].

        Args:
          sequences: of any lengths, so that insertions and deletions can be compared.
          exact: one forward pass for each residue, with only that one masked; otherwise one for
            each sequence with nothing masked, from which the residue's own visibility is removed.
        """
        self.check_mode(EXACT if exact else ONE_PASS)
        letters = [residue_letters(s, f"sequence {i}") for i, s in enumerate(as_list(sequences))]
        if exact:
            return likelihood.pseudo_log_likelihood(self.on_devices, letters, self.longest)[1]
        copied = likelihood.copy_log_odds(self.masking)
        return likelihood.one_pass_log_likelihood(self.on_devices, letters, self.longest, copied)

    def score_variants(
        self,
        sequence: str,
        mutants: Sequence[str],
        mode: str = MASKED,
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
        return likelihood.score_mutants(
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
        if self.precision == "int8":
            raise UserError("int8 has no gradient; load the model in fp32 or bf16")
        check_layers(layers, self.config)
        tokens_BT = jnp.asarray(tokens_BT)
        soft_tokens.check(tokens_BT)
        tokens_BT = tokens_BT.astype(jnp.int32 if tokens_BT.ndim == 2 else jnp.float32)
        if segment_ids_BT is None:
            segment_ids_BT = soft_tokens.is_real(tokens_BT).astype(jnp.int32)
        if positions_BT is None:
            T, room = tokens_BT.shape[1], self.config.positions
            if room < T and self.config.position_kind == "learned":
                raise UserError(f"rows of {T:,} tokens: this model has {room:,} positions")
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
        probabilities_TV = jnp.asarray(probabilities_TV, jnp.float32)
        if probabilities_TV.ndim != 2:
            raise UserError(
                f"probabilities are of shape {probabilities_TV.shape}; give [T, V] of one sequence"
            )
        soft_tokens.check(probabilities_TV[None])
        return soft_tokens.pseudo_log_likelihood(
            lambda tokens_BTV: self.apply(params, tokens_BTV).logits,
            probabilities_TV,
            self.config.vocabulary,
        )


def load(
    path: str, precision: str = "fp32", max_residues: int | None = None, engine: str = "auto"
) -> Model:
    """Loads a model from a run's folder, one of its steps, a model folder or an exported folder.

    Args:
      path: where it lies.
      precision: of matrix products, "fp32", "bf16" or, on a CPU, "int8".
      max_residues: read at once; by default what training has used.
      engine: of the blocks on a CPU, "xla", "openvino" or, for int8, "onnxruntime"; "auto" takes
        the fastest that is installed.

    Raises UserError where there is no model, or none in this precision or by this engine.
    """
    check_names(precision, engine)
    weights = load_weights(path)
    engine = select_engine(engine, precision, weights.model)
    room = weights.model.positions - SPECIALS
    if max_residues is not None and not (_is_integer(max_residues) and 1 <= max_residues <= room):
        raise UserError(
            f"max_residues={max_residues!r}: this model has {weights.model.positions} positions; "
            f"give 1 to {room}"
        )
    params = (weights.encoder_params, weights.params.get("head"), weights.contact_head)
    encoder_params, head, contacts = jax.device_put(params)
    return Model(
        weights.model,
        encoder_params,
        weights.provenance,
        precision,
        max_residues,
        weights.head,
        head,
        contacts,
        engine,
    )


def load_and_say(path: str, precision: str, max_residues: int | None, engine: str) -> Model:
    """`load` for a command, which prints the engine where it is another than XLA."""
    model = load(path, precision, max_residues, engine)
    if model.engine != "xla":
        console.print(f"matrix products in {precision}, by {NAMES[model.engine]}")
    return model


def check_layers(layers: Sequence[int], config: EncoderConfig) -> None:
    for layer in layers:
        if not _is_integer(layer) or not -1 <= layer <= config.layers:
            raise UserError(
                f"layer {layer!r} is unknown; there are 0 (embeddings) to {config.layers} (the "
                "last block) and -1 (after the final LayerNorm)"
            )


def _is_integer(value: object) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _split_by_sequence(flat: np.ndarray, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([len(i) for i in ids])[:-1])
