"""Where pairs of texts come from: tables, `datasets`, or this Python's own standard library.

Every source ends as two `datasets.Dataset`s, training and validation, with the columns "source" and "target".
"""

from pathlib import Path

from datasets import Dataset
from docstring_pairs import docstring_splits
from text_sources import (
    TABLE_BUILDERS,
    TextSplits,
    check_sources,
    load_dataset_splits,
    read_table,
    require_strings,
    standard_library_documents,
)


def keep_pairs(rows: Dataset, source_column: str, target_column: str, origin: str) -> Dataset:
    """Reduces any dataset to source and target, without rows that lack one of them."""
    for argument, column in (("--source_column", source_column), ("--target_column", target_column)):
        require_strings(rows, column, argument, origin)
    if source_column == target_column:
        raise ValueError(f"--source_column and --target_column must differ, got {source_column!r} for both")
    rows = rows.select_columns([source_column, target_column])
    rows = rows.filter(lambda row: bool(row[source_column]) and bool(row[target_column]))
    if not len(rows):
        raise ValueError(f"{origin} must hold pairs with a source and a target, got none")
    return Dataset.from_dict({"source": rows[source_column], "target": rows[target_column]})


def load_pair_splits(
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    source_column: str = "source",
    target_column: str = "target",
    validation_split_percentage: float = 5,
) -> TextSplits:
    """Training and validation pairs of the one source that is named, or of the standard library if none is.

    Raises:
        ValueError: more than one source, a missing file, a file that is no table, a missing column, no pairs.
    """
    check_sources(
        {"--train_file": train_file, "--dataset_name": dataset_name},
        validation_file=validation_file,
        train_file=train_file,
        dataset_config_name=dataset_config_name,
        dataset_name=dataset_name,
        percentage=validation_split_percentage,
    )
    if train_file is None and dataset_name is None:
        train, held_out = docstring_splits(standard_library_documents(), validation_split_percentage)
        return TextSplits(train, held_out, "functions of the Python standard library and their docstrings")

    def pairs_of(argument: str, path: str) -> Dataset:
        if not Path(path).is_file() or Path(path).suffix.lower() not in TABLE_BUILDERS:
            raise ValueError(
                f"{argument} must be an existing file ending in {', '.join(TABLE_BUILDERS)}, got {path!r}"
            )
        return keep_pairs(read_table(path), source_column, target_column, Path(path).name)

    if train_file is not None:
        train, held_out, description = pairs_of("--train_file", train_file), None, train_file
        if validation_file is not None:
            held_out = pairs_of("--validation_file", validation_file)
    else:
        train, held_out, description = load_dataset_splits(dataset_name, dataset_config_name)
        train = keep_pairs(train, source_column, target_column, dataset_name)
        held_out = None if held_out is None else keep_pairs(held_out, source_column, target_column, dataset_name)
    if held_out is None:
        if len(train) < 2:
            raise ValueError(f"{description} must hold at least two pairs, one of them to be held out, got one")
        size = max(1, round(len(train) * validation_split_percentage / 100))
        halves = train.train_test_split(test_size=size, shuffle=True, seed=0)
        train, held_out = halves["train"], halves["test"]
    return TextSplits(train, held_out, description)
