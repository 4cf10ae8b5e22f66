"""Documents, their split, and blocks that score every token once. Run: pytest tests/test_text_data.py"""

import json

import numpy as np
import pytest
import torch
from datasets import Dataset
from load_script import load_script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerState


block_draws = load_script("block_draws")
text_sources = load_script("text_sources")
text_data = load_script("text_data")

TEXT = "Grüße, 世界 🙂!\nfor x in range(10):\n\tprint(x)</s><pad>\r\n" * 9


@pytest.fixture(scope="module")
def byte_tokenizer():
    return text_data.load_tokenizer(None, objective="causal")


@pytest.fixture(scope="module")
def pair_tokenizer():
    """A byte-level BPE tokenizer with merges, so that tokens are not bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("r", "a"), ("i", "n"), ("p", "r"), ("n", "g"), ("ra", "ng"), ("Ã", "¼")]
    words = ["<end>", *alphabet, *("".join(pair) for pair in pairs)]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def documents(*texts):
    return Dataset.from_dict({"name": [str(i) for i in range(len(texts))], "text": list(texts)})


# Sources


def test_standard_library_is_sorted_unique_and_without_tests():
    found = text_sources.standard_library_documents()
    names = [name for name, _ in found]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert len({text for _, text in found}) == len(found)


def test_default_split_is_by_file_and_the_same_every_time():
    first, second = text_sources.load_splits(), text_sources.load_splits()
    train, validation = set(first.train["name"]), set(first.validation["name"])
    assert not train & validation
    assert 0.02 < len(validation) / (len(train) + len(validation)) < 0.09
    assert list(first.validation["text"]) == list(second.validation["text"])


def test_adding_a_file_moves_no_other():
    names = [f"file{index}.txt" for index in range(200)]
    few, more = ([(name, name) for name in chosen] for chosen in (names[:150], names))
    held_out = [set(text_sources.split_by_name(chosen, 10)[1]["name"]) for chosen in (few, more)]
    assert held_out[0] == held_out[1] & set(names[:150])
    assert held_out[0]


@pytest.mark.parametrize("percentage", [0.01, 50, 99.99])
@pytest.mark.parametrize("count", [2, 3])
def test_both_sides_of_a_split_hold_something(count, percentage):
    train, validation = text_sources.split_by_name([(str(i), "text") for i in range(count)], percentage)
    assert len(train) and len(validation) and len(train) + len(validation) == count


def test_text_file_keeps_every_character_and_holds_out_its_tail(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_bytes((TEXT * 10).encode())
    splits = text_sources.load_splits(train_file=str(path), validation_split_percentage=20)
    assert splits.train["text"][0] + splits.validation["text"][0] == TEXT * 10
    assert splits.train["text"][0].endswith("\n")


@pytest.mark.parametrize("kind", ["jsonl", "csv", "saved", "folder of a dataset"])
def test_tables_and_datasets(tmp_path, kind):
    rows = {"id": list(range(40)), "body": [f"line {index}\nmore, of it" for index in range(39)] + [""]}
    path = tmp_path / "data"
    if kind == "saved":
        Dataset.from_dict(rows).save_to_disk(path)
        arguments = {"dataset_name": str(path)}
    elif kind == "folder of a dataset":
        path.mkdir()
        for split, part in (("train", slice(0, 30)), ("validation", slice(30, 40))):
            lines = [json.dumps({"body": text}) for text in rows["body"][part]]
            (path / f"{split}.jsonl").write_text("\n".join(lines))
        arguments = {"dataset_name": str(path)}
    else:
        path = path.with_suffix(f".{kind}")
        writer = {"jsonl": Dataset.to_json, "csv": Dataset.to_csv}[kind]
        writer(Dataset.from_dict(rows), path)
        arguments = {"train_file": str(path)}
    splits = text_sources.load_splits(**arguments, text_column_name="body", validation_split_percentage=10)
    texts = sorted([*splits.train["text"], *splits.validation["text"]])
    assert texts == sorted(rows["body"][:39])  # all rows, none twice, the empty one left out
    assert len(splits.validation) == (9 if kind == "folder of a dataset" else 4)
    with pytest.raises(ValueError, match="text_column_name.*'text'.*'body'"):
        text_sources.load_splits(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train_file": "a.txt", "text_folder": "b"}, "at most one of .* got --train_file and --text_folder"),
        ({"validation_file": "a.txt"}, "--validation_file needs a --train_file"),
        ({"dataset_config_name": "x"}, "--dataset_config_name needs a --dataset_name"),
        ({"train_file": "/nowhere/a.txt"}, "--train_file must be an existing file, got '/nowhere/a.txt'"),
        ({"text_folder": "/nowhere"}, "--text_folder must be an existing folder, got '/nowhere'"),
        ({"validation_split_percentage": 100}, "between 0 and 100, got 100"),
    ],
)
def test_sources_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        text_sources.load_splits(**arguments)


def test_files_that_are_no_text(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"ok\xe9")
    with pytest.raises(ValueError, match="latin.txt must be UTF-8 text, got byte 0xe9 at offset 2"):
        text_sources.load_splits(text_folder=str(tmp_path))
    (tmp_path / "latin.txt").write_bytes(b"")
    with pytest.raises(ValueError, match="at least one document"):
        text_sources.load_splits(text_folder=str(tmp_path))
    with pytest.raises(ValueError, match="--train_file must hold text|at least one document"):
        text_sources.load_splits(train_file=str(tmp_path / "latin.txt"))


# Tokens


def test_bytes_are_bytes_even_where_the_text_spells_a_special_token(byte_tokenizer):
    ids = text_data.tokenize_text(byte_tokenizer, TEXT)
    assert ids == [byte + 3 for byte in TEXT.encode()]
    parsed = text_data.tokenize_text(byte_tokenizer, TEXT, parse_special_tokens=True)
    assert parsed.count(byte_tokenizer.eos_token_id) == 9


def test_first_tokens_are_those_of_the_whole_text(byte_tokenizer):
    text = "naïve words, and " * 40
    whole = text_data.tokenize_text(byte_tokenizer, text)
    for count in (1, 5, 100, len(whole), len(whole) + 9):
        assert text_data.first_tokens(byte_tokenizer, text, count) == whole[:count]


@pytest.mark.parametrize("text", ["", "short", "a\n" * 50, "x" * 95, "line\n" + "y" * 40, "é🙂" * 40])
def test_pieces_join_to_the_text(text):
    pieces = text_data.pieces_of(text, limit=10)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 10


def test_tokenized_documents_end_with_a_separator(byte_tokenizer):
    tokenized = text_data.tokenize_documents(documents("ab", "é"), byte_tokenizer)
    assert tokenized["input_ids"][:] == [[100, 101, 1], [198, 172, 1]]
    assert tokenized["text_bytes"][:] == [2, 2]
    assert text_data.token_stream(tokenized).tolist() == [100, 101, 1, 198, 172, 1]


def test_documents_far_behind_the_tokens_that_are_needed_are_left_alone(byte_tokenizer):
    texts = ["ab" * (row % 3) for row in range(100)]
    stream = text_data.token_stream(text_data.tokenize_documents(documents(*texts), byte_tokenizer)).tolist()
    unreadable = documents(*texts, None)
    for tokens in (1, 40, 41, len(stream) // 3):
        first = text_data.tokenize_first_documents(unreadable, byte_tokenizer, tokens)
        found = text_data.token_stream(first).tolist()
        assert found == stream[: len(found)] and tokens <= len(found) < len(stream)
    for tokens in (len(stream) + 1, None):
        with pytest.raises(TypeError):
            text_data.tokenize_first_documents(unreadable, byte_tokenizer, tokens)
        assert len(text_data.tokenize_first_documents(documents(*texts), byte_tokenizer, tokens)) == len(texts)


# Blocks


@pytest.mark.parametrize("length", [1, 2, 5, 6, 7, 8, 31, 32, 33, 100])
@pytest.mark.parametrize(("block", "stride"), [(8, 7), (8, 8), (2, 1), (33, 32)])
def test_windows_score_every_token_once(length, block, stride):
    stream = np.arange(length) + 5
    windows, scored = text_data.scored_windows(stream, block, stride)
    context = block - stride
    assert sorted(windows[scored]) == sorted(stream[context:])
    assert windows.shape[1] == min(block, length)
    assert not context or not scored[:, 0].any()  # in a causal block the first token has no prediction
    for row in windows:
        assert (np.diff(row) == 1).all()


def test_training_blocks_are_the_stream(byte_tokenizer):
    tokenized = text_data.tokenize_documents(documents(TEXT, "and", TEXT), byte_tokenizer)
    stream = text_data.token_stream(tokenized)
    blocks = text_data.pack_for_training(tokenized, 32)
    assert len(blocks) == len(stream) // 32
    assert (
        np.concatenate([block["input_ids"].numpy() for block in blocks]).tolist()
        == stream[: 32 * len(blocks)].tolist()
    )
    assert len(text_data.pack_for_training(tokenized, 32, max_samples=3)) == 3
    with pytest.raises(
        ValueError, match="--block_size must be at most the .* tokens of the training text, got 100000"
    ):
        text_data.pack_for_training(tokenized, 100000)


@pytest.mark.parametrize("which", ["byte_tokenizer", "pair_tokenizer"])
@pytest.mark.parametrize("max_samples", [None, 1, 2, 5])
def test_evaluation_counts_the_bytes_it_scores(which, max_samples, request):
    tokenizer = request.getfixturevalue(which)
    texts = ["kurz", TEXT, "日本語" * 20]
    evaluation = text_data.pack_for_evaluation(
        documents(*texts), tokenizer, 64, objective="causal", max_samples=max_samples
    )
    separator = text_data.separator_token_id(tokenizer)
    scored = np.concatenate(
        [row["labels"][row["labels"] != text_data.IGNORED_LABEL].numpy() for row in evaluation.blocks]
    )
    assert len(scored) == evaluation.scored_tokens
    scored_texts = [
        tokenizer.decode(part.tolist()) for part in np.split(scored, np.flatnonzero(scored == separator) + 1)[:-1]
    ]
    end = tokenizer.decode([separator])
    scored_texts = [text.removesuffix(end) for text in scored_texts]
    assert sum(len(text.encode()) for text in scored_texts) == evaluation.text_bytes
    for text, whole in zip(scored_texts, texts, strict=False):
        assert whole.startswith(text)
    if max_samples is None:
        assert scored_texts == texts
    else:
        assert len(evaluation.blocks) <= max_samples
        assert evaluation.scored_tokens > (max_samples - 1) * 63  # the limit is used, not just kept


def test_masked_evaluation_is_drawn_once(byte_tokenizer):
    tokenizer = text_data.load_tokenizer(None, objective="masked")
    options = {"objective": "masked", "mlm_probability": 0.3}
    first, second = (text_data.pack_for_evaluation(documents(TEXT, TEXT), tokenizer, 50, **options) for _ in range(2))
    stream = text_data.token_stream(text_data.tokenize_documents(documents(TEXT, TEXT), tokenizer))
    windows, new = text_data.scored_windows(stream, 50, 50)
    for ours, again, whole, fresh in zip(first.blocks, second.blocks, windows, new, strict=True):
        assert ours["input_ids"].tolist() == again["input_ids"].tolist()
        asked = ours["labels"].numpy() != text_data.IGNORED_LABEL
        assert (ours["labels"].numpy()[asked] == whole[asked]).all()
        assert not asked[~fresh].any() and not asked[whole == tokenizer.eos_token_id].any()
        assert (ours["input_ids"].numpy()[~asked] == whole[~asked]).all()
    assert abs(first.scored_tokens / len(stream) - 0.3) < 0.1
    assert tokenizer.mask_token_id == 259


def test_collator_labels_every_token_even_where_padding_is_the_separator(pair_tokenizer):
    collate = text_data.BlockCollator(pair_tokenizer, "causal")
    tokenized = text_data.tokenize_documents(documents("ab", "cd", "ef"), pair_tokenizer)
    batch = collate([text_data.pack_for_training(tokenized, 4)[index] for index in range(2)])
    assert batch["labels"].tolist() == batch["input_ids"].tolist()
    assert (batch["labels"] == pair_tokenizer.eos_token_id).any()


def test_masks_are_the_blocks_own():
    """The same in any batch, whatever torch's generator says; others in another epoch and by another seed."""
    tokenizer = text_data.load_tokenizer(None, objective="masked")
    blocks = [{"input_ids": torch.arange(3, 203)}, {"input_ids": torch.arange(4, 204)}, {"input_ids": torch.ones(200)}]
    blocks[2]["input_ids"] = blocks[2]["input_ids"].long()  # separators alone: nothing to ask

    def collate(blocks, seed=0, epoch=0):
        draws = block_draws.BlockDraws(seed)
        block_draws.NewDrawsEachEpoch(draws).on_epoch_begin(None, TrainerState(epoch=epoch), None)
        return text_data.BlockCollator(tokenizer, "masked", 0.3, draws)(blocks)

    batch, turned = collate(blocks), collate(blocks[::-1])
    for name in ("input_ids", "labels"):
        assert torch.equal(batch[name], turned[name].flip(0))
        for other in ({"seed": 1}, {"epoch": 1}):
            assert not torch.equal(batch[name], collate(blocks, **other)[name])
        assert torch.equal(batch[name], collate(blocks, epoch=0.999)[name])  # resumed within the epoch
    asked = batch["labels"] != text_data.IGNORED_LABEL
    assert 0.2 < asked[:2].float().mean() < 0.4 and not asked[2].any()
    assert torch.equal(batch["labels"][asked], torch.stack([block["input_ids"] for block in blocks])[asked])
    assert blocks[0]["input_ids"].tolist() == list(range(3, 203))


def test_tokenizers_that_cannot_serve(pair_tokenizer, tmp_path):
    pair_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="--objective masked needs a tokenizer with a mask token"):
        text_data.load_tokenizer(str(tmp_path), objective="masked")
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(ValueError, match="must have an eos, sep or bos token"):
        text_data.separator_token_id(bare)
