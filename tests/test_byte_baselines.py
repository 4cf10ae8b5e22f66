"""Byte n-grams against their definition, zlib against zlib. Run: pytest tests/test_byte_baselines.py"""

import math
import zlib
from collections import Counter

import numpy as np
import pytest
from load_script import load_script


byte_baselines = load_script("byte_baselines")

TRAIN = ["the cat sat on the mat\n", "the dog säte\n" * 3, "x"]
HELD_OUT = ["the mat sat\n", "zebra ünique the the", "the"]


def bits_by_definition(order: int) -> float:
    """Witten-Bell, one symbol at a time, from counters."""

    def symbols(texts):
        stream = ["|"]
        for text in texts:
            stream += [*text.encode(), "|"]
        return stream

    train = symbols(TRAIN)
    counts = Counter(
        tuple(train[start : start + length])
        for length in range(1, order + 1)
        for start in range(len(train) - length + 1)
    )

    def probability(symbol, history):
        if history is None:
            return 1 / 257
        behind = {gram[-1]: count for gram, count in counts.items() if gram[:-1] == history}
        shorter = probability(symbol, history[1:] if history else None)
        total = sum(behind.values()) + len(behind)
        return (behind.get(symbol, 0) + len(behind) * shorter) / total if total else shorter

    stream = symbols(HELD_OUT)
    bits = 0.0
    for position in range(1, len(stream)):
        history = tuple(stream[max(0, position - order + 1) : position])
        bits -= math.log2(probability(stream[position], history))
    return bits / sum(len(text.encode()) for text in HELD_OUT)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_ngrams_match_the_definition(order):
    assert byte_baselines.ngram_bits_per_byte(TRAIN, HELD_OUT, order) == pytest.approx(
        bits_by_definition(order), rel=1e-12
    )


@pytest.mark.parametrize("order", [1, 2, 3])
def test_probabilities_sum_to_one(order):
    train = byte_baselines.symbol_stream(TRAIN)
    start = [byte_baselines.BOUNDARY, *b"th"][:order]
    held_out = np.array([[*start, symbol] for symbol in range(byte_baselines.SYMBOLS)])
    total = byte_baselines.ngram_probabilities(train, held_out.reshape(-1), order)[order - 1 :: order + 1].sum()
    assert total == pytest.approx(1, abs=1e-12)


def test_longer_histories_help_on_real_text():
    text_sources = load_script("text_sources")
    texts = [text for _, text in text_sources.standard_library_documents()[:60]]
    figures = byte_baselines.baselines(texts[10:], texts[:10])
    assert figures["byte trigram"] < figures["byte bigram"] < 8
    assert 1 < figures["zlib"] < 4
    assert figures == byte_baselines.baselines(texts[10:], texts[:10])


def test_zlib_is_one_stream_with_the_end_of_the_training_text():
    train, held_out = ["a" * 40000, "0123456789 unusual words " * 3], ["unusual words 0123456789"]
    decoder = zlib.decompressobj(zdict="".join(train).encode()[-32768:])
    compressor = zlib.compressobj(9, zdict="".join(train).encode()[-32768:])
    packed = compressor.compress(held_out[0].encode()) + compressor.flush()
    assert decoder.decompress(packed).decode() == held_out[0]
    assert byte_baselines.zlib_bits_per_byte(train, held_out) == 8 * len(packed) / 24
    assert byte_baselines.zlib_bits_per_byte([""], held_out) > 8 * len(packed) / 24


def test_what_it_refuses():
    with pytest.raises(ValueError, match="order must be between 1 and 3, got 4"):
        byte_baselines.ngram_bits_per_byte(TRAIN, HELD_OUT, 4)
    with pytest.raises(ValueError, match="held_out must hold text"):
        byte_baselines.ngram_bits_per_byte(TRAIN, [""], 2)
