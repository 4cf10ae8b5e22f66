"""scripts/generate.py: prompts, streaming, what it refuses. Run: pytest tests/test_generate_script.py"""

import io

import pytest
import torch
from load_script import load_script
from transformers import BertConfig, BertForMaskedLM, ByT5Tokenizer

import hf_efficient


byte_streamer = load_script("byte_streamer")
generate = load_script("generate")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    torch.manual_seed(0)
    config = hf_efficient.PerformerConfig(
        vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, pad_token_id=0, eos_token_id=1
    )
    hf_efficient.PerformerForCausalLM(config).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return str(folder)


def run(checkpoint, *words):
    return generate.main(["--model_name_or_path", checkpoint, "--max_new_tokens", "12", "--device", "cpu", *words])


def test_streams_prompt_and_text(checkpoint, capsys):
    text = run(checkpoint, "--prompt", "grüße ", "--seed", "3")
    shown = capsys.readouterr()
    assert shown.out.startswith("grüße ")
    printable = "".join(character for character in shown.out if character != "�")
    assert text.strip() in printable.removeprefix("grüße ")
    assert "12 tokens" in shown.err
    assert run(checkpoint, "--prompt", "grüße ", "--seed", "3") == text
    assert run(checkpoint, "--prompt", "grüße ", "--seed", "4") != text


def test_prompts_from_elsewhere(checkpoint, tmp_path, monkeypatch, capsys):
    greedy = ("--temperature", "0")
    wanted = run(checkpoint, "--prompt", "def f(", *greedy)
    (tmp_path / "prompt.txt").write_text("def f(", encoding="utf-8")
    assert run(checkpoint, "--prompt_file", str(tmp_path / "prompt.txt"), *greedy) == wanted
    monkeypatch.setattr("sys.stdin", io.StringIO("def f("))
    assert run(checkpoint, *greedy) == wanted
    run(checkpoint, "--prompt", "")  # starts a document
    run(checkpoint, "--prompt", "x", "--num_beams", "2")
    assert "x" in capsys.readouterr().out


def test_prompt_is_not_taken_for_a_whole_document(checkpoint):
    ids = generate.prompt_ids(ByT5Tokenizer(), "ab</s>", torch.device("cpu"))
    assert ids.tolist() == [[100, 101, *(byte + 3 for byte in b"</s>")]]
    assert generate.prompt_ids(ByT5Tokenizer(), "", torch.device("cpu")).tolist() == [[1]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompt", "a", "--prompt_file", "b"], "--prompt and --prompt_file exclude each other"),
        (["--prompt_file", "/nowhere"], "--prompt_file must be a readable UTF-8 file, got '/nowhere'"),
        (["--prompt", "a", "--max_new_tokens", "0"], "--max_new_tokens must be at least 1, got 0"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature must be at least 0, got -1"),
        (["--prompt", "a", "--top_p", "0"], "--top_p must be above 0 and at most 1, got 0"),
        (["--prompt", "a", "--dtype", "float"], None),
        (["--prompt", "a", "--dtype", "flat"], "--dtype must be auto or a torch dtype, got 'flat'"),
        (["--prompt", "a", "--device", "warp"], "--device must be one that torch can use here, got 'warp'"),
    ],
)
def test_refusals(checkpoint, words, message):
    if message is None:
        run(checkpoint, *words)
        return
    with pytest.raises(ValueError, match=message):
        run(checkpoint, *words)


def test_checkpoints_that_cannot_continue_text(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="must hold a checkpoint, got the folder .* without a config.json"):
        run(str(tmp_path), "--prompt", "a")
    BertForMaskedLM(
        BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=384)
    ).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be a causal language model, got BertForMaskedLM"):
        run(str(tmp_path), "--prompt", "a")


def test_truncated_weights(checkpoint, tmp_path):
    config = hf_efficient.PerformerConfig(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    hf_efficient.PerformerForCausalLM(config).save_pretrained(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as file:
        file.truncate(500)
    with pytest.raises(ValueError, match="must (hold|be) whole"):
        run(str(tmp_path), "--prompt", "a")


@pytest.mark.parametrize("text", ["plain", "é", "日本\n語", "🙂🙂", "a�b"])
def test_byte_streamer_prints_characters_when_they_are_complete(text, monkeypatch):
    shown = []
    streamer = byte_streamer.ByteStreamer(ByT5Tokenizer())
    monkeypatch.setattr(streamer, "on_finalized_text", lambda text, stream_end=False: shown.append(text))
    for byte in text.encode():
        streamer.put(torch.tensor([byte + 3]))
    streamer.put(torch.tensor([1]))
    assert shown == list(text)
    streamer.put(torch.tensor([0xC3 + 3]))  # the text ends inside a character
    streamer.end()
    assert shown[-1] == "�"


def test_byte_streamer_can_leave_the_prompt_out(capsys):
    streamer = byte_streamer.streamer_for(ByT5Tokenizer(), skip_prompt=True)
    streamer.put(torch.tensor([[100, 101]]))
    streamer.put(torch.tensor([102]))
    streamer.end()
    assert capsys.readouterr().out == "c\n"
