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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from esm1nv_jax.checkpoints import model_folder
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data import tokenizer
from esm1nv_jax.inference import variant_scores
from esm1nv_jax.inference.engine import Placed, Want, encode
from esm1nv_jax.inference.mutants import parse_all
from esm1nv_jax.inference.row_shapes import Shapes
from esm1nv_jax.model import encoder
from esm1nv_jax.model.encoder import Compute, EncoderConfig, Output
from esm1nv_jax.model.kernels.matmul import multiplies_bf16
from esm1nv_jax.model.masking import recipe

PRECISIONS = {"fp32": "float32", "bf16": "bfloat16"}
# Tokens in a batch on one device: enough to keep its matrix units full.
TOKENS_CPU, TOKENS_ACCELERATOR = 2_048, 32_768


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """Of n sequences: `per_residue[i]` float32 [residues of sequence i, width], row j is residue j;
    `mean` float32 [n, width], over residues only; `cls` float32 [n, width], the state of `<s>`."""

    per_residue: list[np.ndarray]
    mean: np.ndarray
    cls: np.ndarray


@dataclasses.dataclass(frozen=True)
class Prediction:
    """One `<mask>`: its position (1-based) and residues with their probabilities, best first."""

    position: int
    residues: list[tuple[str, float]]


@dataclasses.dataclass(frozen=True)
class Model:
    """Parameters, architecture and where they came from. Made by `load`."""

    config: EncoderConfig
    params: dict  # jax arrays; for `apply`
    provenance: dict[str, Any]
    precision: str = "fp32"

    @property
    def longest(self) -> int:
        """Residues read at once: as many as the positions hold and training has used."""
        return min(self.config.positions - 2, self.trained_residues or self.config.positions)

    @property
    def trained_residues(self) -> int | None:
        """The crop length of training, where it is known."""
        return self._data.get("max_residues")

    @property
    def prefixes_only(self) -> bool:
        """Whether training is known to have seen nothing but the beginnings of long proteins."""
        return self._data.get("crop") == "prefix"

    @property
    def _data(self) -> dict:
        return (self.provenance.get("config") or {}).get("data") or {}

    @property
    def compute(self) -> Compute:
        return Compute(dtype=PRECISIONS[self.precision])

    @functools.cached_property
    def placed(self) -> Placed:
        """The model on all devices of this host; a CPU is one, however many it is said to be."""
        devices = jax.local_devices()
        return self.place(devices[:1] if devices[0].platform == "cpu" else devices)

    def place(self, devices: Sequence[jax.Device]) -> Placed:
        """The model on these devices, over which the rows of a batch are spread."""
        mesh = jax.make_mesh(
            (len(devices),), ("rows",), (jax.sharding.AxisType.Auto,), devices=devices
        )
        cpu = devices[0].platform == "cpu"
        native = multiplies_bf16(devices[0].platform)
        compute = dataclasses.replace(self.compute, native=native)
        params = _rounded(self.params) if self.precision == "bf16" else self.params
        spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("rows"))
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return Placed(
            self.config,
            compute,
            jax.device_put(params, everywhere),
            spread,
            Shapes.of(self.longest + 2, TOKENS_CPU if cpu else TOKENS_ACCELERATOR, len(devices)),
        )

    def embed(
        self, sequences: Sequence[str | bytes], layer: int = -1, deterministic: bool = False
    ) -> Embeddings:
        """Embeds proteins; those longer than `longest` residues in overlapping windows.

        Args:
          sequences: residue letters, lower case raised, `<mask>` allowed. One token a residue.
          layer: 0 the embeddings, k the output of block k, -1 the last after the final LayerNorm.
          deterministic: the same bits whatever else is embedded; slower.

        Raises UserError for an empty sequence or an unknown layer.
        """
        check_layers((layer,), self.config)
        ids = [_ids(sequence, i) for i, sequence in enumerate(_several(sequences))]
        if not ids:
            none = np.zeros((0, self.config.width), np.float32)
            return Embeddings([], none, none)
        want = Want(("mean", "per_residue", "cls"), (layer,))
        found = encode(self.placed, ids, want, self.longest, deterministic)
        return Embeddings(
            _ragged(found[f"per_residue_{layer}"], ids),
            found[f"mean_{layer}"],
            found[f"cls_{layer}"],
        )

    def logits(self, sequences: Sequence[str | bytes]) -> list[np.ndarray]:
        """Scores of every token at every residue: float32 [residues, vocabulary] for each sequence.

        Columns are `esm1nv_jax.data.tokenizer.TOKENS`; `<mask>` may stand in a sequence.
        """
        ids = [_ids(sequence, i) for i, sequence in enumerate(_several(sequences))]
        if not ids:
            return []
        found = encode(self.placed, ids, Want(("logits",), ()), self.longest)
        return _ragged(found["logits"], ids)

    def fill_mask(self, sequence: str, top: int = 5) -> list[Prediction]:
        """The `top` likeliest of the 20 standard residues at each `<mask>` of a sequence.

        Probabilities are among the 20.
        """
        at = np.flatnonzero(_ids(sequence, 0) == tokenizer.MASK)
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
        masking = (self.provenance.get("config") or {}).get("masking") or {}
        if "recipe" not in masking:
            return False
        trained = recipe(masking["recipe"])
        return trained.mask + trained.random >= 1 and not trained.may_repeat

    def score_variants(
        self,
        sequence: str,
        mutants: Sequence[str],
        mode: str = "masked-marginals",
        additive: bool = False,
        offset: int = 0,
        force: bool = False,
        tell: Callable[[float], None] = lambda done: None,
    ) -> np.ndarray:
        """How much likelier than the wild type each mutant is: float64 [mutants], higher is fitter.

        Args:
          sequence: the wild type.
          mutants: such as "A4G" or "A4G:L10P"; the first residue has number 1 + `offset`.
          mode: "masked-marginals" (log p(mutant) - log p(wild type) with all mutated sites masked),
            "wt-marginals" (nothing masked) or "pseudo-perplexity" (PLL(mutant) - PLL(wild type)).
          additive: mask the sites of a mutant one at a time, and add up.
          force: allow wt-marginals for a model whose visible positions mean nothing.
          tell: called with how many mutants are done.

        Raises UserError for what is no substitution of the sequence, and for sites too far apart
        for one window of a long protein.
        """
        if mode == "wt-marginals" and self.sees_wrong_residues_only and not force:
            raise UserError(
                "wt-marginals: this model was trained without unchanged targets, so what it "
                "predicts at visible residues means nothing; take masked-marginals (or force it)"
            )
        wild_type = tokenizer.clean(sequence).sequence.decode()
        parsed = parse_all(_several(mutants), wild_type, offset)
        return variant_scores.scores(
            self.placed, wild_type, parsed, self.longest, mode, additive, tell
        )

    def apply(
        self, params: dict, tokens_BT, segment_ids_BT=None, positions_BT=None, layers=()
    ) -> Output:
        """The pure function itself, for use under `jax.jit`, `jax.grad` and the like.

        Args:
          params: as `model.params`.
          tokens_BT: int32 ids with `<s>` and `</s>`; see `esm1nv_jax.data.tokenizer.encode`.
          segment_ids_BT: which sequence of its row a token belongs to, 0 for padding; one sequence
            a row where None.
          positions_BT: from 0 in each segment; counted along the row where None.
          layers: hidden states to return.
        """
        tokens_BT = jnp.asarray(tokens_BT, jnp.int32)
        if segment_ids_BT is None:
            segment_ids_BT = (tokens_BT != tokenizer.PAD).astype(jnp.int32)
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return encoder.forward(
            self.config,
            params,
            tokens_BT,
            segment_ids_BT,
            positions_BT,
            compute=self.compute,
            hidden_layers=tuple(layers),
        )


