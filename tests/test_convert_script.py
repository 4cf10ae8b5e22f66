"""scripts/convert.py: end to end from files to folders that the Auto classes load, and what it refuses."""

import contextlib
import io
import json
from pathlib import Path

import pytest
import torch
from helpers import ROOT, run_python, start_warm_python, subprocess_without_package
from load_script import load_script
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
    ByT5Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)


performer_pytorch = pytest.importorskip("performer_pytorch")
convert = load_script("convert")

ARGUMENTS = {"num_tokens": 31, "max_seq_len": 20, "dim": 32, "depth": 1, "heads": 4, "dim_head": 8}
BERT = {
    "vocab_size": 400,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def original(name: str = "PerformerLM", **arguments):
    with contextlib.redirect_stdout(io.StringIO()):
        return getattr(performer_pytorch, name)(**arguments).eval()


def performer_file(folder: Path, **more):
    """A state dict on disk with its arguments beside it, and the model."""
    model = original(**ARGUMENTS, **more)
    torch.save(model.state_dict(), folder / "model.pt")
    (folder / "arguments.json").write_text(json.dumps({**ARGUMENTS, **more}))
    return model, ["--input", str(folder / "model.pt"), "--arguments", str(folder / "arguments.json")]


def run(source: str, output: Path, *words):
    return convert.main(["--source", source, "--output_dir", str(output), *words])


def nothing_left(folder: Path, *kept: str) -> None:
    assert sorted(path.name for path in folder.iterdir()) == sorted(kept)


def test_performer_pytorch_from_the_command_line(tmp_path):
    """A process of its own, as a person runs it; then one without the package loads the folder."""
    model, words = performer_file(tmp_path, causal=True, local_attn_heads=2, local_window_size=4)
    output = tmp_path / "new" / "folder"
    printed = run_python(
        ROOT / "scripts/convert.py", "--source", "performer_pytorch", "--output_dir", output, *words, cwd=tmp_path
    )
    assert "PerformerLM -> PerformerForCausalLM: 19 weights mapped" in printed
    assert "a fixed table that is computed instead" in printed
    ids = torch.randint(31, (1, 12))
    expected = model(ids)
    converted = AutoModelForCausalLM.from_pretrained(output)
    assert (converted(ids).logits - expected).abs().max() <= 1e-4
    elsewhere = subprocess_without_package(
        "import sys, json, torch\nfrom transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(model(torch.tensor(json.loads(sys.argv[2]))).logits.sum().item())",
        output,
        json.dumps(ids.tolist()),
    )
    assert float(elsewhere) == pytest.approx(expected.sum().item(), abs=1e-2)
    assert output.stat().st_mode & 0o777 == tmp_path.joinpath("new").stat().st_mode & 0o777
    nothing_left(tmp_path / "new", "folder")


def test_encoder_decoder_and_nested_file(tmp_path):
    names = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in ARGUMENTS.items() if name != "dim"}
    arguments = {"dim": 32, **names, "dec_kernel_fn": "gelu", "dec_generalized_attention": True}
    model = original("PerformerEncDec", **{**arguments, "dec_kernel_fn": torch.nn.GELU()})
    torch.save({"state_dict": model.state_dict(), "step": 3}, tmp_path / "model.pt")
    words = ["--input", str(tmp_path / "model.pt"), "--arguments", json.dumps(arguments)]
    report = run("performer_pytorch", tmp_path / "out", *words)
    assert "the encoder's own head" in report.dropped["enc.to_out.weight"]
    source, target = torch.randint(31, (2, 9)), torch.randint(31, (2, 5))
    encodings = model.enc(source, return_encodings=True)
    converted = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out")
    logits = converted(source, decoder_input_ids=target, use_cache=False).logits
    assert (logits - model.dec.net(target, context=encodings)).abs().max() <= 1e-3


def test_transformers_folder_with_its_tokenizer(tmp_path, capsys):
    bert = BertForMaskedLM(BertConfig(**BERT)).eval()
    bert.save_pretrained(tmp_path / "bert")
    ByT5Tokenizer().save_pretrained(tmp_path / "bert")
    (tmp_path / "out").mkdir()
    run("transformers", tmp_path / "out", "--input", str(tmp_path / "bert"), "--layer_types", "full_attention")
    assert "tokenizer copied (ByT5Tokenizer)" in capsys.readouterr().out
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("some text", return_tensors="pt").input_ids
    converted = AutoModelForMaskedLM.from_pretrained(tmp_path / "out")
    assert (converted(ids).logits - bert(ids).logits).abs().max() <= 1e-5


