"""scripts/train.py with encoder–decoders: span corruption, pairs of texts, ROUGE.

Run: pytest tests/test_sequence_to_sequence.py
"""

import json
import shutil

import numpy as np
import pytest
import torch
from load_script import load_script
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, ByT5Tokenizer, EvalPrediction


train = load_script("train")
docstring_baselines = load_script("docstring_baselines")
docstring_pairs = load_script("docstring_pairs")
pair_sources = load_script("pair_sources")
rouge_metrics = load_script("rouge_metrics")
text_sources = load_script("text_sources")

TINY = {
    "colt5": "hidden_size=32,num_hidden_layers=1,num_attention_heads=4,head_dim=8,intermediate_size=32,"
    "light_attention_radius=7,dropout_rate=0.0",
    "t5": "d_model=32,num_layers=1,num_heads=2,d_kv=16,d_ff=32,feed_forward_proj=gated-gelu,dropout_rate=0.0",
}


def command(kind, output, *more, steps):
    """A short command line; later words win over earlier ones."""
    return [
        *("--model_type", kind, "--config_overrides", TINY[kind], "--output_dir", str(output), "--do_train"),
        *("--max_steps", str(steps), "--per_device_train_batch_size", "8", "--learning_rate", "1e-2"),
        *("--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true", "--logging_steps", "10"),
        *map(str, more),
    ]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in text_sources.standard_library_documents()[:12]:
        path = folder / name.replace("/", "_")
        path.write_text(text[:4000], encoding="utf-8")
    return str(folder)


def logged(folder, name):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry[name] for entry in history if name in entry]


@pytest.mark.parametrize(("kind", "denoising"), [("colt5", "t5"), ("colt5", "ul2"), ("t5", "t5")])
def test_span_corruption_lowers_bits_per_hidden_byte(kind, denoising, corpus, tmp_path):
    words = ("--objective", "span_corruption", "--denoising", denoising, "--text_folder", corpus)
    metrics = train.main(
        command(kind, tmp_path, *words, "--block_size", 96, "--do_eval", "--eval_on_start", "true", steps=40)
        + ["--validation_split_percentage", "20", "--matrix_learning_rate", "1e-2"]
    )
    start, end = logged(tmp_path, "eval_bits_per_hidden_byte")[0], metrics["eval_bits_per_hidden_byte"]
    assert end < 0.75 * start
    assert metrics["eval_target_tokens"] > metrics["eval_hidden_bytes"] > 500
    model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    assert model.config.decoder_start_token_id == tokenizer.pad_token_id == 0
    assert model.config.vocab_size == len(tokenizer) == 384
    again = train.main(  # the same holes again, in other batches
        [*("--model_name_or_path", str(tmp_path), "--output_dir", str(tmp_path / "again"), "--do_eval"), *words]
        + [*("--block_size", "96", "--validation_split_percentage", "20", "--per_device_eval_batch_size", "3")]
        + ["--report_to", "none", "--use_cpu", "true"]
    )
    assert again["eval_bits_per_hidden_byte"] == pytest.approx(end, rel=1e-5)


def test_a_resumed_span_corruption_is_the_uninterrupted_one(corpus, tmp_path):
    words = ("--text_folder", corpus, "--block_size", 64, "--save_steps", 3, "--matrix_learning_rate", "1e-2")
    lines = {name: command("colt5", tmp_path / name, *words, steps=6) for name in ("whole", "parts")}
    for line in lines.values():
        train.main(line)  # the first objective that an encoder-decoder has a head for
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    (tmp_path / "parts" / "model.safetensors").unlink()
    train.main([*lines["parts"], "--resume_from_checkpoint", "True"])
    whole, parts = (load_file(tmp_path / name / "model.safetensors") for name in lines)
    assert all(torch.equal(tensor, parts[name]) for name, tensor in whole.items())


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """What to write depends on one word, which stands anywhere."""
    random = np.random.default_rng(0)
    rows = []
    for _ in range(96):
        kind = int(random.integers(2))
        words = random.choice(["one", "two", "three", "four"], size=12).tolist()
        words.insert(int(random.integers(12)), ("RIGHT", "LEFT")[kind])
        rows.append({"text": " ".join(words), "summary": ("turn right", "go left")[kind]})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_pairs_are_learned_and_generated(pairs, tmp_path):
    words = ("--objective", "sequence_to_sequence", "--train_file", pairs, "--source_column", "text")
    metrics = train.main(
        command("colt5", tmp_path, *words, "--target_column", "summary", "--max_source_length", 80, steps=150)
        + [
            *(
                "--max_target_length",
                "16",
                "--do_eval",
                "--validation_split_percentage",
                "20",
                "--learning_rate",
                "3e-3",
            )
        ]
        + [*("--matrix_learning_rate", "1e-2", "--predict_with_generate", "true", "--generation_num_beams", "2")]
    )
    assert metrics["eval_exact_match"] == metrics["eval_rougeL"] == 100
    assert metrics["eval_gen_len"] == pytest.approx(9, abs=2)  # "turn right" and "go left", with their ends
    rows = [json.loads(line) for line in (tmp_path / "generated_predictions.jsonl").read_text().splitlines()]
    assert len(rows) == 19 and {row["prediction"] for row in rows} == {"turn right", "go left"}
    assert all(("RIGHT" in row["source"]) == (row["prediction"] == "turn right") for row in rows)
    assert "rouge" in (tmp_path / "README.md").read_text().lower()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--model_type t5 --objective causal",
            "'t5' has a head for \\(\\['span_corruption', 'sequence_to_sequence'\\]",
        ),
        ("--model_type wav2vec2", "got the architecture 'wav2vec2' with a head for none"),
        (
            "--model_type t5 --mlm_probability 0.2",
            "--mlm_probability belongs to --objective masked, got it with .*span",
        ),
        ("--model_type t5 --noise_density 1.5", "--noise_density must lie between 0 and 1, got 1.5"),
        ("--model_type t5 --mean_noise_span_length 0.5", "--mean_noise_span_length must be at least 1, got 0.5"),
        ("--model_type t5 --denoising ul2 --noise_density 0.3", "belong to --denoising t5, got ul2"),
        (
            "--model_type gpt2 --denoising ul2",
            "--denoising belongs to --objective span_corruption, got it with .*causal",
        ),
        ("--model_type t5 --max_source_length 9", "belongs to --objective sequence_to_sequence, got it with .*span"),
        ("--model_type t5 --objective sequence_to_sequence --max_target_length 1", "must be at least 2, got 1"),
        ("--model_type t5 --objective sequence_to_sequence --block_size 64", "--block_size belongs to --objective"),
        ("--model_type t5 --matrix_learning_rate 0", "--matrix_learning_rate must be above 0, got 0.0"),
        ("--model_type bart --objective sequence_to_sequence --max_source_length 2000", "of 1024, got 2000 and 128"),
    ],
)
def test_refusals(arguments, message, tmp_path):
    words = [*arguments.split(), "--do_train", "--output_dir", str(tmp_path / "out"), "--report_to", "none"]
    with pytest.raises(ValueError, match=message):
        train.main([*words, "--use_cpu", "true"])
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_pairs_from_tables_and_their_refusals(pairs, tmp_path):
    load = pair_sources.load_pair_splits
    columns = {"source_column": "text", "target_column": "summary"}
    splits = load(train_file=str(pairs), validation_file=str(pairs), **columns)
    assert splits.train.column_names == ["source", "target"] and len(splits.validation) == 96
    half = load(train_file=str(pairs), validation_split_percentage=50, **columns)
    assert len(half.train) == len(half.validation) == 48
    with pytest.raises(ValueError, match="--source_column must be a column of pairs.jsonl, got 'source' of "):
        load(train_file=str(pairs))
    with pytest.raises(ValueError, match="must differ, got 'text' for both"):
        load(train_file=str(pairs), source_column="text", target_column="text")
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match="--train_file must be an existing file ending in .json"):
        load(train_file=str(tmp_path / "a.txt"))
    (tmp_path / "empty.jsonl").write_text(json.dumps({"source": "x", "target": ""}) + "\n")
    with pytest.raises(ValueError, match="must hold pairs with a source and a target, got none"):
        load(train_file=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match="--validation_file needs a --train_file"):
        load(validation_file=str(pairs))


