"""scripts/convert.py for x-transformers: each of its classes, and what is refused."""

import json

import pytest
import torch
from load_script import load_script
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForTimeSeriesPrediction,
)
from x_transformers_originals import LAYERS, LENGTH, TOKENS, TOLERANCE, WRAPPER, ids, shaken, x_transformers


convert = load_script("convert")
HALF = {**WRAPPER, "depth": 1, "heads": 2, "attn_dim_head": 8}
CLASSES = {
    "TransformerWrapper": (
        {
            **WRAPPER,
            "attn_layers": {"class": "Decoder", **LAYERS, "shift_tokens": [1, 0, 0, 2], "rotary_pos_emb": True},
        },
        AutoModelForCausalLM,
        lambda original, model: (original(ids()), model(ids()).logits),
    ),
    "XTransformer": (
        {"dim": 32, **{f"{part}_{name}": value for part in ("enc", "dec") for name, value in HALF.items()}},
        AutoModelForSeq2SeqLM,
        lambda original, model: (
            original.decoder.net(ids(9), context=original.encoder(ids(), return_embeddings=True)),
            model(ids(), decoder_input_ids=ids(9)).logits,
        ),
    ),
    "ViTransformerWrapper": (
        {"image_size": 8, "patch_size": 4, "num_classes": 3, "attn_layers": {"class": "Encoder", **LAYERS}},
        AutoModelForImageClassification,
        lambda original, model: (original(IMAGES), model(IMAGES).logits),
    ),
    "ContinuousTransformerWrapper": (
        {"dim_in": 5, "dim_out": 6, "max_seq_len": LENGTH, "attn_layers": {"class": "Encoder", **LAYERS}},
        AutoModelForTimeSeriesPrediction,
        lambda original, model: (original(VECTORS), model(VECTORS).prediction),
    ),
}
IMAGES, VECTORS = torch.rand(2, 3, 8, 8), torch.randn(2, LENGTH, 5)


def saved(folder, name, **changes):
    """A module's state dict and the arguments that it was made with, on disk; the words about them, and the module."""
    torch.manual_seed(0)
    arguments = {**CLASSES[name][0], **changes}
    made = dict(arguments)
    if "attn_layers" in made:
        stack = dict(made["attn_layers"])
        if "shift_tokens" in stack:
            stack["shift_tokens"] = tuple(stack["shift_tokens"])
        made["attn_layers"] = getattr(x_transformers, stack.pop("class"))(**stack)
    module = shaken(getattr(x_transformers, name)(**made))
    torch.save({"model": module.state_dict()}, folder / "model.pt")
    (folder / "arguments.json").write_text(json.dumps({"class": name, **arguments}))
    return module, ["--input", str(folder / "model.pt"), "--arguments", str(folder / "arguments.json")]


def run(folder, *words):
    return convert.main(["--source", "x_transformers", "--output_dir", str(folder), *words])


@pytest.mark.parametrize("name", CLASSES)
@torch.no_grad()
def test_each_class_becomes_a_folder_with_the_same_results(name, tmp_path):
    module, words = saved(tmp_path, name)
    run(tmp_path / "out", *words)
    auto_class, results = CLASSES[name][1:]
    model = auto_class.from_pretrained(tmp_path / "out")
    expected, actual = results(module, model)
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert expected.std() > 0.05


@torch.no_grad()
def test_the_release_decides_what_weights_mean(tmp_path):
    """The head that shares the token table has a scale since 2.31."""
    module, words = saved(tmp_path, "TransformerWrapper", tie_embedding=True)
    for version, scale in (("2.31.10", 1), ("2.30.0", 32**0.5)):
        run(tmp_path / version, *words, "--x_transformers_version", version)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / version)
        torch.testing.assert_close(model(ids()).logits, module(ids()) * scale, rtol=1e-5, atol=TOLERANCE * scale)


REFUSED = {
    "no class": ({"class": None}, (), 'must hold "class", one of TransformerWrapper, XTransformer.*got None'),
    "another class": ({"class": "DPO"}, (), "got 'DPO'"),
    "other arguments": ({"num_tokens": TOKENS + 1}, (), "token_emb"),
    "no release": ({}, ("--x_transformers_version", "new"), "version must look like '2.31.10', got 'new'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_nothing_left(case, tmp_path):
    changes, words, message = REFUSED[case]
    _, given = saved(tmp_path, "TransformerWrapper")
    arguments = json.loads((tmp_path / "arguments.json").read_text())
    (tmp_path / "arguments.json").write_text(json.dumps({**arguments, **changes}))
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", *given, *words)
    assert not (tmp_path / "out").exists()
