"""Where text comes from: files, folders, `datasets`, or this Python's own standard library.

Every source ends as two `datasets.Dataset`s, training and validation, with one row per document and two columns:
"name" (where the document came from) and "text". Documents are never cut between the two sides, unless there is only
one: then its tail is held out.
"""

import hashlib
import os
import sysconfig
from pathlib import Path
from typing import NamedTuple

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk


TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst", ".py")
TABLE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv"}
# Test suites hold deliberately broken sources and huge literal tables; site-packages is not the standard library and
# differs from machine to machine, as do the generated _sysconfigdata files and the config-3.x-<platform> folder.
SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")


class TextSplits(NamedTuple):
    """Training and validation documents, and a sentence that says what they are."""

    train: Dataset
    validation: Dataset
    description: str


def read_document(path: Path) -> str:
    """The text of one UTF-8 file, newlines as they stand in it."""
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} must be UTF-8 text, got byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from error


def documents_dataset(documents: list[tuple[str, str]]) -> Dataset:
    """Rows (name, text) from pairs, without empty documents."""
    documents = [(name, text) for name, text in documents if text]
    return Dataset.from_dict({"name": [name for name, _ in documents], "text": [text for _, text in documents]})


def hash_fraction(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name: the same on every machine, in every run."""
    return int.from_bytes(hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest(), "big") / 2**64


def hold_out_by_name(names: list[str], percentage: float) -> set[str]:
    """The names that hash below `percentage`: adding a file never moves another one."""
    ranked = sorted(names, key=hash_fraction)
    held_out = {name for name in ranked if hash_fraction(name) < percentage / 100}
    # A handful of files may all hash to one side; each side needs at least one.
    if not held_out:
        held_out = {ranked[0]}
    elif len(held_out) == len(ranked):
        held_out.remove(ranked[-1])
    return held_out


def split_by_name(documents: list[tuple[str, str]], percentage: float) -> tuple[Dataset, Dataset]:
    """Holds out whole documents, by their names."""
    held_out = hold_out_by_name([name for name, _ in documents], percentage)
    train = [document for document in documents if document[0] not in held_out]
    validation = [document for document in documents if document[0] in held_out]
    return documents_dataset(train), documents_dataset(validation)


def split_tail(name: str, text: str, percentage: float) -> tuple[Dataset, Dataset]:
    """Holds out the end of a single document, cut after a line break where there is one near."""
    cut = len(text) - max(1, round(len(text) * percentage / 100))
    line_end = text.rfind("\n", 0, cut) + 1
    if line_end > cut / 2:
        cut = line_end
    if cut <= 0:
        raise ValueError(f"{name} must be long enough to hold out {percentage} % of it, got {len(text)} characters")
    return documents_dataset([(name, text[:cut])]), documents_dataset([(f"{name} (tail)", text[cut:])])


def split_documents(documents: list[tuple[str, str]], percentage: float, source: str) -> tuple[Dataset, Dataset]:
    documents = [(name, text) for name, text in documents if text]
    if not documents:
        raise ValueError(f"{source} must hold at least one document that is not empty, got none")
    if len(documents) == 1:
        return split_tail(*documents[0], percentage)
    return split_by_name(documents, percentage)


def standard_library_documents() -> list[tuple[str, str]]:
    """(relative path, text) of the standard library's Python sources: sorted, no tests, no text twice."""
    root = Path(sysconfig.get_path("stdlib"))
    documents, seen = [], set()
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or relative.parts[0].startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a Latin-1 source is legal Python; the rest is plenty
            continue
        digest = hashlib.blake2b(text.encode("utf-8")).digest()
        if text and digest not in seen:
            seen.add(digest)
            documents.append((relative.as_posix(), text))
    if len(documents) < 2:
        raise ValueError(
            f"the standard library's sources must stand under {root}, got {len(documents)} readable .py files: name "
            "your own text with --train_file, --text_folder or --dataset_name"
        )
    return documents


def folder_documents(folder: str) -> list[tuple[str, str]]:
    """(relative path, text) of every text file under a folder, sorted."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"--text_folder must be an existing folder, got {folder!r}")
    paths = sorted(path for path in root.rglob("*") if path.is_file() and path.suffix.lower() in TEXT_SUFFIXES)
    if not paths:
        raise ValueError(f"--text_folder must hold files ending in {', '.join(TEXT_SUFFIXES)}, got none in {folder!r}")
    return [(path.relative_to(root).as_posix(), read_document(path)) for path in paths]


def require_strings(rows: Dataset, column: str, argument: str, source: str) -> None:
    if column not in rows.column_names:
        raise ValueError(f"{argument} must be a column of {source}, got {column!r} of {rows.column_names}")
    kind = rows.features[column]
    if getattr(kind, "dtype", None) not in ("string", "large_string"):
        raise ValueError(f"column {column!r} of {source} must hold strings, got {kind}")


def keep_text(rows: Dataset, column: str, source: str) -> Dataset:
    """Reduces any dataset to name and text, without rows that hold none."""
    require_strings(rows, column, "--text_column_name", source)
    rows = rows.select_columns([column])
    if column != "text":
        rows = rows.rename_column(column, "text")
    rows = rows.filter(lambda texts: [bool(text) for text in texts], input_columns="text", batched=True)
    names = [f"{source}[{row}]" for row in range(len(rows))]
    return rows.add_column("name", names)


def read_table(path: str) -> Dataset:
    return load_dataset(TABLE_BUILDERS[Path(path).suffix.lower()], data_files=path, split="train")


def split_rows(rows: Dataset, percentage: float, source: str) -> tuple[Dataset, Dataset]:
    if len(rows) < 2:
        return split_documents([(row["name"], row["text"]) for row in rows], percentage, source)
    halves = rows.train_test_split(test_size=max(1, round(len(rows) * percentage / 100)), shuffle=True, seed=0)
    return halves["train"], halves["test"]


def from_files(train_file: str, validation_file: str | None, column: str, percentage: float) -> TextSplits:
    """One training file and perhaps a validation file: text (a document each), or json, jsonl and csv (a row each)."""

    def is_table(path: str) -> bool:
        return Path(path).suffix.lower() in TABLE_BUILDERS

    def rows_of(path: str) -> Dataset:
        if is_table(path):
            return keep_text(read_table(path), column, Path(path).name)
        return documents_dataset([(Path(path).name, read_document(Path(path)))])

    for argument, path in (("--train_file", train_file), ("--validation_file", validation_file)):
        if path is not None and not Path(path).is_file():
            raise ValueError(f"{argument} must be an existing file, got {path!r}")
    if validation_file is not None:
        splits = rows_of(train_file), rows_of(validation_file)
    else:
        splits = split_rows(rows_of(train_file), percentage, train_file)
    for argument, path, rows in zip(
        ("--train_file", "--validation_file"), (train_file, validation_file or train_file), splits, strict=True
    ):
        if not len(rows):
            raise ValueError(f"{argument} must hold text, got an empty {path!r}")
    return TextSplits(*splits, train_file)


def load_dataset_splits(name: str, configuration: str | None) -> tuple[Dataset, Dataset | None, str]:
    """Its training part, a held-out one if it has one, and what to call both.

    `name` is a name on the Hub, or a local path: one with a loader, files, or what `save_to_disk` wrote.
    """
    saved = os.path.isfile(os.path.join(name, "dataset_dict.json")) or os.path.isfile(os.path.join(name, "state.json"))
    data = load_from_disk(name) if saved else load_dataset(name, configuration)
    if not isinstance(data, DatasetDict):
        data = DatasetDict(train=data)
    if "train" not in data:
        raise ValueError(f"--dataset_name must have a 'train' split, got {sorted(data)} in {name!r}")
    held_out = next((split for split in ("validation", "valid", "dev", "test") if split in data), None)
    if held_out is None:
        return data["train"], None, name
    return data["train"], data[held_out], f"{name} (held out: its {held_out!r} split)"


def from_dataset(name: str, configuration: str | None, column: str, percentage: float) -> TextSplits:
    """The text of a dataset."""
    train, held_out, description = load_dataset_splits(name, configuration)
    train = keep_text(train, column, name)
    if held_out is not None:
        return TextSplits(train, keep_text(held_out, column, name), description)
    return TextSplits(*split_rows(train, percentage, name), description)


def check_sources(
    sources: dict[str, str | None],
    *,
    train_file: str | None,
    validation_file: str | None,
    dataset_name: str | None,
    dataset_config_name: str | None,
    percentage: float,
) -> None:
    """Refuses sources of data, by argument, that do not go together."""
    named = [argument for argument, value in sources.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"at most one of {', '.join(sources)} can be given, got {' and '.join(named)}")
    if validation_file is not None and train_file is None:
        raise ValueError("--validation_file needs a --train_file to go with, got none")
    if dataset_config_name is not None and dataset_name is None:
        raise ValueError("--dataset_config_name needs a --dataset_name to go with, got none")
    if not 0 < percentage < 100:
        raise ValueError(f"--validation_split_percentage must lie between 0 and 100, got {percentage}")


def load_splits(
    *,
    train_file: str | None = None,
    validation_file: str | None = None,
    text_folder: str | None = None,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    text_column_name: str = "text",
    validation_split_percentage: float = 5,
) -> TextSplits:
    """Training and validation documents of the one source that is named, or of the standard library if none is.

    Raises:
        ValueError: more than one source, a missing path, a file that is not UTF-8, a missing text column, no text.
    """
    check_sources(
        {"--train_file": train_file, "--text_folder": text_folder, "--dataset_name": dataset_name},
        train_file=train_file,
        validation_file=validation_file,
        dataset_name=dataset_name,
        dataset_config_name=dataset_config_name,
        percentage=validation_split_percentage,
    )
    percentage = validation_split_percentage
    if train_file is not None:
        return from_files(train_file, validation_file, text_column_name, percentage)
    if text_folder is not None:
        return TextSplits(*split_documents(folder_documents(text_folder), percentage, text_folder), text_folder)
    if dataset_name is not None:
        return from_dataset(dataset_name, dataset_config_name, text_column_name, percentage)
    documents = standard_library_documents()
    return TextSplits(*split_by_name(documents, percentage), "Python standard library sources")
