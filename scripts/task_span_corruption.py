"""Pretraining of an encoder–decoder: it writes what was cut out of a text (T5's objective, or UL2's mixture)."""

from dataclasses import dataclass, field

import torch
from datasets import Dataset
from span_corruption import UL2_DENOISERS, Denoiser, SpanCorruptionCollator, SpanCorruptor
from task_language_model import LanguageModel
from text_data import EVALUATION_SEED, EvaluationBlocks, limit_documents, token_stream, tokenize_documents
from train_arguments import TextArguments
from training_model import set_decoder_start
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerBase


@dataclass
class SpanCorruptionArguments:
    """Of span corruption alone."""

    denoising: str = field(
        default="t5",
        metadata={
            "help": "t5: one denoiser, by the next two arguments; ul2: UL2's seven, with their modes in front.",
            "choices": ["t5", "ul2"],
        },
    )
    noise_density: float = field(default=0.15, metadata={"help": "Share of the tokens that t5 hides."})
    mean_noise_span_length: float = field(
        default=3.0,
        metadata={
            "help": "Mean length of what t5 hides in one place, in subwords (a byte tokenizer: 20 bytes for 3)."
        },
    )

    def __post_init__(self):
        if not 0 < self.noise_density < 1:
            raise ValueError(f"--noise_density must lie between 0 and 1, got {self.noise_density}")
        if self.mean_noise_span_length < 1:
            raise ValueError(f"--mean_noise_span_length must be at least 1, got {self.mean_noise_span_length}")
        if self.denoising == "ul2" and (self.noise_density, self.mean_noise_span_length) != (0.15, 3.0):
            raise ValueError("--noise_density and --mean_noise_span_length belong to --denoising t5, got ul2")

    def denoisers(self) -> tuple[Denoiser, ...]:
        if self.denoising == "ul2":
            return UL2_DENOISERS
        return (Denoiser(self.noise_density, self.mean_noise_span_length),)


class SpanCorruption(LanguageModel):
    """Held out: every block once, with holes drawn from a fixed seed; bits per hidden byte (or token), in which the
    sentinels and ends of the targets are paid for too."""

    objective = "span_corruption"
    encoder_decoder = True
    auto_class = AutoModelForSeq2SeqLM
    head_suffixes = ("ForConditionalGeneration",)
    argument_classes = (TextArguments, SpanCorruptionArguments)
    pipeline_tag = "text2text-generation"

    def load_processor(self):
        tokenizer = super().load_processor()
        denoisers = self.arguments.of(SpanCorruptionArguments).denoisers()
        self.corruptor = SpanCorruptor(tokenizer, denoisers)
        return tokenizer

    def prepare_model(self, model, processor):
        super().prepare_model(model, processor)
        set_decoder_start(model, processor)

    def collator(self, processor):
        return SpanCorruptionCollator(processor, self.corruptor, self.draws)

    def pack_held_out(self, documents, processor, max_samples, options):
        return pack_held_out_spans(
            documents, processor, self.corruptor, self.block_size, max_samples=max_samples, **options
        )


def pack_held_out_spans(
    documents: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    corruptor: SpanCorruptor,
    block_size: int,
    *,
    max_samples: int | None = None,
    parse_special_tokens: bool = False,
    num_proc: int | None = None,
) -> EvaluationBlocks:
    """Every block of the documents once (the last one is shorter), with holes drawn from a fixed seed."""
    if max_samples is not None:
        documents = limit_documents(
            documents, tokenizer, max_samples * block_size, parse_special_tokens=parse_special_tokens
        )
    tokenized = tokenize_documents(documents, tokenizer, parse_special_tokens=parse_special_tokens, num_proc=num_proc)
    stream = torch.from_numpy(token_stream(tokenized)).long()
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    rows, hidden = [], 0
    for block in stream.split(block_size):
        if len(block) > 1:
            inputs, target, count = corruptor(block, generator)
            rows.append({"input_ids": inputs.tolist(), "labels": target.tolist()})
            hidden += count
    return EvaluationBlocks(
        blocks=Dataset.from_list(rows).with_format("torch"),
        scored_tokens=sum(len(row["labels"]) for row in rows),
        text_bytes=sum(tokenized["text_bytes"]),
        hidden_tokens=hidden,
    )
