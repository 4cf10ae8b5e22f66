"""scripts/convert.py for CoLT5: modules of CoLT5-attention, T5 v1.1 and LongT5; and what it refuses."""

import json

import pytest
import torch
from colt5_models import T5_SIZES as T5
from load_script import load_script
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    LongT5Config,
    LongT5ForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_efficient.conversion.routed_block_files import load_routed_block


peer = pytest.importorskip("colt5_attention")
convert = load_script("convert")
ROUTER = {"router_kwargs": {"eps": 1.0, "eps_init": 1.0, "eps_decay": 1.0, "n_iters": 50}}
HEADS = {"light_dim_head": 8, "light_heads": 2, "heavy_dim_head": 8, "heavy_heads": 4}
BLOCK = {
    "class": "ConditionalRoutedTransformerBlock",
    "dim": 16,
    "num_heavy_attn_tokens_q": 6,
    "num_heavy_attn_tokens_kv": 9,
    "num_heavy_ff_tokens": 5,
    "light_window_size": 8,
    **HEADS,
    **ROUTER,
}
VIT = {
    "class": "ConditionalRoutedViT",
    "image_size": 16,
    "patch_size": 2,
    "num_classes": 5,
    "dim": 16,
    "depth": 2,
    "attn_num_heavy_tokens_q": 6,
    "attn_num_heavy_tokens_kv": 9,
    "attn_light_window_size": 4,
    "ff_num_heavy_tokens": 10,
    "ff_heavy_mult": 4,
    "ff_light_mult": 1,
    **{f"attn_{name}": value for name, value in HEADS.items()},
    **ROUTER,
}


def saved(folder, arguments, model_class):
    """A module of the package on disk, the words of a command line about it, and the module."""
    torch.manual_seed(0)
    module = model_class(**{name: value for name, value in arguments.items() if name != "class"}).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if "routing_token" in name:
                weight.mul_(0.25)  # logits of unit size: larger ones saturate the original's scores
    torch.save(module.state_dict(), folder / "model.pt")
    (folder / "arguments.json").write_text(json.dumps(arguments))
    return module, ["--input", str(folder / "model.pt"), "--arguments", str(folder / "arguments.json")]


def run(source, folder, *words):
    return convert.main(["--source", source, "--output_dir", str(folder), *words])


@torch.no_grad()
def test_a_block_becomes_a_folder_that_holds_no_code(tmp_path, capsys):
    original, words = saved(tmp_path, BLOCK, peer.ConditionalRoutedTransformerBlock)
    run("colt5_attention", tmp_path / "out", *words)
    assert "ConditionalRoutedTransformerBlock -> RoutedTransformerBlock" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["block.json", "block.safetensors"]
    tokens = torch.randn(1, 32, 16)
    torch.testing.assert_close(load_routed_block(tmp_path / "out")(tokens), original(tokens), rtol=0, atol=1e-4)


@torch.no_grad()
def test_the_vision_transformer_becomes_a_model(tmp_path):
    original, words = saved(tmp_path, VIT, peer.vit.ConditionalRoutedViT)
    report = run("colt5_attention", tmp_path / "out", *words)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    images = torch.randn(1, 3, 16, 16)
    torch.testing.assert_close(model(images).logits, original(images), rtol=0, atol=1e-4)
    moved = {source for sources in report.moved.values() for source in sources.split(" + ")}
    assert moved | set(report.dropped) == set(original.state_dict())


