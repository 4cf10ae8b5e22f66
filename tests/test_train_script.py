"""scripts/train.py: what it trains, what it measures, what it refuses, how it resumes.

Run: pytest tests/test_train_script.py
"""

import json
import math
import os
import shutil
import signal
import time

import pytest
import torch
from helpers import ROOT, run_warm_python, start_warm_python
from load_script import load_script
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer


train = load_script("train")
output_folder = load_script("output_folder")
text_data = load_script("text_data")
text_sources = load_script("text_sources")
training_model = load_script("training_model")

TINY = {
    "performer": "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,feature_redraw_interval=6",
    "gpt2": "n_embd=16,n_layer=1,n_head=2,n_positions=64",
    # Of 32 positions the last 16 are predicted, so held-out blocks overlap.
    "perceiver_flash": "hidden_size=16,num_latents=16,num_self_attention_layers=1,num_attention_heads=2,"
    "num_cross_attention_heads=2,num_query_attention_heads=2",
    "bert": "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32",
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A small folder of real text."""
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in text_sources.standard_library_documents()[:12]:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text[:4000], encoding="utf-8")
    return str(folder)


def command(kind, corpus, output, *more, steps=6):
    """A short command line; later words win over earlier ones."""
    return [
        *(
            "--model_type",
            kind,
            "--config_overrides",
            TINY[kind],
            "--text_folder",
            corpus,
            "--output_dir",
            str(output),
        ),
        *("--do_train", "--block_size", "32", "--max_steps", str(steps), "--per_device_train_batch_size", "4"),
        *("--learning_rate", "1e-2", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true"),
        *("--validation_split_percentage", "20", "--logging_steps", "2", *map(str, more)),
    ]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_same_weights(first, second):
    first, second = weights(first), weights(second)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# What it trains and measures


@pytest.mark.parametrize("kind", ["performer", "gpt2", "perceiver_flash"])
def test_causal_training_lowers_bits_per_byte(kind, corpus, tmp_path):
    metrics = train.main(command(kind, corpus, tmp_path, "--do_eval", "--eval_on_start", "true", steps=30))
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    start = next(entry["eval_bits_per_byte"] for entry in history if "eval_bits_per_byte" in entry)
    assert 7 < start < 12
    assert metrics["eval_bits_per_byte"] < start - 1.5
    assert metrics["eval_perplexity"] == pytest.approx(
        2 ** (metrics["eval_bits_per_byte"] * metrics["eval_text_bytes"] / metrics["eval_scored_tokens"])
    )
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("é", add_special_tokens=False)["input_ids"] == [198, 172]
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert (model.config.vocab_size, model.config.eos_token_id) == (len(tokenizer), 1)
    assert not list(tmp_path.glob("*.bin"))  # no pickle in a folder that is to be shared
    card = (tmp_path / "README.md").read_text()
    assert "trained from scratch" in card and "Bits Per Byte" in card
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["eval_bits_per_byte"] == metrics["eval_bits_per_byte"] and "train_loss" in results


def test_bits_per_byte_is_the_models_code_length(corpus, tmp_path):
    """Against a sum over single predictions, with other block and batch sizes."""
    metrics = train.main(command("gpt2", corpus, tmp_path, "--do_eval", "--per_device_eval_batch_size", 3))
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    documents = text_sources.load_splits(text_folder=corpus, validation_split_percentage=20).validation["text"]
    stream, size = [1], 0
    for text in documents:
        stream += [*(byte + 3 for byte in text.encode()), 1]
        size += len(text.encode())
    nats, done = 0.0, 1  # the first token is given
    starts = [*range(0, len(stream) - 32, 31), len(stream) - 32]
    for start in starts:
        window = torch.tensor([stream[start : start + 32]])
        with torch.no_grad():
            log_probabilities = model(window).logits[0].double().log_softmax(-1)
        for position in range(max(done - start, 1), 32):
            nats -= log_probabilities[position - 1, window[0, position]].item()
        done = start + 32
    assert metrics["eval_bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert metrics["eval_text_bytes"] == size


def test_masked_training(corpus, tmp_path):
    arguments = ("--do_eval", "--mlm_probability", "0.3", "--eval_strategy", "steps", "--eval_steps", "10")
    for kind in ("performer", "bert"):
        output = tmp_path / kind
        metrics = train.main(command(kind, corpus, output, "--objective", "masked", *arguments, steps=20))
        assert 0 < metrics["eval_bits_per_masked_byte"] < 8
        assert "eval_bits_per_byte" not in metrics and "eval_perplexity" not in metrics  # no code length of the text
        again = train.main(  # the checkpoint says that it is a masked one; the questions are the same again
            [*("--model_name_or_path", str(output), "--text_folder", corpus, "--output_dir", str(tmp_path / "again"))]
            + [*("--do_eval", "--block_size", "32", "--mlm_probability", "0.3", "--report_to", "none")]
            + [*("--validation_split_percentage", "20", "--use_cpu", "true")]
        )
        assert again["eval_bits_per_masked_byte"] == pytest.approx(metrics["eval_bits_per_masked_byte"], rel=1e-5)
        assert AutoTokenizer.from_pretrained(output).mask_token_id == 259
        assert AutoModelForMaskedLM.from_pretrained(output).config.vocab_size == 384


def test_fine_tuning_starts_where_the_checkpoint_ended(corpus, tmp_path):
    first = train.main(command("performer", corpus, tmp_path / "one", "--do_eval", steps=30))
    line = ["--model_name_or_path", tmp_path / "one", "--do_eval", "--eval_on_start", "true"]
    kept = command("performer", corpus, tmp_path / "two", steps=4)[4:]
    train.main([*map(str, line), *kept])
    history = json.loads((tmp_path / "two" / "trainer_state.json").read_text())["log_history"]
    start = next(entry["eval_bits_per_byte"] for entry in history if "eval_bits_per_byte" in entry)
    assert start == pytest.approx(first["eval_bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_arguments_from_a_file(suffix, corpus, tmp_path):
    words = command("gpt2", corpus, tmp_path / "words")
    values = {"do_train": True}
    pairs = [word for word in words if word != "--do_train"]
    values |= {name.removeprefix("--"): value for name, value in zip(pairs[::2], pairs[1::2], strict=True)}
    for name in ("block_size", "max_steps", "per_device_train_batch_size", "logging_steps"):
        values[name] = int(values[name])
    values |= {"output_dir": str(tmp_path / "file"), "learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
    values["validation_split_percentage"] = 20.0
    train.main(words)
    file = tmp_path / f"run.{suffix}"
    if suffix == "json":
        file.write_text(json.dumps(values))
    else:
        lines = (f"{name}: {json.dumps(value)}" for name, value in values.items() if name != "learning_rate")
        file.write_text("\n".join([*lines, "learning_rate: 1e-2"]))
    train.main([str(file)])
    assert_same_weights(tmp_path / "words", tmp_path / "file")
    file.write_text("[1, 2]")
    with pytest.raises(ValueError, match="must hold a mapping of argument names to values, got list"):
        train.main([str(file)])


def test_seed_decides_the_run(corpus, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train.main(command("gpt2", corpus, tmp_path / name, "--seed", seed, steps=2))
    assert_same_weights(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(*(weights(tmp_path / name)["transformer.wte.weight"] for name in ("a", "c")))


@pytest.mark.parametrize("flags", [("--bf16", "true"), ("--gradient_checkpointing", "true"), ("--dtype", "bfloat16")])
def test_trainer_flags(flags, corpus, tmp_path):
    metrics = train.main(command("performer", corpus, tmp_path, "--do_eval", *flags, steps=10))
    assert metrics["eval_bits_per_byte"] < 8


# What it refuses, before it writes anything


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model_type gpt2", "--do_train or --do_eval must be given"),
        ("--do_train", "--model_name_or_path, --model_type or --config_name must name a model"),
        ("--do_train --model_type gpt2 --model_name_or_path x", "exclude each other, got both"),
        ("--do_train --model_type gpt2 --config_name x", "exclude each other, got both"),
        ("--do_train --model_type preformer", "known to AutoConfig, got 'preformer'; near: .*performer"),
        ("--do_train --model_type gpt2 --objective masked", "'gpt2' has a head for .*got 'masked'"),
        ("--do_train --model_type bert --objective causal", "does not look ahead, got BertLMHeadModel"),
        ("--do_train --model_type gpt2 --mlm_probability 0.1", "belongs to --objective masked, got it with .* causal"),
        ("--do_train --model_type gpt2 --objective causal --mlm_probability 0.1", "belongs to --objective masked"),
        ("--do_train --model_type bert --objective masked --mlm_probability 1", "between 0 and 1, got 1.0"),
        ("--do_train --model_type gpt2 --block_size 1", "--block_size must be at least 2, got 1"),
        ("--do_train --model_type gpt2 --block_size 5000", "max_position_embeddings of 1024, got 5000"),
        ("--do_train --model_type gpt2 --max_train_samples 0", "--max_train_samples must be at least 1, got 0"),
        ("--do_train --model_type gpt2 --config_overrides n_embed=8", "got 'n_embed'; near: n_embd"),
        ("--do_train --model_type gpt2 --config_overrides n_embd", "must be name=value pairs .*got 'n_embd'"),
        (
            "--do_train --model_type gpt2 --config_overrides vocab_size=300",
            "at least the tokenizer's 384 tokens, got 300",
        ),
        ("--do_train --model_type performer --config_overrides hidden_size=7", "hidden_size must be a multiple"),
        ("--do_train --model_type gpt2 --dtype int8", "--dtype must be auto or a floating-point dtype"),
        ("--do_eval --model_type gpt2 --resume_from_checkpoint True", "got it without --do_train"),
        (
            "--do_train --model_type gpt2 --resume_from_checkpoint True --overwrite_output_dir",
            "--overwrite_output_dir and --resume_from_checkpoint exclude each other",
        ),
        ("--do_train --model_type gpt2 --resume_from_checkpoint True", "needs a whole checkpoint-\\* folder"),
        ("--do_train --model_type gpt2 --resume_from_checkpoint /nowhere", "or a checkpoint folder, got '/nowhere'"),
    ],
)
def test_refusals(arguments, message, tmp_path):
    output = tmp_path / "out"
    words = [*arguments.split(), "--output_dir", str(output), "--report_to", "none", "--use_cpu", "true"]
    with pytest.raises(ValueError, match=message):
        train.main(words)
    assert not output.exists() or not list(output.iterdir())


def test_unwritable_output_folder(corpus, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="--output_dir must be a folder that can be written"):
        train.main(command("gpt2", corpus, tmp_path / "file" / "out"))


def test_a_folder_in_use_is_left_alone_unless_told_otherwise(corpus, tmp_path):
    train.main(command("gpt2", corpus, tmp_path, steps=2))
    before = weights(tmp_path)
    with pytest.raises(ValueError, match="--output_dir must be empty or new"):
        train.main(command("gpt2", corpus, tmp_path, "--seed", 5, steps=1))
    assert all(torch.equal(before[name], tensor) for name, tensor in weights(tmp_path).items())
    train.main(command("gpt2", corpus, tmp_path, "--seed", 5, "--overwrite_output_dir", steps=1))
    assert not torch.equal(before["transformer.wte.weight"], weights(tmp_path)["transformer.wte.weight"])
    assert [path.name for path in output_folder.checkpoints_in(str(tmp_path))] == ["checkpoint-1"]


def test_broken_checkpoints(corpus, tmp_path):
    train.main(command("gpt2", corpus, tmp_path, "--save_steps", 2, steps=6))
    for name, size in (("checkpoint-6", 1000), ("checkpoint-4", 0)):
        with open(tmp_path / name / "model.safetensors", "r+b") as file:
            file.truncate(size)
    with pytest.raises(ValueError, match="must be a whole checkpoint.*lacks whole weights"):
        train.main(command("gpt2", corpus, tmp_path, "--resume_from_checkpoint", tmp_path / "checkpoint-6"))
    # Killed while saving: the state is written last. The last whole checkpoint is found behind it.
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-5")
    (tmp_path / "checkpoint-5" / "trainer_state.json").write_text('{"epoch":')
    assert output_folder.last_complete_checkpoint(str(tmp_path)) == tmp_path / "checkpoint-2"
    with pytest.raises(ValueError, match="must (hold|be) whole"):
        train.main(
            [*("--model_name_or_path", str(tmp_path / "checkpoint-6"), "--do_eval", "--use_cpu", "true")]
            + [*("--output_dir", str(tmp_path / "new"), "--report_to", "none")]
        )


def test_config_overrides_are_read_as_values():
    parse = training_model.parse_config_overrides
    assert parse("a=1,b=2.5e-1,c=true,d=False,e=null,f=relu") == {
        "a": 1, "b": 0.25, "c": True, "d": False, "e": None, "f": "relu"
    }  # fmt: skip
    assert parse('kinds=["x","y"],n=[1, 2]') == {"kinds": ["x", "y"], "n": [1, 2]}
    assert parse('{"kinds": ["x"], "n": 2}') == {"kinds": ["x"], "n": 2}
    assert parse(None) == parse(" ") == {}


def test_derived_fields_follow_overrides(corpus, tmp_path):
    train.main(command("performer", corpus, tmp_path, steps=1))
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.head_dim == 8  # not the default width's 64


# Resuming


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["performer", "gpt2"])
def test_killed_and_resumed_equals_uninterrupted(kind, corpus, tmp_path):
    """kill -9 in the middle; for Performer the features are drawn anew every 6 steps, on either side of it."""
    words = command(kind, corpus, tmp_path / "killed", "--save_steps", 4, steps=48)
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = start_warm_python(ROOT / "scripts" / "train.py", *words, environment=threads)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint-8" / "trainer_state.json").exists():
        assert process.is_running() and time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait(60)[0] == -signal.SIGKILL
    killed_at = int(output_folder.last_complete_checkpoint(str(tmp_path / "killed")).name.split("-")[1])
    assert 4 <= killed_at < 48
    train.main([*words, "--resume_from_checkpoint", "True"])
    train.main(command(kind, corpus, tmp_path / "whole", "--save_steps", 4, steps=48))
    assert_same_weights(tmp_path / "killed", tmp_path / "whole")


def test_resumed_masks_are_those_of_the_uninterrupted_run(corpus, tmp_path):
    """A mask is drawn while the model is still at the batch before, so not by what a checkpoint has the state of."""
    words = ("--objective", "masked", "--save_steps", 3)
    lines = {name: command("performer", corpus, tmp_path / name, *words) for name in ("whole", "parts")}
    for line in lines.values():
        train.main(line)
    shutil.rmtree(tmp_path / "parts" / "checkpoint-6")
    (tmp_path / "parts" / "model.safetensors").unlink()
    train.main([*lines["parts"], "--resume_from_checkpoint", "True"])
    assert_same_weights(tmp_path / "whole", tmp_path / "parts")


def test_the_library_that_compares_texts_is_not_imported_by_all():
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import train; print('rouge_score' in sys.modules)"
    )
    assert run_warm_python("-c", code, environment={"PYTHONPATH": str(ROOT)}).strip() == "False"


@pytest.mark.slow
def test_two_processes_equal_one_with_the_doubled_batch(corpus, tmp_path):
    train.main(command("performer", corpus, tmp_path / "one", "--do_eval", steps=14))
    words = command("performer", corpus, tmp_path / "two", "--do_eval", "--per_device_train_batch_size", 2, steps=14)
    # torchrun forks its workers, which saves them the imports.
    launcher = "-m torch.distributed.run --nproc_per_node 2 --standalone --run-path --start-method fork"
    run_warm_python(
        *launcher.split(),
        *(ROOT / "scripts" / "train.py", *words, "--ddp_backend", "gloo"),
        environment={"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1"},
        timeout=600,
    )
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=1e-3, atol=1e-4), name
        if "projection" in name and not tensor.is_floating_point():
            assert torch.equal(tensor, two[name])
    results = [json.loads((tmp_path / name / "all_results.json").read_text()) for name in ("one", "two")]
    assert results[0]["eval_scored_tokens"] == results[1]["eval_scored_tokens"]
    assert results[0]["eval_bits_per_byte"] == pytest.approx(results[1]["eval_bits_per_byte"], rel=1e-3)
