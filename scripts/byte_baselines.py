"""What simple compressors and counts reach on held-out text: the bits per byte a language model must beat.

    python scripts/byte_baselines.py                      # the standard library's sources, as train.py splits them
    python scripts/byte_baselines.py --text_folder notes

- **zlib**: the held-out documents as one deflate stream at level 9. Deflate looks back 32 KB at most, so all it can be
  given of the training text is a preset dictionary, here the training text's last 32 KB. 8 * compressed bytes / bytes.
- **bigram, trigram**: bytes predicted from the one or two before them, with counts over the whole training text and
  Witten-Bell interpolation: P(c | h) = (n(h c) + t(h) P(c | h')) / (n(h) + t(h)), where h' is h without its first
  byte, t(h) the number of different symbols seen behind h, and below the unigram every symbol is equally likely. There
  is nothing to tune. The alphabet is 256 bytes and one boundary, which ends each document and stands before the first:
  boundaries are predicted and paid for, as they are by the model these figures stand beside.
"""

import argparse
import zlib
from collections.abc import Sequence

import numpy as np
from text_sources import load_splits


BOUNDARY = 256
SYMBOLS = 257
DEFLATE_WINDOW = 1 << 15
MAX_ORDER = 3  # counts are a dense table: 257 ** 3 entries are 68 MB, one order more would be 17 GB


def symbol_stream(documents: Sequence[str]) -> np.ndarray:
    """Bytes of the documents with a boundary before the first and behind each."""
    parts = [np.array([BOUNDARY], np.int64)]
    for document in documents:
        parts += [np.frombuffer(document.encode("utf-8"), np.uint8).astype(np.int64), parts[0]]
    return np.concatenate(parts)


def byte_count(documents: Sequence[str]) -> int:
    return sum(len(document.encode("utf-8")) for document in documents)


def zlib_bits_per_byte(train: Sequence[str], held_out: Sequence[str], level: int = 9) -> float:
    """Deflate with as much of the training text as its window can hold (see the top of this file)."""
    compressor = zlib.compressobj(level=level, zdict="".join(train).encode("utf-8")[-DEFLATE_WINDOW:])
    size = sum(len(compressor.compress(document.encode("utf-8"))) for document in held_out)
    return 8 * (size + len(compressor.flush())) / byte_count(held_out)


def ngram_codes(stream: np.ndarray, order: int) -> np.ndarray:
    """Each run of `order` symbols as one number, for every position that has that many behind and at it."""
    codes = np.zeros(len(stream) - order + 1, np.int64)
    for offset in range(order):
        codes = codes * SYMBOLS + stream[offset : len(stream) - order + 1 + offset]
    return codes


def ngram_probabilities(train: np.ndarray, held_out: np.ndarray, order: int) -> np.ndarray:
    """Witten-Bell probability of every held-out symbol but the first, from the `order - 1` before it.

    The second symbol has one symbol before it only: orders it lacks the history for leave its probability as it is.
    """
    probability = np.full(len(held_out) - 1, 1 / SYMBOLS)
    for length in range(1, order + 1):
        counts = np.bincount(ngram_codes(train, length), minlength=SYMBOLS**length).astype(np.int32)
        counts = counts.reshape(-1, SYMBOLS)
        codes = ngram_codes(held_out, length)
        if length == 1:
            codes = codes[1:]  # the first boundary is given
        history, symbol = np.divmod(codes, SYMBOLS)
        seen = counts.sum(axis=1, dtype=np.int64)[history]
        different = np.count_nonzero(counts, axis=1)[history]
        shorter = probability[len(probability) - len(codes) :]
        known = seen > 0
        longer = (counts[history, symbol] + different * shorter) / np.maximum(seen + different, 1)
        probability[len(probability) - len(codes) :] = np.where(known, longer, shorter)
    return probability


def ngram_bits_per_byte(train: Sequence[str], held_out: Sequence[str], order: int) -> float:
    """Bits per byte of a bigram (`order` 2) or trigram (3) model, boundaries included.

    Raises:
        ValueError: an order that is not 1, 2 or 3, or no text.
    """
    if order not in range(1, MAX_ORDER + 1):
        raise ValueError(f"order must be between 1 and {MAX_ORDER}, got {order}")
    for name, documents in (("train", train), ("held_out", held_out)):
        if not byte_count(documents):
            raise ValueError(f"{name} must hold text, got {len(documents)} documents with no byte")
    probability = ngram_probabilities(symbol_stream(train), symbol_stream(held_out), order)
    return float(-np.log2(probability).sum() / byte_count(held_out))


def baselines(train: Sequence[str], held_out: Sequence[str]) -> dict[str, float]:
    """Bits per byte by name."""
    return {
        "zlib": zlib_bits_per_byte(train, held_out),
        "byte bigram": ngram_bits_per_byte(train, held_out, 2),
        "byte trigram": ngram_bits_per_byte(train, held_out, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for argument in ("train_file", "validation_file", "text_folder", "dataset_name", "dataset_config_name"):
        parser.add_argument(f"--{argument}")
    parser.add_argument("--text_column_name", default="text")
    parser.add_argument("--validation_split_percentage", type=float, default=5.0)
    splits = load_splits(**vars(parser.parse_args()))
    train, held_out = list(splits.train["text"]), list(splits.validation["text"])
    print(f"{splits.description}: {byte_count(train):,} bytes to learn from, {byte_count(held_out):,} held out")
    for name, value in baselines(train, held_out).items():
        print(f"{name:>14}  {value:.4f} bits per byte")


if __name__ == "__main__":
    main()
