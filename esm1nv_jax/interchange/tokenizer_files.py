"""The tokenizer of an exported folder, and the vocabulary of a folder that is read.

`EsmTokenizer` merges a run of unknown characters into one `<unk>` and knows no lower case, so the
export is a tokenizer of the `tokenizers` library that does what `data/tokenizer.py` does: one token
a character, always.
"""

from __future__ import annotations

import json

from etils import epath

from esm1nv_jax.common.errors import UserError
from esm1nv_jax.data.tokenizer import BOS, EOS, MASK, PAD, RESIDUES, UNK
from esm1nv_jax.data.vocabulary import ESM1NV, ESM2, vocabulary
from esm1nv_jax.model.encoder import EncoderConfig

MOST_EMPTY = 1024  # rows of an embedding that no token has, as makers of models round sizes up
TOKENIZER, VOCABULARY = "tokenizer.json", "vocab.txt"


def write(folder: epath.Path, config: EncoderConfig) -> None:
    known = vocabulary(config.vocabulary)
    ids = {token: i for i, token in enumerate(known.tokens)}
    name = {row: known.tokens[known.own_id(row)] for row in (UNK, BOS, EOS, PAD, MASK)}
    named = {
        "unk_token": name[UNK],
        "bos_token": name[BOS],
        "cls_token": name[BOS],
        "eos_token": name[EOS],
        "sep_token": name[EOS],
        "pad_token": name[PAD],
        "mask_token": name[MASK],
    }
    whole = [token for token in known.tokens if len(token) > 1]  # told apart before characters are
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": ids[token], "content": token, "special": True} | flags for token in whole
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
            "single": [_special(name[BOS]), _sequence("A"), _special(name[EOS])],
            "pair": [
                _special(name[BOS]),
                _sequence("A"),
                _special(name[EOS]),
                _sequence("B"),
                _special(name[EOS]),
            ],
            "special_tokens": {
                token: {"id": token, "ids": [ids[token]], "tokens": [token]}
                for token in (name[BOS], name[EOS])
            },
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": name[UNK]},
    }
    settings = named | {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.positions,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    (folder / TOKENIZER).write_text(json.dumps(tokenizer, indent=1))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    (folder / "special_tokens_map.json").write_text(json.dumps(named, indent=1))
    (folder / VOCABULARY).write_text("\n".join(known.tokens) + "\n")


def read(folder: epath.Path, size: int, file: str | None, description: dict) -> str:
    """The tokens by id, joined by blanks, of `size` rows.

    From `file`, else the folder's tokenizer.json or vocab.txt, else one of the two vocabularies
    known here, if size, padding and mask id are its own. Raises UserError where there is none.
    """
    names = [epath.Path(file)] if file else [folder / TOKENIZER, folder / VOCABULARY]
    found = [path for path in names if path.exists()]
    if file and not found:
        raise UserError(f"vocabulary {file} does not exist; give a vocab.txt or a tokenizer.json")
    if not found:
        ids = (size, description.get("pad_token_id"), description.get("mask_token_id"))
        for text in (ESM1NV, ESM2):
            known = vocabulary(text)
            if ids == (len(known.tokens), known.own_id(PAD), known.own_id(MASK)):
                return text
        raise UserError(
            f"{folder} has neither {TOKENIZER} nor {VOCABULARY}, so nobody knows which token has "
            "which id; esm1nv convert --from hf DIR --vocabulary FILE --out OUT takes one from "
            "elsewhere"
        )
    path = found[0]
    try:
        tokens = (_from_json if path.suffix == ".json" else _from_lines)(path.read_text())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} cannot be read: a vocab.txt has one token a line, a tokenizer.json a table of "
            "tokens by id"
        ) from None
    if not len(tokens) <= size <= len(tokens) + MOST_EMPTY:
        raise UserError(f"{path} has {len(tokens)} tokens, config.json says vocab_size={size}")
    # Rows without a token take part in the softmax over there, so they do here.
    return " ".join([*tokens, *(f"<row_{i}>" for i in range(len(tokens), size))])


def _from_lines(text: str) -> list[str]:
    return [line.strip() for line in text.rstrip().splitlines()]


def _from_json(text: str) -> list[str]:
    content = json.loads(text)
    ids = dict(content["model"]["vocab"])
    ids |= {token["content"]: token["id"] for token in content.get("added_tokens", [])}
    tokens = sorted(ids, key=ids.get)
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


def _special(token: str) -> dict:
    return {"SpecialToken": {"id": token, "type_id": 0}}


def _sequence(which: str) -> dict:
    return {"Sequence": {"id": which, "type_id": 0}}
