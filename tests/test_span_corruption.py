"""Span corruption against its definition, UL2's mixture, and the tokenizer made for them.

Run: pytest tests/test_span_corruption.py
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from load_script import load_script
from transformers import AutoTokenizer, ByT5Tokenizer


block_draws = load_script("block_draws")
span_corruption = load_script("span_corruption")
train_tokenizer = load_script("train_tokenizer")

BYTES = ByT5Tokenizer()
SENTINELS = span_corruption.sentinel_ids(BYTES)


def filled(inputs, target, sentinels):
    """The text that input and target were made of: what stands behind each sentinel of the target in its place."""
    inputs, target = inputs.tolist(), target.tolist()
    assert inputs[-1] == target[-1] == BYTES.eos_token_id
    marks = [index for index, token in enumerate(target) if token in sentinels]
    parts = [target[start + 1 : stop] for start, stop in zip(marks, marks[1:], strict=False)]
    assert [target[mark] for mark in marks[:-1]] == [token for token in inputs if token in sentinels]
    assert marks[0] == 0 and marks[-1] == len(target) - 2
    text = []
    for token in inputs[:-1]:
        text += parts.pop(0) if token in sentinels else [token]
    assert not parts
    return text


def test_the_example_of_the_paper():
    """Figure 2 of arXiv 1910.10683."""
    words = ["Thank", "you", "for", "inviting", "me", "to", "your", "party", "last", "week"]
    x, y, z, end = 100, 101, 102, 1
    inputs, target = span_corruption.cut_spans(torch.arange(10) + 10, [(2, 4), (8, 9)], torch.tensor([x, y, z]), end)
    names = {x: "<X>", y: "<Y>", z: "<Z>", end: "</s>"} | {10 + index: word for index, word in enumerate(words)}
    assert " ".join(names[token] for token in inputs.tolist()) == "Thank you <X> me to your party <Y> week </s>"
    assert " ".join(names[token] for token in target.tolist()) == "<X> for inviting <Y> last <Z> </s>"


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(2, 400),
    density=st.floats(0.01, 0.99),
    mean=st.one_of(st.none(), st.floats(1, 90)),
    seed=st.integers(0, 2**30),
)
def test_spans_hide_what_they_should_and_nothing_is_lost(length, density, mean, seed):
    generator = torch.Generator().manual_seed(seed)
    spans = span_corruption.draw_spans(length, density, mean, generator)
    hidden = min(max(round(length * density), 1), length - 1)
    assert sum(stop - start for start, stop in spans) == hidden
    assert spans[0][0] >= 0 and spans[-1][1] <= length
    assert all(stop < start for (_, stop), (start, _) in zip(spans, spans[1:], strict=False))  # never touching
    expected = 1 if mean is None else min(max(round(hidden / mean), 1), hidden, length - hidden + 1)
    assert len(spans) == expected
    tokens = torch.randint(3, 259, (length,), generator=generator)
    few = torch.tensor(SENTINELS[:5])  # fewer than spans: they come again
    inputs, target = span_corruption.cut_spans(tokens, spans, few, 1)
    assert len(inputs) == length - hidden + len(spans) + 1
    assert len(target) == hidden + len(spans) + 2
    assert filled(inputs, target, few.tolist()) == tokens.tolist()


def test_spans_stand_everywhere():
    """Also at both ends, and their lengths vary around the mean."""
    generator = torch.Generator().manual_seed(0)
    hidden, sizes = torch.zeros(60), []
    for _ in range(2000):
        for start, stop in span_corruption.draw_spans(60, 0.3, 3, generator):
            hidden[start:stop] += 1
            sizes.append(stop - start)
    share = hidden / 2000
    assert share.mean().item() == pytest.approx(0.3)
    assert (share[8:-8] - 0.3).abs().max() < 0.06 and 0.1 < share[0] < 0.35 and 0.1 < share[-1] < 0.35
    assert sum(sizes) / len(sizes) == 3 and {1, 2, 3, 6} <= set(sizes)


def test_byte_spans_are_as_long_as_byt5s():
    corrupt = span_corruption.SpanCorruptor(BYTES, (span_corruption.Denoiser(0.15, 3),))
    torch.manual_seed(0)
    inputs, target, hidden = corrupt(torch.randint(3, 259, (4000,)))
    marks = sum(token in SENTINELS for token in inputs.tolist())
    assert hidden == 600 and marks == 30
    assert filled(inputs, target, SENTINELS) and len(target) == 600 + 30 + 2


def test_ul2_mixes_its_denoisers_and_says_which():
    corrupt = span_corruption.SpanCorruptor(BYTES, span_corruption.UL2_DENOISERS)
    tokens = torch.randint(3, 259, (2000,), generator=torch.Generator().manual_seed(1))
    modes, shares, generator = {}, set(), torch.Generator().manual_seed(0)
    for _ in range(140):
        inputs, target, hidden = corrupt(tokens, generator)
        mode = BYTES.decode(inputs[:3])
        modes[mode] = modes.get(mode, 0) + 1
        shares.add((mode, hidden / 2000))
        assert filled(inputs[3:], target, SENTINELS) == tokens.tolist()
        if mode == "[S]":  # the last quarter, from what stands before it
            assert inputs[3:-2].tolist() == tokens[:1500].tolist()
    assert shares == {("[R]", 0.15), ("[S]", 0.25), ("[X]", 0.15), ("[X]", 0.5)}
    assert 20 < modes["[R]"] < 60 and 8 < modes["[S]"] < 35 and 55 < modes["[X]"] < 105


def test_collator_pads_and_leaves_out_a_mask_that_says_nothing():
    corrupt = span_corruption.SpanCorruptor(BYTES, (span_corruption.Denoiser(0.15, 3),))
    draws = block_draws.BlockDraws()
    collate = span_corruption.SpanCorruptionCollator(BYTES, corrupt, draws)
    block = {"input_ids": torch.arange(3, 103)}
    batch = collate([block, {"input_ids": torch.arange(4, 104)}])
    assert set(batch) == {"input_ids", "labels"} and batch["input_ids"].shape == (2, 100 - 15 + 1 + 1)
    # The holes are the block's own, the same in any batch, and others in another epoch or by another seed.
    again = collate([{"input_ids": torch.arange(4, 104)}, block])
    assert torch.equal(batch["labels"], again["labels"].flip(0))
    assert not torch.equal(batch["labels"][0], batch["labels"][1] - 1)
    draws.epoch = 1
    other_seed = span_corruption.SpanCorruptionCollator(BYTES, corrupt, block_draws.BlockDraws(1))
    for other in (collate, other_seed):
        assert not torch.equal(batch["labels"][:1], other([block])["labels"])
    batch = collate([block, {"input_ids": torch.arange(3, 63)}])
    assert batch["attention_mask"].sum(1).tolist() == [87, 60 - 9 + 1 + 1]
    assert batch["input_ids"][1, 53:].eq(BYTES.pad_token_id).all()
    assert batch["labels"][1, 9 + 1 + 2 :].eq(-100).all()
    kept = {"input_ids": torch.tensor([5, 259, 1]), "labels": torch.tensor([259, 6, 260, 1])}
    batch = collate([kept])
    assert batch["labels"].tolist() == [[259, 6, 260, 1]] and batch["input_ids"].tolist() == [[5, 259, 1]]


def test_tokenizers_without_what_is_needed():
    bare = ByT5Tokenizer(extra_ids=0)
    with pytest.raises(ValueError, match="needs a tokenizer with the sentinels <extra_id_0>.*got ByT5Tokenizer"):
        span_corruption.SpanCorruptor(bare, (span_corruption.Denoiser(0.15, 3),))


def test_trained_tokenizer(tmp_path):
    texts = ["def encode(self, text):\n    return self.table[text]\n" * 20, "naïve café → 世界"]
    tokenizer = train_tokenizer.train_tokenizer(texts, vocab_size=400, num_sentinels=10)
    tokenizer.save_pretrained(tmp_path)
    for found in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert (found.pad_token_id, found.eos_token_id, found.unk_token_id) == (0, 1, 2)
        assert span_corruption.sentinel_ids(found) == list(range(len(found) - 10, len(found)))
        for text in (texts[0], "unseen: ∀x ∈ ℝ\t\n", "a </s> b <extra_id_3>"):
            ids = found(text, split_special_tokens=True)["input_ids"]
            assert ids[-1] == 1 and 2 not in ids and found.decode(ids[:-1]) == text
    assert len(tokenizer("def encode(self")["input_ids"]) < 10
    with pytest.raises(ValueError, match="vocab_size must be at least 359 .* got 300"):
        train_tokenizer.train_tokenizer(texts, vocab_size=300)
