"""PyTorch's side of the benchmarks: `transformers`' ESM in the shape of one of our configs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from transformers import EsmConfig, EsmForMaskedLM

from esm1nv_jax.data import tokenizer
from esm1nv_jax.data.tokenizer import BOS, EOS, MASK, PAD
from esm1nv_jax.model.encoder_config import EncoderConfig


def config_of(model: EncoderConfig) -> EsmConfig:
    """The same architecture, with our token ids, as `esm1nv convert` writes it."""
    return EsmConfig(
        vocab_size=tokenizer.VOCABULARY,
        pad_token_id=PAD,
        mask_token_id=MASK,
        hidden_size=model.width,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        intermediate_size=model.ffn,
        max_position_embeddings=model.positions + PAD + 1,
        hidden_dropout_prob=model.dropout,
        attention_probs_dropout_prob=model.attention_dropout,
        layer_norm_eps=model.norm_epsilon,
        position_embedding_type="absolute",
        emb_layer_norm_before=False,
        token_dropout=False,
        attn_implementation="sdpa",
    )


def padded(
    sequences: list[np.ndarray], longest: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, longest] with `<s>`, `</s>` and padding, and the attention mask. By default
    `longest` is that of the batch."""
    longest = longest or max(map(len, sequences)) + 2
    tokens = torch.full((len(sequences), longest), PAD)
    for row, ids in enumerate(sequences):
        tokens[row, 0], tokens[row, len(ids) + 1] = BOS, EOS
        tokens[row, 1 : len(ids) + 1] = torch.from_numpy(ids.astype(np.int64))
    return tokens, (tokens != PAD).long()


class Trainer:
    """One step after another, as a user of `transformers` trains.

    15 % of the residues are predicted, 80/10/10, anew each time, as the usual collator does; logits
    at all positions; gradients clipped; fused AdamW without decay on biases and norms.
    """

    def __init__(
        self,
        model: EncoderConfig,
        optimizer,
        bf16: bool,
        start: str = "",
        device: str = "cpu",
        compiled: bool = False,
    ):
        torch.manual_seed(0)
        if start:  # a folder of its own kind
            self.model = EsmForMaskedLM.from_pretrained(start, attn_implementation="sdpa")
        else:
            self.model = EsmForMaskedLM(config_of(model))
        self.model.to(device)
        self.device = device
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.bf16, self.clip = bf16, optimizer.clip_norm
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        self.adamw = torch.optim.AdamW(
            [{"params": decayed}, {"params": others, "weight_decay": 0.0}],
            lr=optimizer.peak_lr,
            betas=(optimizer.beta1, optimizer.beta2),
            eps=optimizer.epsilon,
            weight_decay=optimizer.weight_decay,
            fused=True,
        )

    def train_step(self, sequences: list[np.ndarray], rate: float | None = None) -> float:
        """One step, at this learning rate if one is given; returns the loss."""
        if rate is not None:
            for group in self.adamw.param_groups:
                group["lr"] = rate
        tokens, attention_mask = padded(sequences)
        return float(self.step_on({"tokens": tokens, "attention_mask": attention_mask}))

    def step_on(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """One step on a batch that is on the device; returns the loss, which may not be there yet.

        `tokens` [B, T]; `attention_mask` [B, T], or bool [B, 1, T, T] together with `position_ids`
        of packed rows.
        """
        inputs, labels = corrupted(batch["tokens"])
        self.model.train()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.bf16):
            loss = self.loss(inputs, labels, batch["attention_mask"], batch.get("position_ids"))
        self.adamw.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.adamw.step()
        return loss.detach()

    def _loss(self, inputs, labels, attention_mask, position_ids=None) -> torch.Tensor:
        if position_ids is None:
            return self.model(inputs, attention_mask=attention_mask, labels=labels).loss
        # The model multiplies its embeddings with a mask [B, T], so it is given them ready-made.
        embeddings = self.model.esm.embeddings(input_ids=inputs, position_ids=position_ids)
        return self.model(
            inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels
        ).loss


def corrupted(tokens: torch.Tensor, rate: float = 0.15) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of masked-language modelling."""
    first, device = tokenizer.FIRST_RESIDUE, tokens.device
    selected = (torch.rand(tokens.shape, device=device) < rate) & (tokens >= first)
    kind = torch.rand(tokens.shape, device=device)
    letters = torch.randint(first, first + tokenizer.STANDARD, tokens.shape, device=device)
    inputs = torch.where(selected & (kind < 0.8), torch.full_like(tokens, MASK), tokens)
    inputs = torch.where(selected & (kind >= 0.8) & (kind < 0.9), letters, inputs)
    return inputs, torch.where(selected, tokens, torch.full_like(tokens, -100))


def random_batches(ids: list[np.ndarray], size: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Batches in random order, without end."""
    draw = np.random.default_rng(seed)
    while True:
        order = draw.permutation(len(ids))
        for start in range(0, len(order) - size + 1, size):
            yield [ids[i] for i in order[start : start + size]]


def grouped_batches(ids: list[np.ndarray], size: int, seed: int) -> Iterator[list[np.ndarray]]:
    """Random batches of sequences of like length: sorted within pools of 50 batches."""
    draw = np.random.default_rng(seed)
    while True:
        order = draw.permutation(len(ids))
        for start in range(0, len(order) - size + 1, 50 * size):
            pool = sorted(order[start : start + 50 * size], key=lambda i: -len(ids[i]))
            batches = [pool[i : i + size] for i in range(0, len(pool) - size + 1, size)]
            for i in draw.permutation(len(batches)):
                yield [ids[j] for j in batches[i]]
