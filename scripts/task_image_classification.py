"""Image classification: one label for an image, read through an image processor of transformers."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from image_sources import ImageSplits, load_images
from training_model import hub_options, parse_config_overrides
from training_task import TaskData, TrainingTask
from transformers import AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor, ViTImageProcessorPil


MODES = {1: "L", 3: "RGB"}


@dataclass
class ImageArguments:
    """Which images, and how they are read."""

    image_folder: str | None = field(
        default=None,
        metadata={"help": "Folder of images: a folder for each class, or train/ and test/ with such folders in them."},
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column that holds the images; default: the only one that does."}
    )
    label_column_name: str | None = field(
        default=None, metadata={"help": "Column that holds the classes; default: the only one that does."}
    )
    image_processor_name: str | None = field(
        default=None,
        metadata={
            "help": "Folder or Hub name; default: the checkpoint's own, else resizing to the model's image_size and "
            "scaling to [-1, 1]."
        },
    )


class ImageCollator:
    """Rows of "image" and "label" as a batch of `pixel_values` and `labels`.

    Args:
        processor: what turns PIL images into tensors of one size.
        mode: the PIL mode of the model's images, `"L"` or `"RGB"`.
        channels_last: whether the model wants `[B, H, W, C]`.
    """

    def __init__(self, processor: BaseImageProcessor, mode: str, channels_last: bool):
        self.processor, self.mode, self.channels_last = processor, mode, channels_last

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [row["image"].convert(self.mode) for row in rows]
        pixels = self.processor(images, return_tensors="pt")["pixel_values"]
        labels = torch.tensor([row["label"] for row in rows])
        return {"pixel_values": pixels.permute(0, 2, 3, 1) if self.channels_last else pixels, "labels": labels}


def predicted_classes(logits: torch.Tensor | tuple, labels: torch.Tensor) -> torch.Tensor:
    """The best class of each row, the only thing that accuracy asks of a whole evaluation."""
    return (logits[0] if isinstance(logits, tuple) else logits).argmax(dim=-1)


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float(np.mean(prediction.predictions == prediction.label_ids))}


class ImageClassification(TrainingTask):
    """One label for each image; measured by the share of held-out images whose label is found."""

    auto_class = AutoModelForImageClassification
    head_suffixes = ("ForImageClassification",)
    argument_classes = (ImageArguments,)
    pipeline_tag = "image-classification"
    examples = "images"

    def check(self, config):
        data = self.arguments.data
        for name in ("train_file", "validation_file"):
            if getattr(data, name) is not None:
                raise ValueError(f"--{name} is for text, got it with --objective image_classification")
        self.config, self.overrides = config, parse_config_overrides(self.arguments.model.config_overrides)

    @cached_property
    def splits(self) -> ImageSplits:
        data, images = self.arguments.data, self.arguments.of(ImageArguments)
        return load_images(
            image_folder=images.image_folder,
            dataset_name=data.dataset_name,
            dataset_config_name=data.dataset_config_name,
            image_column_name=images.image_column_name,
            label_column_name=images.label_column_name,
            validation_split_percentage=data.validation_split_percentage,
        )

    @property
    def image_size(self) -> tuple[int, int]:
        """Rows and columns that a new processor resizes to: what was asked for, or what the images have, or 224."""
        size = self.config.image_size
        if "image_size" not in self.overrides and self.splits.size is not None:
            size = self.splits.size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def num_channels(self) -> int:
        """Channels of a new model: what was asked for, or 1 for images without colours, or 3."""
        if "num_channels" in self.overrides:
            return self.overrides["num_channels"]
        return 1 if self.splits.train[0]["image"].mode in ("1", "L", "LA", "I", "I;16", "F") else 3

    def load_processor(self):
        model, name = self.arguments.model, self.arguments.of(ImageArguments).image_processor_name
        if model.model_name_or_path is not None or name is not None:
            return AutoImageProcessor.from_pretrained(name or model.model_name_or_path, **hub_options(model))
        height, width = self.image_size
        half = [0.5] * self.num_channels
        return ViTImageProcessorPil(size={"height": height, "width": width}, image_mean=half, image_std=half)

    def config_fields(self, processor):
        height, width = self.image_size
        return {
            "image_size": height if height == width else [height, width],
            "num_channels": self.num_channels,
            "id2label": dict(enumerate(self.splits.labels)),
            "label2id": {name: index for index, name in enumerate(self.splits.labels)},
        }

    def prepare_model(self, model, processor):
        known, found = model.config.num_labels, len(self.splits.labels)
        if known != found:
            raise ValueError(f"the model must have as many classes as the images ({found}), got {known}")
        if model.config.num_channels not in MODES:
            raise ValueError(f"num_channels must be 1 (grey) or 3 (colours), got {model.config.num_channels}")

    def load_data(self, model, processor):
        data, training, splits = self.arguments.data, self.arguments.training, self.splits
        channels_last = getattr(model.config, "channels_last", False)
        return TaskData(
            train_dataset=first(splits.train, data.max_train_samples) if training.do_train else None,
            eval_dataset=first(splits.held_out, data.max_eval_samples) if training.do_eval else None,
            description=splits.description,
            data_collator=ImageCollator(processor, MODES[model.config.num_channels], channels_last),
            compute_metrics=accuracy,
            preprocess_logits_for_metrics=predicted_classes,
        )

    def training_arguments(self):
        # The collator reads columns that no model has an argument for.
        return {"remove_unused_columns": False}


def first(rows, count: int | None):
    """The first rows, or all."""
    return rows if count is None else rows.select(range(min(count, len(rows))))
