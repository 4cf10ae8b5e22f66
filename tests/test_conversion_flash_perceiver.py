"""State dicts of flash-perceiver load without loss; the original's forward is tests/flash_perceiver_definition.py."""

import json

import pytest
import torch
from flash_perceiver_definition import Perceiver, PerceiverIO
from load_script import load_script
from transformers import AutoModel

from hf_efficient.conversion.flash_perceiver import convert_flash_perceiver
from hf_efficient.conversion.weight_transfer import ConversionError


SIZES = {
    "input_dim": 6,
    "depth": 2,
    "num_latents": 5,
    "latent_dim": 20,
    "cross_head_dim": 8,
    "latent_heads": 3,
    "latent_head_dim": 4,
}
OPTIONS = {
    "latents": {},
    "mean": {"output_dim": 3},
    "first": {"output_dim": 3, "output_mode": "first"},
    "concat": {"output_dim": 3, "output_mode": "concat"},
    "plain MLP": {"gated_mlp": False, "output_dim": 3},
    "rounded to 256": {"rounding": 256},
    "rotary": {"latent_rotary_emb_dim": 2},
    "heads": {"cross_heads": 2, "self_per_cross_attn": 3},
    "no self-attention": {"self_per_cross_attn": 0},
    "zero tokens": {"num_zero_tokens": 3, "depth": 3},
    "tied": {"weight_tie_layers": True, "depth": 4, "self_per_cross_attn": 2},
    "several inputs": {"input_dim": [6, 4], "num_zero_tokens": 3},
    "an input each": {"input_dim": [6, 6], "num_zero_tokens": 3},
    "no latents": {"num_latents": None},
}


def original(model_class, **options):
    torch.manual_seed(0)
    model = model_class(**{**SIZES, **options}).eval()
    arguments = {**SIZES, **options, "class": model_class.__name__}
    arguments.pop("rounding", None)
    return model, arguments


def inputs(arguments):
    size, rows = arguments["input_dim"], 3
    mask = torch.arange(11) < torch.tensor([11, 4, 7])[:, None]
    latents = torch.randn(4, arguments["latent_dim"]) if arguments.get("num_latents") is None else None
    if isinstance(size, int):
        return torch.randn(rows, 11, size), mask, latents
    return [torch.randn(rows, 11, size[0]), torch.randn(rows, 8, size[1])], [mask, None], latents


def result(output, arguments):
    return output.last_hidden_state if arguments.get("output_dim") is None else output.pooler_output


@torch.no_grad()
def assert_same(model, arguments, state):
    converted, report = convert_flash_perceiver(state, arguments)
    assert set(report.moved.values()) | set(report.dropped) == set(state)
    data, mask, latents = inputs(arguments)
    for seen in (None, mask):
        expected = model(data, seen, latents)
        found = result(converted(inputs=data, attention_mask=seen, latents=latents), arguments)
        assert expected.std() > 0.01
        assert (found - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("options", OPTIONS)
def test_perceiver(options):
    model, arguments = original(Perceiver, **OPTIONS[options])
    assert_same(model, arguments, model.state_dict())


@pytest.mark.parametrize("kept", [1, 3])
def test_tied_weights_that_were_saved_once(kept):
    """As safetensors does, under any one of their names."""
    model, arguments = original(Perceiver, **OPTIONS["tied"])
    gone = tuple(f"layers.{index}." for index in (1, 2, 3) if index != kept)
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(gone)}
    assert_same(model, arguments, state)


@pytest.mark.parametrize(
    "options",
    [{}, {"proj_dim": 7}, {"gated_mlp": False, "query_heads": 2}, {"rounding": 256, "num_zero_tokens": 2}],
    ids=str,
)
@torch.no_grad()
def test_perceiver_io(options):
    model, arguments = original(PerceiverIO, query_dim=10, **options)
    converted, report = convert_flash_perceiver(model, arguments)
    assert set(report.moved.values()) == set(model.state_dict())
    data, mask, _ = inputs(arguments)
    for queries in (None, torch.randn(9, 10), torch.randn(3, 2, 10)):
        expected = model(data, mask, queries=queries)
        found = converted(inputs=data, attention_mask=mask, queries=queries).last_hidden_state
        assert (found - expected).abs().max() <= 1e-5


