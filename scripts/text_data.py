"""Documents to packed blocks of tokens, and how many bytes of text those blocks score.

Documents are tokenised, joined with one separator token behind each, and cut into blocks of equal length, so no
compute goes into padding. The held-out side is cut so that **every token is scored exactly once**, which makes bits
per byte a property of the text and not of the block size:

- causal: the stream starts with a separator, and each block repeats the last token of the one before it as context,
  for the model predicts `block_size - 1` tokens of each block; where it predicts fewer (a Perceiver AR, whose latents
  are the last positions of a block), blocks overlap by all that it does not predict;
- masked: blocks do not overlap; which tokens are masked is drawn once, from a fixed seed;
- the last block reaches back into text that is already scored (labels -100) rather than being padded.
"""

from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from block_draws import BlockDraws
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import (
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    default_data_collator,
)


Objective = Literal["causal", "masked", "span_corruption", "sequence_to_sequence"]

# Python tokenisers build one object per token: pieces keep a document of any size from exhausting memory.
PIECE_CHARACTERS = 1 << 18
IGNORED_LABEL = -100
EVALUATION_SEED = 0
CUT_MARGIN = 32  # tokens
DOCUMENTS_AT_FIRST = 16


class EvaluationBlocks(NamedTuple):
    """Held-out blocks with labels, how many labels are scored, the UTF-8 bytes of the text, and, of span corruption,
    how many tokens of it are hidden."""

    blocks: Dataset
    scored_tokens: int
    text_bytes: int
    hidden_tokens: int | None = None


def load_tokenizer(name: str | None, *, objective: Objective, trust_remote_code: bool = False, **kwargs):
    """The tokenizer of that name, or bytes (ByT5's, which needs no download) if none is named."""
    tokenizer = (
        ByT5Tokenizer()
        if name is None
        else AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code, **kwargs)
    )
    if objective == "masked" and tokenizer.mask_token is None:
        if not isinstance(tokenizer, ByT5Tokenizer):
            raise ValueError(
                f"--objective masked needs a tokenizer with a mask token, got {type(tokenizer).__name__} without one"
            )
        # ByT5 marks what it hides with sentinels; its first one serves as the mask and is saved as such.
        tokenizer.mask_token = "<extra_id_0>"
    return tokenizer