def load(path: str, precision: str = "fp32") -> Model:
    """Loads a model from a run's folder, one of its steps, a model folder or an exported folder.

    Args:
      path: where it lies.
      precision: of matrix products, "fp32" or "bf16".

    Raises UserError where there is no model.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r} is unknown; there are {', '.join(PRECISIONS)}")
    weights = model_folder.read(path)
    return Model(weights.model, jax.device_put(weights.params), weights.provenance, precision)


def check_layers(layers: Sequence[int], config: EncoderConfig) -> None:
    for layer in layers:
        if not -1 <= layer <= config.layers:
            raise UserError(
                f"layer {layer} is unknown; there are 0 (embeddings) to {config.layers} (the last "
                "block) and -1 (after the final LayerNorm)"
            )


def _several(texts: Sequence[str | bytes]) -> Sequence[str | bytes]:
    """Refuses one text, which would be taken for as many as it has letters."""
    if isinstance(texts, str | bytes):
        raise UserError(f"{texts[:20]!r} is one text; give a list, as in [text]")
    return texts


def _ids(sequence: str | bytes, index: int) -> np.ndarray:
    """uint8 ids of the residues, `<mask>` included; no specials."""
    if isinstance(sequence, str):
        sequence = sequence.encode("ascii", "replace")
    parts = [tokenizer.residue_ids(tokenizer.clean(p).sequence) for p in sequence.split(b"<mask>")]
    mask = np.array([tokenizer.MASK], np.uint8)
    joined = [parts[0]] + [x for part in parts[1:] for x in (mask, part)]
    ids = np.concatenate(joined)
    if not ids.size:
        raise UserError(f"sequence {index} is empty; give at least one residue")
    return ids


def _ragged(flat: np.ndarray, ids: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(flat, np.cumsum([len(i) for i in ids])[:-1])


def _rounded(params: dict) -> dict:
    """Kernels in bf16 once, instead of at every batch; everything else stays as it is."""

    def rounded(path, leaf):
        return leaf.astype(jnp.bfloat16) if path[-1].key == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(rounded, params)
