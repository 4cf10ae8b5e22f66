"""Captioning: a text about an image, measured by what `generate` writes about images that were held out."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from captioned_shapes import SIDE, captioned_shapes
from datasets import Dataset, DatasetDict, Features, Image, Value, load_dataset
from rouge_metrics import RougeMetrics
from task_image_classification import MODES
from task_sequence_to_sequence import limit_rows
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from training_model import fit_vocabulary, hub_options, parse_config_overrides
from training_task import TaskData, TrainingTask
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    GitProcessor,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    ViTImageProcessorPil,
)


GENERATED = {"train": 24_000, "held_out": 1_000}
HELD_OUT_SPLITS = ("validation", "valid", "dev", "test")


@dataclass
class CaptioningArguments:
    """Of captioning alone."""

    captioned_folder: str | None = field(
        default=None,
        metadata={"help": "Folder of images with a metadata.jsonl (file_name, text), as datasets' imagefolder reads."},
    )
    caption_column_name: str = field(default="text", metadata={"help": "Column that holds the captions."})
    captioned_image_column_name: str = field(default="image", metadata={"help": "Column that holds the images."})


class CaptionCollator:
    """Rows of "image" and "text" as a batch of `pixel_values` and `labels`, padded with -100."""

    def __init__(self, processor, mode: str):
        self.processor, self.mode = processor, mode

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokenizer = self.processor.tokenizer
        images = [row["image"].convert(self.mode) for row in rows]
        captions = [
            torch.tensor([*tokenizer(row["text"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
            for row in rows
        ]
        return {
            "pixel_values": self.processor.image_processor(images, return_tensors="pt")["pixel_values"],
            "labels": torch.nn.utils.rnn.pad_sequence(captions, batch_first=True, padding_value=-100),
        }


class Captioning(TrainingTask):
    """Writes about images: generated ones of shapes unless others are given."""

    auto_class = AutoModelForImageTextToText
    head_suffixes = ("ForImageTextToText",)
    argument_classes = (CaptioningArguments,)
    trainer_class = Seq2SeqTrainer
    pipeline_tag = "image-text-to-text"
    examples = "captioned images"

    def check(self, config):
        data, own = self.arguments.data, self.arguments.of(CaptioningArguments)
        for name in ("train_file", "validation_file"):
            if getattr(data, name) is not None:
                raise ValueError(f"--{name} is for text, got it with --objective captioning")
        if own.captioned_folder is not None and data.dataset_name is not None:
            raise ValueError("at most one of --captioned_folder and --dataset_name can be given, got both")
        self.config, self.overrides = config, parse_config_overrides(self.arguments.model.config_overrides)

    @cached_property
    def rows(self) -> tuple[Dataset, Dataset, str]:
        """Training and held-out rows of "image" and "text", and what they are."""
        data, own = self.arguments.data, self.arguments.of(CaptioningArguments)
        source = own.captioned_folder or data.dataset_name
        if source is None:
            sizes = {"train": data.max_train_samples, "held_out": data.max_eval_samples}
            train, held_out = (
                _generated(sizes[name] or count, held_out=name == "held_out", seed=seed)
                for seed, (name, count) in enumerate(GENERATED.items())
            )
            return train, held_out, "generated images of shapes (held out: one in ten of all captions)"
        if own.captioned_folder is not None:
            found = load_dataset("imagefolder", data_dir=source)
        else:
            found = load_dataset(source, data.dataset_config_name)
        names = {own.captioned_image_column_name: "image", own.caption_column_name: "text"}
        found = found if isinstance(found, DatasetDict) else DatasetDict(train=found)
        for name in names:
            if name not in found["train"].column_names:
                raise ValueError(f"{source} must have a column {name!r}, got {found['train'].column_names}")
        found = DatasetDict(
            {split: rows.select_columns(list(names)).rename_columns(names) for split, rows in found.items()}
        )
        split = next((name for name in HELD_OUT_SPLITS if name in found), None)
        if split is not None:
            return found["train"], found[split], f"{source} (held out: its {split!r} split)"
        halves = found["train"].train_test_split(test_size=data.validation_split_percentage / 100, seed=0)
        return halves["train"], halves["test"], source

    def load_processor(self):
        model = self.arguments.model
        if model.model_name_or_path is not None:
            return AutoProcessor.from_pretrained(model.model_name_or_path, **hub_options(model))
        size = self.config.image_size
        if "image_size" not in self.overrides and self.arguments.of(CaptioningArguments).captioned_folder is None:
            size = SIDE if self.arguments.data.dataset_name is None else size
        self.image_size = size
        height, width = (size, size) if isinstance(size, int) else size
        half = [0.5] * self.config.num_channels
        images = ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)
        return GitProcessor(images, word_tokenizer(self.rows[0]["text"]))

    def config_fields(self, processor):
        tokenizer = processor.tokenizer
        return {
            "is_encoder_decoder": True,
            "image_size": self.image_size,
            "vocab_size": len(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "decoder_start_token_id": tokenizer.bos_token_id,
        }

    def prepare_model(self, model, processor):
        fit_vocabulary(model, processor.tokenizer, from_checkpoint=self.arguments.model.model_name_or_path is not None)
        if model.config.num_channels not in MODES:
            raise ValueError(f"num_channels must be 1 (grey) or 3 (colours), got {model.config.num_channels}")
        if model.main_input_name != "pixel_values":
            raise ValueError("--objective captioning needs a model that reads images alone: image_fusion must be "
                             f"'cross_attention', got {model.config.image_fusion!r}")  # fmt: skip

    def load_data(self, model, processor):
        data, training = self.arguments.data, self.arguments.training
        train, held_out, description = self.rows
        held_out = limit_rows(held_out, data.max_eval_samples)
        names = [f"held-out image {index}" for index in range(len(held_out))]
        metrics = RougeMetrics(processor.tokenizer, names, Path(training.output_dir) / "generated_predictions.jsonl")
        longest = max(len(processor.tokenizer(text)["input_ids"]) for text in held_out["text"])
        model.generation_config.max_length = longest + 8
        return TaskData(
            train_dataset=limit_rows(train, data.max_train_samples) if training.do_train else None,
            eval_dataset=held_out if training.do_eval else None,
            description=description,
            data_collator=CaptionCollator(processor, MODES[model.config.num_channels]),
            compute_metrics=metrics,
        )

    def training_arguments(self):
        # The collator reads columns that no model has an argument for.
        return {"predict_with_generate": True, "remove_unused_columns": False}


def word_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A token for each word of `texts`. It puts `<s>` in front, with which a decoder begins."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    )


def _generated(count: int, *, held_out: bool, seed: int) -> Dataset:
    images, texts = zip(*captioned_shapes(count, held_out=held_out, seed=seed), strict=True)
    features = Features({"image": Image(), "text": Value("string")})
    return Dataset.from_dict({"image": list(images), "text": list(texts)}, features=features)