def separator_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands between documents: the tokenizer's end of sequence, else BERT's separator, else bos."""
    for token_id in (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.bos_token_id):
        if token_id is not None:
            return token_id
    raise ValueError(
        f"the tokenizer must have an eos, sep or bos token to put between documents, got {type(tokenizer).__name__} "
        "with none of them"
    )


def pieces_of(text: str, limit: int = PIECE_CHARACTERS) -> list[str]:
    """Cuts a long document behind line breaks (or at the limit where there are none); joined, it is the same text."""
    pieces, start = [], 0
    while len(text) - start > limit:
        end = text.rfind("\n", start, start + limit) + 1
        end = end if end > start else start + limit
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def tokenize_text(tokenizer: PreTrainedTokenizerBase, text: str, *, parse_special_tokens: bool = False) -> list[int]:
    # Text is data: a literal "</s>" in an HTML page is four bytes and not the end of a document, unless asked for.
    encoded = tokenizer(
        pieces_of(text),
        add_special_tokens=False,
        return_attention_mask=False,
        split_special_tokens=not parse_special_tokens,
        verbose=False,
    )
    return [token_id for piece in encoded["input_ids"] for token_id in piece]


def first_tokens(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """The first `count` tokens of a text, of which no more is read than it takes."""
    length = 5 * count
    while True:
        token_ids = tokenize_text(tokenizer, text[:length])
        # The cut may fall into a word: the last tokens are not those of the whole text.
        if len(token_ids) >= count + CUT_MARGIN or length >= len(text):
            return token_ids[:count]
        length *= 2


def tokenize_documents(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    parse_special_tokens: bool = False,
    num_proc: int | None = None,
) -> Dataset:
    """One row per document: `input_ids`, the separator behind them, and `text_bytes`, its size in UTF-8.

    `datasets` keeps the result on disk, and finds it again, where the documents themselves came from disk.
    """
    separator = separator_token_id(tokenizer)

    def tokenize(texts: list[str]) -> dict[str, list]:
        return {
            "input_ids": [
                [*tokenize_text(tokenizer, text, parse_special_tokens=parse_special_tokens), separator]
                for text in texts
            ],
            "text_bytes": [len(text.encode("utf-8")) for text in texts],
        }

    return documents.map(
        tokenize,
        input_columns="text",
        batched=True,
        batch_size=16,
        num_proc=num_proc,
        remove_columns=documents.column_names,
        features=Features({"input_ids": List(Value("int32")), "text_bytes": Value("int64")}),
        desc="Tokenising",
    )


def tokenize_first_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int | None, **options
) -> Dataset:
    """As `tokenize_documents`, but in ever larger parts, of which the last is the one that completes so many tokens.

    Args:
        tokens: how many are needed, or None for those of all documents.
        options: those of `tokenize_documents`.
    """
    if tokens is None:
        return tokenize_documents(documents, tokenizer, **options)
    parts, start, more = [], 0, DOCUMENTS_AT_FIRST
    while not parts or (tokens > 0 and start < len(documents)):
        end = min(start + more, len(documents))
        parts.append(tokenize_documents(documents.select(range(start, end)), tokenizer, **options))
        tokens -= len(token_stream(parts[-1]))
        start, more = end, 2 * more
    return concatenate_datasets(parts)


def token_stream(tokenized: Dataset) -> np.ndarray:
    """All documents' tokens one behind the other, straight from Arrow's memory."""
    chunks = tokenized.data.column("input_ids").chunks
    return np.concatenate([np.asarray(chunk.flatten()) for chunk in chunks] or [np.empty(0, np.int32)])


def rows_to_dataset(**columns: np.ndarray) -> Dataset:
    """A dataset of equally long rows, without going through Python lists."""
    arrays = {}
    for name, rows in columns.items():
        count, length = rows.shape
        offsets = pa.array(np.arange(0, (count + 1) * length, max(length, 1), dtype=np.int64)[: count + 1])
        arrays[name] = pa.LargeListArray.from_arrays(offsets, pa.array(rows.reshape(-1)))
    return Dataset(pa.table(arrays)).with_format("torch")


def pack_for_training(tokenized: Dataset, block_size: int, *, max_samples: int | None = None) -> Dataset:
    """Blocks of `block_size` tokens, one behind the other; the incomplete one at the end is left out."""
    stream = token_stream(tokenized)
    count = len(stream) // block_size
    if not count:
        raise ValueError(
            f"--block_size must be at most the {len(stream)} tokens of the training text, got {block_size}"
        )
    count = count if max_samples is None else min(count, max_samples)
    return rows_to_dataset(input_ids=stream[: count * block_size].reshape(count, block_size))


def scored_windows(stream: np.ndarray, block_size: int, stride: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows of `block_size` every `stride` tokens, the last one moved back to end with the stream.

    Returns the windows and, of the same shape, whether a token is new in its window (the context is not).
    """
    length = min(block_size, len(stream))
    context = block_size - stride
    starts = np.arange(0, max(len(stream) - context, 1), stride)
    ends = np.minimum(starts + length, len(stream))
    positions = (ends - length)[:, None] + np.arange(length)
    new = positions >= (starts + context)[:, None]
    return stream[positions], new


def cut_to_tokens(tokenizer: PreTrainedTokenizerBase, text: str, token_ids: list[int], count: int, **options):
    """The longest prefix of `text` that is exactly its first tokens, at most `count` of them, or None."""
    # A multi-byte character may be cut in its middle: then a few tokens fewer are a whole prefix.
    for kept in range(count, max(count - 8, 0), -1):
        prefix = tokenizer.decode(token_ids[:kept], clean_up_tokenization_spaces=False)
        if text.startswith(prefix) and tokenize_text(tokenizer, prefix, **options) == token_ids[:kept]:
            return prefix
    return None


def limit_documents(
    documents: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int, *, parse_special_tokens: bool = False
) -> Dataset:
    """The first documents, as many as fit `max_tokens` with their separators; the one that overflows is cut.

    The cut is made in the *text*, so that its bytes are known exactly with any tokenizer.
    """
    names, texts, left = [], [], max_tokens
    for document in documents:
        token_ids = tokenize_text(tokenizer, document["text"], parse_special_tokens=parse_special_tokens)
        text = document["text"]
        if len(token_ids) + 1 > left:
            text = cut_to_tokens(tokenizer, text, token_ids, left - 1, parse_special_tokens=parse_special_tokens)
        if text:
            names.append(document["name"])
            texts.append(text)
        left -= len(token_ids) + 1
        if left <= 1:
            break
    if not texts:
        raise ValueError(
            f"--max_eval_samples must leave room for one held-out document, got room for {max_tokens} tokens, and "
            f"{type(tokenizer).__name__} cannot cut a document exactly"
        )
    return Dataset.from_dict({"name": names, "text": texts})


