"""The examples with images and vectors from x-transformers' README, at their sizes: the original and what it becomes.

Both compute the same, to 2e-5 in float32; losses have a backward pass.
"""

import re

import pytest
import torch
from helpers import ROOT, run_warm_python

from hf_efficient.conversion.x_transformers_continuous import convert_continuous
from hf_efficient.conversion.x_transformers_images import convert_image_classifier, convert_image_text


x_transformers = pytest.importorskip("x_transformers")
pytestmark = pytest.mark.slow

STACK = {"dim": 512, "depth": 6, "heads": 8}
IMAGES = {"image_size": 256, "patch_size": 32}
VIT_ARGUMENTS = {**IMAGES, "attn_layers": {"class": "Encoder", **STACK}}


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-5)


def vit(**more):
    torch.manual_seed(0)
    return x_transformers.ViTransformerWrapper(**IMAGES, **more, attn_layers=x_transformers.Encoder(**STACK)).eval()


@torch.no_grad()
def test_simple_vit():
    original = vit(num_classes=1000)
    model, _ = convert_image_classifier(original, {**VIT_ARGUMENTS, "num_classes": 1000})
    image = torch.randn(1, 3, 256, 256)
    logits = model(image).logits
    assert logits.shape == (1, 1000)
    close(logits, original(image))


@torch.no_grad()
def test_image_to_caption():
    encoder = vit()
    layers = {**STACK, "cross_attend": True}
    sizes = {"num_tokens": 20000, "max_seq_len": 1024}
    decoder = x_transformers.TransformerWrapper(**sizes, attn_layers=x_transformers.Decoder(**layers)).eval()
    model, _ = convert_image_text(
        encoder, VIT_ARGUMENTS, decoder, {**sizes, "attn_layers": {"class": "Decoder", **layers}}
    )
    image, caption = torch.randn(1, 3, 256, 256), torch.randint(0, 20000, (1, 1024))
    logits = model(image, decoder_input_ids=caption, use_cache=False).logits
    assert logits.shape == (1, 1024, 20000)
    close(logits, decoder(caption, context=encoder(image, return_embeddings=True)))


def test_pali():
    encoder = vit()
    sizes = {f"{part}_{name}": value for part in ("enc", "dec") for name, value in
             {"num_tokens": 256, "max_seq_len": 1024, "depth": 6, "heads": 8}.items()}  # fmt: skip
    pali = x_transformers.XTransformer(dim=512, **sizes).eval()
    model, _ = convert_image_text(encoder, VIT_ARGUMENTS, pali, {"dim": 512, **sizes})
    image = torch.randn(1, 3, 256, 256)
    prompt, answer = torch.randint(0, 256, (1, 1024)), torch.randint(0, 256, (1, 1024))

    def loss(length):
        inputs = {"decoder_input_ids": answer[:, : length - 1], "labels": answer[:, 1:length]}
        return model(image, prompt[:, :length], **inputs, use_cache=False).loss

    with torch.no_grad():
        close(loss(1024), pali(prompt, answer, src_prepend_embeds=encoder(image, return_embeddings=True)))
    loss(64).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@torch.no_grad()
def test_continuous_embeddings():
    torch.manual_seed(0)
    layers, sizes = {"dim": 512, "depth": 12, "heads": 8}, {"dim_in": 32, "dim_out": 100, "max_seq_len": 1024}
    original = x_transformers.ContinuousTransformerWrapper(**sizes, attn_layers=x_transformers.Encoder(**layers))
    model, _ = convert_continuous(original.eval(), {**sizes, "attn_layers": {"class": "Encoder", **layers}})
    vectors, mask = torch.randn(1, 1024, 32), torch.ones(1, 1024, dtype=torch.bool)
    prediction = model(vectors, attention_mask=mask).prediction
    assert prediction.shape == (1, 1024, 100)
    close(prediction, original(vectors, mask=mask))


def test_the_documents_examples_run(tmp_path):
    for example in re.findall(r"```python\n(.*?)```", (ROOT / "docs/x_transformer_images.md").read_text(), re.S):
        printed = run_warm_python("-c", example, cwd=tmp_path, environment={"PYTHONPATH": str(ROOT)})
    assert "ViTransformerWrapper of x-transformers 2.31.10 -> XTransformerForImageClassification" in printed