def test_layers_and_features_are_chosen(tmp_path):
    LlamaForCausalLM(LlamaConfig(**BERT)).save_pretrained(tmp_path / "llama")
    words = ["--layer_types", "full_attention,linear_attention", "--config_overrides", "num_random_features=64"]
    report = run("transformers", tmp_path / "out", "--input", str(tmp_path / "llama"), *words)
    assert "no tokenizer beside the weights" in str(report)
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    assert config.layer_types == ["full_attention", "performer_state"]
    assert config.num_random_features == 64


def broken(folder: Path, name: str) -> list[str]:
    """The words of a command line with one thing wrong."""
    model, words = performer_file(folder)
    path = folder / "model.pt"
    if name == "a truncated file":
        path.write_bytes(path.read_bytes()[:-2000])
    elif name == "a whole module":
        torch.save(model, path)
    elif name == "a missing file":
        path.unlink()
    elif name == "no dict":
        torch.save(torch.zeros(2), path)
    elif name == "a weight too many":
        torch.save({**model.state_dict(), "extra.weight": torch.zeros(1)}, path)
    elif name == "other arguments":
        words[-1] = json.dumps({**ARGUMENTS, "depth": 2})
    elif name == "no JSON":
        words[-1] = "{'dim': 32}"
    elif name == "a missing arguments file":
        words[-1] = str(folder / "nowhere.json")
    elif name == "no arguments":
        words = words[:2]
    elif name == "another source's option":
        words += ["--layer_types", "full_attention"]
    return words


BROKEN = {
    "a truncated file": "must be a whole file with a state dict",
    "a whole module": "without running code",
    "a missing file": "must be a whole file with a state dict.*No such file",
    "no dict": "must hold a state dict, got a Tensor",
    "a weight too many": "no counterpart: extra.weight",
    "other arguments": "should have and has not",
    "no JSON": "--arguments must be valid JSON",
    "a missing arguments file": "--arguments must be a JSON object or a readable file",
    "no arguments": "--arguments must hold the constructor's arguments",
    "another source's option": "--layer_types belongs to --source transformers",
}


@pytest.mark.parametrize("case", BROKEN)
def test_refused_and_nothing_left(case, tmp_path):
    (tmp_path / "input").mkdir()
    words = broken(tmp_path / "input", case)
    with pytest.raises(ValueError, match=BROKEN[case]):
        run("performer_pytorch", tmp_path / "deep" / "out", *words)
    nothing_left(tmp_path, "input")


def test_refused_checkpoints_of_transformers(tmp_path):
    BertForTokenClassification(BertConfig(**BERT)).save_pretrained(tmp_path / "tokens")
    bert = BertForMaskedLM(BertConfig(**BERT))
    bert.save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    bert.bert.save_pretrained(tmp_path / "headless")
    config = json.loads((tmp_path / "headless/config.json").read_text())
    (tmp_path / "headless/config.json").write_text(json.dumps({**config, "architectures": ["BertForMaskedLM"]}))
    (tmp_path / "empty").mkdir()
    for folder, words, message in (
        ("tokens", (), "must be one of BertModel.*got BertForTokenClassification"),
        ("cut", (), "must hold whole weights"),
        ("headless", (), "must hold every weight of BertForMaskedLM.*without cls"),
        ("empty", (), "without a config.json"),
        ("headless", ("--config_overrides", "num_random_feature=3"), "near: num_random_features"),
    ):
        with pytest.raises(ValueError, match=message):
            run("transformers", tmp_path / "out", "--input", str(tmp_path / folder), *words)
        nothing_left(tmp_path, "cut", "empty", "headless", "tokens")


def test_a_folder_with_something_in_it_stays_as_it_is(tmp_path):
    _, words = performer_file(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be a new or empty folder"):
        run("performer_pytorch", tmp_path / "out", *words)
    nothing_left(tmp_path / "out", "thesis.txt")


def test_errors_are_one_line_on_the_command_line(tmp_path):
    words = ("--source", "transformers", "--input", tmp_path, "--output_dir", tmp_path / "out")
    status, _, error = start_warm_python(ROOT / "scripts/convert.py", *words).wait(60)
    assert status == 1 and error.startswith("convert.py: --input must hold a checkpoint")
    assert len(error.splitlines()) == 1