def mask_once(windows: np.ndarray, scored: np.ndarray, tokenizer: PreTrainedTokenizerBase, mlm_probability: float):
    """Masks held-out blocks from a fixed seed, so that every evaluation asks the same questions."""
    collator = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability, seed=EVALUATION_SEED)
    special = np.isin(windows, tokenizer.all_special_ids) | ~scored
    batch = collator(
        [
            {"input_ids": torch.from_numpy(ids.astype(np.int64)), "special_tokens_mask": torch.from_numpy(mask)}
            for ids, mask in zip(windows, special, strict=True)
        ]
    )
    return batch["input_ids"].numpy().astype(np.int32), batch["labels"].numpy().astype(np.int32)


def pack_for_evaluation(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    block_size: int,
    *,
    objective: Objective,
    mlm_probability: float = 0.15,
    predicted_tokens: int | None = None,
    max_samples: int | None = None,
    parse_special_tokens: bool = False,
    num_proc: int | None = None,
) -> EvaluationBlocks:
    """Held-out blocks in which every token is scored once (see the top of this file).

    Args:
        predicted_tokens: how many positions of a block, its last, a causal model has logits for; None for all.
    """
    causal = objective == "causal"
    stride = (predicted_tokens or block_size) - 1 if causal else block_size
    if max_samples is not None:
        documents = limit_documents(
            documents, tokenizer, max_samples * stride, parse_special_tokens=parse_special_tokens
        )
    tokenized = tokenize_documents(documents, tokenizer, parse_special_tokens=parse_special_tokens, num_proc=num_proc)
    stream = token_stream(tokenized)
    if causal:
        # The context of the first token that is scored: one separator, or as many as come before the predictions.
        context = np.full(block_size - stride, separator_token_id(tokenizer), stream.dtype)
        stream = np.concatenate([context, stream])
    windows, scored = scored_windows(stream, block_size, stride)
    if causal:
        inputs, labels = windows, np.where(scored, windows, IGNORED_LABEL).astype(np.int32)
    else:
        inputs, labels = mask_once(windows, scored, tokenizer, mlm_probability)
    return EvaluationBlocks(
        blocks=rows_to_dataset(input_ids=inputs, labels=labels),
        scored_tokens=int((labels != IGNORED_LABEL).sum()),
        text_bytes=int(sum(tokenized["text_bytes"])),
    )


class BlockCollator:
    """Batches blocks; makes the labels of training blocks (held-out blocks carry theirs).

    Labels are the tokens themselves, separators included: `DataCollatorForLanguageModeling` would drop every
    separator where a tokenizer uses one token for both padding and the end of a document, and packed blocks hold no
    padding. Masking is its work, with the randomness of `draws`, which causal blocks do not need.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        objective: Objective,
        mlm_probability: float = 0.15,
        draws: BlockDraws | None = None,
    ):
        self.special_ids = torch.tensor(sorted(tokenizer.all_special_ids))
        self.draws = draws
        self.masking = None
        if objective == "masked":
            assert draws is not None, "masked blocks need draws"
            self.masking = DataCollatorForLanguageModeling(tokenizer, mlm_probability=mlm_probability)

    def __call__(self, blocks: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if "labels" in blocks[0]:
            return default_data_collator(blocks)
        if self.masking is None:
            input_ids = torch.stack([block["input_ids"] for block in blocks])
            return {"input_ids": input_ids, "labels": input_ids.clone()}
        masked = [self.mask(block["input_ids"]) for block in blocks]
        inputs, labels = (torch.cat(rows) for rows in zip(*masked, strict=True))
        return {"input_ids": inputs, "labels": labels}

    def mask(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and labels `[1, L]` of one block `[L]`."""
        self.masking.generator = self.draws.generator(tokens)
        special = torch.isin(tokens, self.special_ids)
        return self.masking.torch_mask_tokens(tokens[None].clone(), special_tokens_mask=special[None])