MODULE = '''"""The module."""

import os


class Reader:
    @staticmethod
    def size(path):
        r"""Return the size
        of a file.

        In bytes.
        """
        return os.stat(path).st_size

    def undocumented(self):
        return 1

    async def close(self):
        "Close it."
        await self.stream.close()


def one_line(): "Not taken: it shares its line."; return 2


def empty():
    """Nothing but words."""
'''


def test_functions_and_their_docstrings():
    rows = docstring_pairs.functions_of("reader.py", MODULE)
    assert sorted(row["target"] for row in rows) == ["Close it.", "Return the size of a file."]
    size = next(row["source"] for row in rows if row["target"].startswith("Return"))
    code, rest = size.split("\n\n# The rest of reader.py:\n\n")
    assert code == "@staticmethod\ndef size(path):\n    return os.stat(path).st_size\n"
    assert "Return the size" not in size and rest.startswith('"""The module."""') and '"Close it."' in rest
    assert docstring_pairs.functions_of("broken.py", "def f(:") == []
    # A held-out docstring that training knows is no question.
    documents = [(f"{index}.py", MODULE.replace("Close it", f"Close {index % 20}")) for index in range(40)]
    train_rows, held_out = docstring_pairs.docstring_splits(documents, 25)
    assert len(train_rows) and not set(held_out["target"]) & set(train_rows["target"])
    assert not set(held_out["name"]) & set(train_rows["name"])


def test_rouge(tmp_path):
    tokenizer = ByT5Tokenizer()

    def ids(texts, pad):
        rows = [[0, *tokenizer(text)["input_ids"]] for text in texts]
        width = max(map(len, rows))
        return np.array([row + [pad] * (width - len(row)) for row in rows])

    predicted, expected = ["Return the cat.", "the cat sat"], ["Return the cat.", "the cat ran away"]
    metrics = rouge_metrics.RougeMetrics(tokenizer, ["a", "b"], tmp_path / "out.jsonl")(
        EvalPrediction(predictions=ids(predicted, 0), label_ids=ids(expected, -100))
    )
    # Two of three words, and two of four; of pairs of words one of two, and one of three.
    assert metrics["rouge1"] == pytest.approx(100 * (1 + 4 / 7) / 2)
    assert metrics["rouge2"] == pytest.approx(100 * (1 + 2 / 5) / 2)
    assert metrics["rougeL"] == pytest.approx(100 * (1 + 4 / 7) / 2)
    assert metrics["exact_match"] == 50 and metrics["gen_len"] == (16 + 12) / 2
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert first == {"source": "a", "prediction": "Return the cat.", "target": "Return the cat."}


def test_docstring_baselines():
    assert docstring_baselines.name_as_words("@x\nasync def get_eventLoop2(self):") == "get event Loop2"
    train = ["Return the name.", "Return the size.", "Return the name.", "Close."]
    found = docstring_baselines.baselines(train, ["def close_file(): ..."], ["Close the file."])
    # Two of the words of "Close the file." stand in the function's name; one in the two others.
    assert [round(scores["rouge1"], 1) for scores in found.values()] == [33.3, 33.3, 80.0]
    assert "most common ('Return the name.')" in found
