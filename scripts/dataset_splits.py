"""Datasets by name or path and their splits: what the sources of text and of images have in common."""

import os

from datasets import DatasetDict, load_dataset, load_from_disk


HELD_OUT_SPLITS = ("validation", "valid", "dev", "test")


def open_dataset(name: str, configuration: str | None) -> DatasetDict:
    """A dataset by its Hub name, or a local path: one with a loader, files, or what `save_to_disk` wrote.

    Raises:
        ValueError: there is no training split.
    """
    saved = os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json"))
    return with_training_split(load_from_disk(name) if saved else load_dataset(name, configuration), name)


def with_training_split(data, name: str) -> DatasetDict:
    """`data` as splits, a single one being the training split.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(data, DatasetDict):
        data = DatasetDict(train=data)
    if "train" not in data:
        raise ValueError(f"--dataset_name must have a 'train' split, got {sorted(data)} in {name!r}")
    return data


def held_out_split(data: DatasetDict) -> str | None:
    """Name of the split to measure on, if there is one."""
    return next((split for split in HELD_OUT_SPLITS if split in data), None)


def check_split_arguments(dataset_name: str | None, dataset_config_name: str | None, percentage: float) -> None:
    """What every source of data asks of the arguments.

    Raises:
        ValueError: a configuration of no dataset, or a share that is none.
    """
    if dataset_config_name is not None and dataset_name is None:
        raise ValueError("--dataset_config_name needs a --dataset_name to go with, got none")
    if not 0 < percentage < 100:
        raise ValueError(f"--validation_split_percentage must lie between 0 and 100, got {percentage}")
