"""What `Trainer` is given for each kind of head: rows, the collator that transformers has for them, its own class."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    ByT5Tokenizer,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
    default_data_collator,
)


TOKENIZER = ByT5Tokenizer(mask_token="<extra_id_0>")
# Of several lengths, so that every batch has padding.
TEXTS = ["to be", "or not to", "be, that", "is", "the quest", "ion: whet", "her", "'tis nob"]
IMAGE_SIZE = 8


@dataclass(frozen=True)
class Task:
    rows: Callable[[], list[dict]]
    collator: Callable[[PreTrainedModel], Callable]
    trainer: type[Trainer] = Trainer
    arguments: type[TrainingArguments] = TrainingArguments
    options: dict | None = None


def _encoded() -> list[dict]:
    return [dict(TOKENIZER(text)) for text in TEXTS]


def _images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(1, IMAGE_SIZE, IMAGE_SIZE, generator=generator) for _ in TEXTS]


def _classified() -> list[dict]:
    return [row | {"label": index % 3} for index, row in enumerate(_encoded())]


def _tagged() -> list[dict]:
    return [row | {"labels": [token % 3 for token in row["input_ids"]]} for row in _encoded()]


def _answered() -> list[dict]:
    return [row | {"start_positions": index % 3, "end_positions": 2} for index, row in enumerate(_encoded())]


def _translated() -> list[dict]:
    return [row | {"labels": row["input_ids"][::-1]} for row in _encoded()]


def _pictures() -> list[dict]:
    return [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(_images())]


def _answered_about_pictures() -> list[dict]:
    """Questions and answers of one length each: the collator of transformers for this does not pad."""
    return [
        {"pixel_values": image, **TOKENIZER("what? "), "labels": TOKENIZER(text[:2])["input_ids"]}
        for image, text in zip(_images(), TEXTS, strict=True)
    ]


def _series() -> list[dict]:
    vectors = torch.randn(len(TEXTS), 9, 3, generator=torch.Generator().manual_seed(6))
    return [{"input_features": row, "labels": row[:, :2].cumsum(0)} for row in vectors]


_SEQ2SEQ = {
    "trainer": Seq2SeqTrainer,
    "arguments": Seq2SeqTrainingArguments,
    "options": {"predict_with_generate": True, "generation_max_length": 4},
}
TASKS = {
    "AutoModelForCausalLM": Task(_encoded, lambda _: DataCollatorForLanguageModeling(TOKENIZER, mlm=False)),
    "AutoModelForMaskedLM": Task(_encoded, lambda _: DataCollatorForLanguageModeling(TOKENIZER, mlm_probability=0.3)),
    "AutoModelForSequenceClassification": Task(_classified, lambda _: DataCollatorWithPadding(TOKENIZER)),
    "AutoModelForTokenClassification": Task(_tagged, lambda _: DataCollatorForTokenClassification(TOKENIZER)),
    "AutoModelForQuestionAnswering": Task(_answered, lambda _: DataCollatorWithPadding(TOKENIZER)),
    "AutoModelForSeq2SeqLM": Task(_translated, lambda model: DataCollatorForSeq2Seq(TOKENIZER, model), **_SEQ2SEQ),
    "AutoModelForImageClassification": Task(_pictures, lambda _: default_data_collator),
    "AutoModelForImageTextToText": Task(_answered_about_pictures, lambda _: default_data_collator, **_SEQ2SEQ),
    "AutoModelForTimeSeriesPrediction": Task(_series, lambda _: default_data_collator),
}