def test_the_state_dict_is_the_originals():
    """Names and shapes as an inventory of the original lists them."""
    sizes = {"input_dim": 6, "depth": 2, "num_latents": 4, "latent_dim": 8, "cross_head_dim": 4, "latent_heads": 2,
             "latent_head_dim": 4}  # fmt: skip
    state = {name: tuple(tensor.shape) for name, tensor in Perceiver(
        **sizes, num_zero_tokens=2, output_dim=3).state_dict().items()}  # fmt: skip
    assert state["zero_tokens.1"] == (2, 6) and state["out_proj.1.weight"] == (3, 8)
    assert state["layers.1.0.mixer.Wkv.weight"] == (8, 6) and state["layers.0.0.mixer.Wq.weight"] == (4, 8)
    assert state["layers.0.1.0.mixer.Wqkv.bias"] == (24,) and state["layers.0.0.mlp.fc1.weight"] == (256, 8)
    state = PerceiverIO(**sizes, query_dim=10, proj_dim=5).state_dict()
    assert state["query_block.mlp.fc1.weight"].shape == (256, 10) and "layers.0.1.1.norm2.bias" in state


def test_gradients_reach_the_tokens_that_are_read():
    """With one tensor all layers read the first layer's tokens, which is what the converted ones start as."""
    model, arguments = original(Perceiver, **OPTIONS["zero tokens"])
    converted, report = convert_flash_perceiver(model, arguments)
    assert all(torch.equal(tokens, model.zero_tokens[0]) for tokens in converted.zero_tokens)
    assert report.dropped == dict.fromkeys(("zero_tokens.1", "zero_tokens.2"), "the original never reads it")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"class": "Transformer"}, "one of Perceiver, PerceiverIO, got 'Transformer'"),
        ({"heads": 3}, "Perceiver has no argument heads"),
        ({"depth": None}, "arguments must hold depth"),
        ({"cross_rotary_emb_dim": 4}, "cross_rotary_emb_dim must be 0, got 4"),
        ({"output_mode": "max"}, "output_mode must be one of average, mean, concat, first, got 'max'"),
        ({"depth": 3}, "weights that the source should have and has not"),
        ({"latent_dim": 24}, "do the arguments belong to these weights"),
    ],
)
def test_what_is_refused(changes, message):
    model, arguments = original(Perceiver)
    with pytest.raises(ConversionError, match=message):
        convert_flash_perceiver(model, arguments | changes)


def test_tied_layers_that_differ_are_refused():
    model, arguments = original(Perceiver, depth=3)
    with pytest.raises(ConversionError, match="weight_tie_layers=True, but layers.2.0.mixer.Wq.weight differs"):
        convert_flash_perceiver(model, arguments | {"weight_tie_layers": True})


@torch.no_grad()
def test_from_the_command_line(tmp_path):
    model, arguments = original(Perceiver, output_dim=3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    words = ["--input", str(tmp_path / "model.pt"), "--arguments", json.dumps(arguments)]
    words += ["--source", "flash_perceiver", "--output_dir", str(tmp_path / "new")]
    load_script("convert").main(words)
    converted = AutoModel.from_pretrained(tmp_path / "new")
    data, mask, _ = inputs(arguments)
    assert (converted(inputs=data, attention_mask=mask).pooler_output - model(data, mask)).abs().max() <= 1e-5
    with pytest.raises(ValueError, match="--arguments must hold the constructor's arguments"):
        load_script("convert").main([*words[:2], *words[4:]])