@torch.no_grad()
def test_t5_and_longt5_become_colt5(tmp_path):
    torch.manual_seed(0)
    ids, labels = torch.randint(3, 61, (2, 30)), torch.randint(3, 61, (2, 5))
    everything = "num_routed_tokens=1.0,num_routed_queries=1.0,num_routed_keys=1.0"
    longt5 = LongT5Config(**T5, encoder_attention_type="local", local_radius=63, tie_word_embeddings=False)
    for name, original in (
        ("t5", T5ForConditionalGeneration(T5Config(**T5))),
        ("longt5", LongT5ForConditionalGeneration(longt5)),
    ):
        original.eval().save_pretrained(tmp_path / name)
        words = ["--input", str(tmp_path / name), "--config_overrides", everything]
        report = run("transformers", tmp_path / f"{name}-out", *words)
        assert all("routing_vectors" in weight for weight in report.fresh)
        model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / f"{name}-out")
        assert type(model).__name__ == "CoLT5ForConditionalGeneration"
        expected = original(ids, labels=labels)
        torch.testing.assert_close(model(ids, labels=labels).loss, expected.loss, rtol=0, atol=1e-4)
    run("transformers", tmp_path / "copied", "--input", str(tmp_path / "t5"), "--light_branch", "copy")
    layer = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "copied").model.encoder.layers[0]
    assert layer.mlp.light_mlp.down_proj.weight.abs().sum() > 0


REFUSED = {
    "no class": ({"class": None}, 'the arguments must hold "class", one of .*got None'),
    "another class": ({"class": "Linear"}, "got 'Linear'"),
    "an unknown argument": ({"dims": 3}, "must be those of the ConditionalRoutedTransformerBlock.*dims"),
    "another width": ({"dim": 24}, "must be those of the ConditionalRoutedTransformerBlock.*size mismatch"),
    "blocks of the router": (
        {"router_kwargs": {"route_block_size": 8}},
        "route_block_size must be None, got 8",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_modules_leave_nothing_behind(case, tmp_path):
    changes, message = REFUSED[case]
    _, words = saved(tmp_path, BLOCK, peer.ConditionalRoutedTransformerBlock)
    words[-1] = json.dumps({**BLOCK, **changes})
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run("colt5_attention", tmp_path / "out", *words)
    assert not (tmp_path / "out").exists()


def test_refused_vision_transformers(tmp_path):
    for changes, message in (
        ({"attn_light_dim_head": 16}, "light and heavy heads must be of one size, got 16 and 8"),
        ({"image_size": (16, 32)}, "image_size must be one number"),
        ({"patch_size": (2, 4)}, "patches must be squares, got 2 by 4"),
    ):
        arguments = {**VIT, **changes}
        module = peer.vit.ConditionalRoutedViT(**{name: value for name, value in arguments.items() if name != "class"})
        with pytest.raises(ValueError, match=message):
            convert.convert_colt5_vit(module, arguments["image_size"])


def test_refused_options(tmp_path):
    T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(tmp_path / "t5")
    T5ForConditionalGeneration(T5Config(**{**T5, "feed_forward_proj": "relu"})).save_pretrained(tmp_path / "old")
    for name, words, message in (
        ("t5", ("--layer_types", "full_attention"), "--layer_types is for Performers, got one with a T5For"),
        ("t5", ("--config_overrides", "num_routed_token=3"), "near: num_routed_tokens"),
        ("t5", ("--config_overrides", "hidden_size=8"), "hidden_size must stay what the T5ForConditional"),
        ("old", (), "gated feed-forward only"),
    ):
        with pytest.raises(ValueError, match=message):
            run("transformers", tmp_path / "out", "--input", str(tmp_path / name), *words)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="--light_branch belongs to --source transformers"):
        run("performer_pytorch", tmp_path / "out", "--input", "x", "--arguments", "{}", "--light_branch", "copy")


def test_broken_folders_of_blocks(tmp_path):
    original, words = saved(tmp_path, BLOCK, peer.ConditionalRoutedTransformerBlock)
    run("colt5_attention", tmp_path / "out", *words)
    description = json.loads((tmp_path / "out/block.json").read_text())
    for broken in (
        "",
        "{}",
        json.dumps({**description, "name": "os.system"}),
        json.dumps({**description, "x": 1})[:-9],
    ):
        (tmp_path / "out/block.json").write_text(broken)
        with pytest.raises(ValueError, match="folder must hold block.json and block.safetensors"):
            load_routed_block(tmp_path / "out")
