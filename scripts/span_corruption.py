"""Span corruption: text with holes, and what was in them, for an encoder–decoder (T5, arXiv 1910.10683, §3.1.4).

Of a block of L tokens, M = round(L · density) are hidden, in S = round(M / mean span length) spans. The S spans are a
composition of M into S parts, the kept stretches between them one of L - M, both drawn uniformly. With sentinels
<0>, <1>, … (the tokenizer's `<extra_id_0>`, …):

    input:   kept_0 <0> kept_1 <1> … kept_S </s>            L - M + S + 1 tokens
    target:  <0> hidden_1 <1> hidden_2 … hidden_S <S> </s>  M + S + 2 tokens

Here kept_0 and kept_S may be empty, so that the first and the last token are hidden at times (T5's own code always
keeps the first and hides the last). Long blocks have more spans than a tokenizer has sentinels; behind the last one
comes the first again, for input and target have them in the same order.

UL2 (arXiv 2205.05131, table 1) mixes seven denoisers, each as often as the others, and puts the mode in front of the
input, as text: `[R]` short spans (3 or 8 tokens, 15 %), `[S]` the last quarter given what stands before it, `[X]` long
spans or much of the text (3 or 8 tokens, 50 %; 64 tokens, 15 or 50 %).

Span lengths are in subwords. A byte tokenizer hides spans of about the same text: ByT5 (arXiv 2105.13626, section 3.2)
has 20 bytes for T5's 3 tokens, and so do we for all of them.
"""

from typing import NamedTuple

import torch
from block_draws import BlockDraws
from torch import Tensor
from transformers import ByT5Tokenizer, DataCollatorForSeq2Seq, PreTrainedTokenizerBase


BYTES_PER_SUBWORD = 20 / 3


class Denoiser(NamedTuple):
    """How much is hidden, in spans of which mean length (in subwords; None: one span, at the end), and its mode."""

    density: float
    mean_span_length: float | None
    mode: str | None = None


UL2_DENOISERS = (
    Denoiser(0.15, 3, "[R]"),
    Denoiser(0.15, 8, "[R]"),
    Denoiser(0.25, None, "[S]"),
    Denoiser(0.5, 3, "[X]"),
    Denoiser(0.5, 8, "[X]"),
    Denoiser(0.15, 64, "[X]"),
    Denoiser(0.5, 64, "[X]"),
)


def random_composition(total: int, parts: int, generator: torch.Generator | None = None) -> list[int]:
    """`parts` numbers of at least 1 that sum to `total`, each such list equally likely."""
    cuts = (torch.randperm(total - 1, generator=generator)[: parts - 1] + 1).sort().values.tolist()
    return [end - start for start, end in zip([0, *cuts], [*cuts, total], strict=True)]


def draw_spans(
    length: int, density: float, mean_span_length: float | None, generator: torch.Generator | None = None
) -> list[tuple[int, int]]:
    """(start, end) of the hidden spans of a block of `length` tokens (at least 2), in order, never touching."""
    hidden = min(max(round(length * density), 1), length - 1)
    if mean_span_length is None:
        return [(length - hidden, length)]
    kept = length - hidden
    count = min(max(round(hidden / mean_span_length), 1), hidden, kept + 1)
    spans, position = [], 0
    # Two more than there are, so that the first and the last stretch can be empty.
    gaps = random_composition(kept + 2, count + 1, generator)
    for index, (gap, size) in enumerate(zip(gaps, random_composition(hidden, count, generator), strict=False)):
        start = position + gap - (index == 0)
        position = start + size
        spans.append((start, position))
    return spans


def cut_spans(tokens: Tensor, spans: list[tuple[int, int]], sentinels: Tensor, end: int) -> tuple[Tensor, Tensor]:
    """Input and target of the formula above for `tokens` `[L]`, with `sentinels` in turn."""
    inputs, target, position = [], [], 0
    marks = sentinels[torch.arange(len(spans) + 1) % len(sentinels)].split(1)
    for (start, stop), mark in zip(spans, marks, strict=False):
        inputs += [tokens[position:start], mark]
        target += [mark, tokens[start:stop]]
        position = stop
    last = tokens.new_tensor([end])
    return torch.cat([*inputs, tokens[position:], last]), torch.cat([*target, marks[-1], last])


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of `<extra_id_0>`, `<extra_id_1>`, …, as many as there are.

    Raises:
        ValueError: there are none.
    """
    vocabulary = tokenizer.get_vocab()
    ids = []
    while (token := f"<extra_id_{len(ids)}>") in vocabulary:
        ids.append(vocabulary[token])
    if not ids:
        raise ValueError(
            "span corruption needs a tokenizer with the sentinels <extra_id_0>, <extra_id_1>, …, got "
            f"{type(tokenizer).__name__} without them: T5's has 100, a byte tokenizer 125, and train_tokenizer.py "
            "makes one"
        )
    return ids


class SpanCorruptor:
    """Makes (input, target) of a block.

    Args:
        tokenizer: with sentinels and an end of sequence.
        denoisers: those to choose from, each as often as the others.

    Raises:
        ValueError: a tokenizer without what is needed.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, denoisers: tuple[Denoiser, ...]):
        if tokenizer.eos_token_id is None:
            raise ValueError(f"span corruption needs an end of sequence, got {type(tokenizer).__name__} without one")
        unit = BYTES_PER_SUBWORD if isinstance(tokenizer, ByT5Tokenizer) else 1
        self.denoisers = [
            (density, length and length * unit, tokenizer.encode(mode, add_special_tokens=False) if mode else [])
            for density, length, mode in denoisers
        ]
        self.end = tokenizer.eos_token_id
        self.sentinels = torch.tensor(sentinel_ids(tokenizer))

    def __call__(self, tokens: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor, int]:
        """Input, target and number of hidden tokens for `tokens` `[L]`, by torch's own generator if none is given."""
        choice = 0
        if len(self.denoisers) > 1:
            choice = int(torch.randint(len(self.denoisers), (), generator=generator))
        density, length, prefix = self.denoisers[choice]
        spans = draw_spans(len(tokens), density, length, generator)
        inputs, target = cut_spans(tokens, spans, self.sentinels, self.end)
        return torch.cat([inputs.new_tensor(prefix), inputs]), target, sum(end - start for start, end in spans)


class SpanCorruptionCollator:
    """Batches blocks `{"input_ids": [L]}` with holes; blocks that have labels keep theirs.

    Gives `input_ids` and `labels`, and an `attention_mask` where there is padding (labels are padded with -100).
    The holes are drawn by `draws`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, corruptor: SpanCorruptor, draws: BlockDraws):
        self.corruptor, self.draws = corruptor, draws
        self.pad = DataCollatorForSeq2Seq(tokenizer)

    def __call__(self, blocks: list[dict]) -> dict[str, Tensor]:
        if "labels" not in blocks[0]:
            rows = [block["input_ids"] for block in blocks]
            pairs = [self.corruptor(tokens, self.draws.generator(tokens)) for tokens in rows]
            blocks = [{"input_ids": inputs, "labels": target} for inputs, target, _ in pairs]
        batch = self.pad([{name: values.tolist() for name, values in block.items()} for block in blocks])
        if batch["attention_mask"].all():
            del batch["attention_mask"]  # a router that knows of no padding saves the work of looking for it
        return dict(batch)
