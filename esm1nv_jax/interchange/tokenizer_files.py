"""The tokenizer of an exported folder, and the vocabulary of a folder that is read.

`EsmTokenizer` merges a run of unknown characters into one `<unk>` and knows no lower case, so the
export is a tokenizer of the `tokenizers` library that does what `data/tokenizer.py` does: one token
a character, always.
"""

from __future__ import annotations

import json

from etils import epath

from esm1nv_jax.common import files
from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import BOS, EOS, ESM1NV, ESM2, MASK, PAD, RESIDUES, UNK, vocabulary
from esm1nv_jax.model.encoder_config import EncoderConfig

MAX_UNUSED_ROWS = 1024  # rows of an embedding that no token has: makers of models round sizes up
# ESM-2's tokens with a break between chains, in an embedding of 64 rows.
ESMC_TOKENS = " ".join([ESM2.replace("<null_1>", "|"), *(f"<row_{i}>" for i in range(33, 64))])
TOKENIZER, VOCABULARY = "tokenizer.json", "vocab.txt"


def write_tokenizer(folder: epath.Path, config: EncoderConfig) -> None:
    """Writes the files that AutoTokenizer reads, and vocab.txt."""
    known = vocabulary(config.vocabulary)
    ids = {token: i for i, token in enumerate(known.tokens)}
    unk, bos, eos, pad, mask = (known.tokens[known.own_id(i)] for i in (UNK, BOS, EOS, PAD, MASK))
    special_tokens = {
        "unk_token": unk,
        "bos_token": bos,
        "cls_token": bos,
        "eos_token": eos,
        "sep_token": eos,
        "pad_token": pad,
        "mask_token": mask,
    }
    long_tokens = [token for token in known.tokens if len(token) > 1]  # split off before characters
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    start, end = ({"SpecialToken": {"id": token, "type_id": 0}} for token in (bos, eos))
    first, second = ({"Sequence": {"id": which, "type_id": 0}} for which in "AB")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[token], "content": token, "special": True} | flags for token in long_tokens
        ],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(known.tokens)},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "."},
            "behavior": "Isolated",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, first, end],
            "pair": [start, first, end, second, end],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]} for token in (bos, eos)
            },
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": unk},
    }
    tokenizer_config = special_tokens | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / TOKENIZER).write_text(json.dumps(tokenizer, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(special_tokens, indent=1))
    (folder / VOCABULARY).write_text("\n".join(known.tokens) + "\n")


def read_vocabulary(folder: epath.Path, size: int, file: str | None, hf_config: dict) -> str:
    """The tokens by id, joined by blanks, of `size` rows.

    From `file`, else the folder's tokenizer.json or vocab.txt, else one of the vocabularies
    known here, if size, padding and mask id are its own. Raises UserError where there is none.
    """
    candidates = [epath.Path(file)] if file else [folder / TOKENIZER, folder / VOCABULARY]
    path = next((path for path in candidates if path.exists()), None)
    if path is None and file:
        raise UserError(f"vocabulary {file} does not exist; give a vocab.txt or a tokenizer.json")
    if path is None:
        ids = (size, hf_config.get("pad_token_id"), hf_config.get("mask_token_id"))
        for text in (ESM1NV, ESM2, ESMC_TOKENS):
            known = vocabulary(text)
            if ids == (len(known.tokens), known.own_id(PAD), known.own_id(MASK)):
                return text
        raise UserError(
            f"{folder} has neither {TOKENIZER} nor {VOCABULARY}, and without one the ids of its "
            "tokens are unknown; esm1nv convert --from hf DIR --vocabulary FILE --out OUT takes "
            "one from elsewhere"
        )
    try:
        text = path.read_text().removeprefix("\ufeff")
        tokens = (_parse_json if path.suffix == ".json" else _parse_lines)(text)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} cannot be read: a vocab.txt has one token a line, a tokenizer.json a table of "
            "tokens by id"
        ) from None
    if not len(tokens) <= size <= len(tokens) + MAX_UNUSED_ROWS:
        raise UserError(f"{path} has {len(tokens)} tokens, config.json says vocab_size={size}")
    # Rows without a token take part in the softmax over there, so they do here.
    return " ".join([*tokens, *(f"<row_{i}>" for i in range(len(tokens), size))])


def _parse_lines(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip().splitlines()]


def _parse_json(text: str) -> list[str]:
    content = files.parse_json(text)
    ids = dict(content["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    tokens = sorted(ids, key=lambda token: ids[token])
    if [ids[token] for token in tokens] != list(range(len(tokens))):
        raise ValueError("ids are not 0, 1, 2, ...")
    return tokens


def _normalizers(tokens: tuple[str, ...]) -> list[dict]:
    """As `data.tokenizer.normalize`: without white space, gaps and final stops, in upper case.

    A gap stays where it is a token, as in ESM-2.
    """
    patterns = [({"Regex": "[ \\t\\n\\r\\x0b\\x0c]"}, "")]
    patterns += [({"String": gap}, "") for gap in "-." if gap not in tokens]
    patterns += [({"Regex": "\\*+\\z"}, "")]
    patterns += [({"String": letter.lower()}, letter) for letter in RESIDUES]
    return [{"type": "Replace", "pattern": of, "content": to} for of, to in patterns]
