"""Where labelled images come from: a folder, `datasets`, or scikit-learn's scanned digits.

Every source ends as two `datasets.Dataset`s, training and held out, with the columns "image" (a PIL image) and "label"
(a `ClassLabel`).
"""

import os
from typing import NamedTuple

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from sklearn.datasets import load_digits
from text_sources import check_sources, load_dataset_splits


# The scans are 1,797 in all; a fifth of them, 360, decides an accuracy to half a percent.
DIGITS_HELD_OUT = 0.2


class ImageSplits(NamedTuple):
    """Training and held-out images.

    Attributes:
        description: what they are, for the log and the model card.
        size: rows and columns of every image; None if they differ or are not known.
    """

    train: Dataset
    held_out: Dataset
    description: str
    size: tuple[int, int] | None = None

    @property
    def labels(self) -> list[str]:
        """Names of the classes in the order of their numbers."""
        return self.train.features["label"].names


def digits() -> ImageSplits:
    """scikit-learn's handwritten digits: 8×8 scans in 17 shades of grey, a fifth of each digit held out (seed 0)."""
    scans = load_digits()
    shades = np.round(scans.images * (255 / 16)).astype(np.uint8)
    columns = {"image": list(shades), "label": scans.target}
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    rows = Dataset.from_dict(columns, features=features)
    halves = rows.train_test_split(test_size=DIGITS_HELD_OUT, seed=0, stratify_by_column="label")
    description = "scikit-learn's digits (held out: a fifth of each digit)"
    return ImageSplits(halves["train"], halves["test"], description, shades.shape[1:])


def keep_images(rows: Dataset, image_column: str | None, label_column: str | None, source: str) -> Dataset:
    """Reduces any dataset to the columns "image" and "label", found by their kind unless they are named."""
    names = {}
    for target, wish, kind in (("image", image_column, Image), ("label", label_column, ClassLabel)):
        found = [name for name, feature in rows.features.items() if isinstance(feature, kind)]
        if wish is None and len(found) != 1:
            raise ValueError(f"--{target}_column_name must say which of {found} of {source} holds the {target}s")
        if wish is not None and wish not in found:
            raise ValueError(
                f"--{target}_column_name must be a column of {source} of the kind {kind.__name__} ({found}), got "
                f"{wish!r}"
            )
        names[wish or found[0]] = target
    rows = rows.select_columns(list(names))
    return rows.rename_columns({name: target for name, target in names.items() if name != target})


def split_labelled(rows: Dataset, percentage: float) -> tuple[Dataset, Dataset]:
    """Holds out this share of each class, always the same images; at least one image of each."""
    count = max(rows.features["label"].num_classes, round(len(rows) * percentage / 100))
    halves = rows.train_test_split(test_size=count, seed=0, stratify_by_column="label")
    return halves["train"], halves["test"]


def load_images(
    *,
    image_folder: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    validation_split_percentage: float = 5,
) -> ImageSplits:
    """Training and held-out images of the one source that is named, or scikit-learn's digits if none is.

    A folder has one folder of images for each class, or such a folder tree under each of `train` and `test`.

    Raises:
        ValueError: more than one source, no such folder, columns that cannot be told, no training images.
    """
    check_sources(
        {"--image_folder": image_folder, "--dataset_name": dataset_name},
        train_file=None,
        validation_file=None,
        dataset_name=dataset_name,
        dataset_config_name=dataset_config_name,
        percentage=validation_split_percentage,
    )
    if image_folder is None and dataset_name is None:
        return digits()
    source = image_folder or dataset_name
    if image_folder is not None and not os.path.isdir(image_folder):
        raise ValueError(f"--image_folder must be an existing folder, got {image_folder!r}")
    # A folder of images is a dataset too, with a loader that datasets chooses by what is in it.
    train, held_out, description = load_dataset_splits(source, dataset_config_name)
    train = keep_images(train, image_column_name, label_column_name, source)
    if held_out is None:
        return ImageSplits(*split_labelled(train, validation_split_percentage), description)
    held_out = keep_images(held_out, image_column_name, label_column_name, source)
    if held_out.features["label"] != train.features["label"]:
        raise ValueError(f"the held-out split of {source} must have the labels of its training split")
    return ImageSplits(train, held_out, description)
