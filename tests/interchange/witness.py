"""Models made by `transformers` itself, and what it computes: the witness of the conversion."""

import json

import numpy as np
import torch
import transformers

from tests.interchange import packed

torch.set_num_threads(1)  # the tests share their cores
ESM2_TOKENS = transformers.models.esm.configuration_esm.get_default_vocab_list()
BERT_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"ACDEFGHIKLMNPQRSTVWY")  # AntiBERTy's

_SMALL = dict(
    num_hidden_layers=3,
    hidden_size=48,
    num_attention_heads=4,
    intermediate_size=96,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
_ESM2 = dict(vocab_size=33, pad_token_id=1, mask_token_id=32, layer_norm_eps=1e-5)


def config(kind: str):
    """A small config of each architecture that can be converted, or ESM-2's at full size."""
    esm, bert = transformers.EsmConfig, transformers.BertConfig
    ours = dict(vocab_size=30, pad_token_id=3, mask_token_id=4)
    rotary = dict(position_embedding_type="rotary", token_dropout=True)
    return {
        "esm": lambda: esm(**_SMALL, **ours, max_position_embeddings=134, layer_norm_eps=1e-5),
        "esm1b": lambda: esm(
            **_SMALL,
            **_ESM2,
            max_position_embeddings=132,
            emb_layer_norm_before=True,
            token_dropout=True,
        ),
        "esm2": lambda: esm(**_SMALL, **_ESM2, **rotary),
        "esm2_8M": lambda: esm(
            **_SMALL
            | dict(
                num_hidden_layers=6, hidden_size=320, num_attention_heads=20, intermediate_size=1280
            ),
            **_ESM2,
            **rotary,
        ),
        "esm2_35M": lambda: esm(
            **_SMALL
            | dict(
                num_hidden_layers=12,
                hidden_size=480,
                num_attention_heads=20,
                intermediate_size=1920,
            ),
            **_ESM2,
            **rotary,
        ),
        "bert": lambda: bert(**_SMALL, vocab_size=25, max_position_embeddings=130),
        "bert_tanh": lambda: bert(
            **_SMALL, vocab_size=25, max_position_embeddings=130, hidden_act="gelu_new"
        ),
    }[kind]()


def tokens_of(kind: str) -> tuple[str, ...]:
    return {"esm": packed.TOKENS, "bert": BERT_TOKENS, "bert_tanh": BERT_TOKENS}.get(
        kind, ESM2_TOKENS
    )


def make(kind: str, seed: int = 0):
    """A model with random weights in which no bias and no scale is at its neutral value."""
    torch.manual_seed(seed)
    made = config(kind)
    model_class = getattr(
        transformers, "EsmForMaskedLM" if made.model_type == "esm" else "BertForMaskedLM"
    )
    model = model_class(made).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def save(model, kind: str, folder) -> str:
    """`save_pretrained`, and the vocabulary beside it. Returns the folder's path."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(tokens_of(kind)) + "\n")
    return str(folder)


def ids(kind: str, sequences: list[str]):
    """Padded ids and mask, by the vocabulary's list alone; `_` stands for the mask token."""
    tokens = tokens_of(kind)
    start, end, pad, mask, unknown = (
        next(i for i, t in enumerate(tokens) if t in names)
        for names in (
            ("<s>", "<cls>", "[CLS]"),
            ("</s>", "<eos>", "[SEP]"),
            ("<pad>", "[PAD]"),
            ("<mask>", "[MASK]"),
            ("<unk>", "[UNK]"),
        )
    )
    by_letter = {letter: i for i, letter in enumerate(tokens)} | {"_": mask}
    rows = [[start, *(by_letter.get(c, unknown) for c in s), end] for s in sequences]
    length = max(map(len, rows))
    padded = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    return padded, torch.tensor([[1] * len(r) + [0] * (length - len(r)) for r in rows])


def run(model, kind: str, sequences: list[str]) -> list[tuple[list[np.ndarray], np.ndarray]]:
    """(hidden states by layer, logits) of each sequence without its padding."""
    inputs, mask = ids(kind, sequences)
    with torch.no_grad():
        out = model(input_ids=inputs, attention_mask=mask, output_hidden_states=True)
    return [
        ([h[i, : int(n)].numpy() for h in out.hidden_states], out.logits[i, : int(n)].numpy())
        for i, n in enumerate(mask.sum(1))
    ]


def rewrite(folder, **fields) -> None:
    """Changes fields of a saved config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
