"""transformers' Perceivers become PerceiverFlash models with the same results."""

import numpy as np
import pytest
import torch
from load_script import load_script
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PerceiverConfig,
    PerceiverForImageClassificationConvProcessing,
    PerceiverForImageClassificationFourier,
    PerceiverForImageClassificationLearned,
    PerceiverForMaskedLM,
    PerceiverForOpticalFlow,
    PerceiverForSequenceClassification,
    PerceiverImageProcessorPil,
    PerceiverModel,
    PerceiverTokenizer,
)

from hf_efficient.conversion.transformers_perceiver import convert_transformers_perceiver
from hf_efficient.conversion.weight_transfer import ConversionError


VOCABULARY, LENGTH = 41, 24
SIZES = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_latents": 32,
    "num_latents": 6,
    "num_self_attends_per_block": 2,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 2,
    "max_position_embeddings": LENGTH,
    "image_size": 8,
    "num_labels": 3,
}
TEXTS = (PerceiverForMaskedLM, PerceiverForSequenceClassification)
# The width of an image's inputs, 261, 322 or 512, has to be a multiple of the heads.
IMAGES = {
    PerceiverForImageClassificationLearned: {},
    PerceiverForImageClassificationFourier: {"num_cross_attention_heads": 1},
    PerceiverForImageClassificationConvProcessing: {},
}
OPTIONS = {
    "plain": {},
    "other widths": {"qk_channels": 16, "v_channels": 32},
    "as wide as the latents": {"cross_attention_shape_for_attention": "q"},
    "repeated": {"num_blocks": 3, "self_attention_widening_factor": 2, "cross_attention_widening_factor": 3},
    "no residual": {"use_query_residual": False, "hidden_act": "relu"},
}


def original(model_class, **options):
    """Random weights, running statistics too, in which every weight matters."""
    torch.manual_seed(0)
    model = model_class(PerceiverConfig(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if tensor.is_floating_point():
                tensor.add_(0.1 * (torch.rand_like(tensor) if "running_var" in name else torch.randn_like(tensor)))
    return model


def padded_ids(rows=2, length=LENGTH):
    mask = (torch.arange(length) < torch.tensor([[length], [length // 3]])[:rows]).long()
    return torch.randint(VOCABULARY, (rows, length)), mask


@torch.no_grad()
def assert_same_text(model, converted, ids, mask, tolerance=1e-4):
    expected, logits = (each(input_ids=ids, attention_mask=mask).logits for each in (model, converted))
    if expected.ndim == 3:
        expected, logits = expected[mask == 1], logits[mask == 1]
    assert expected.std() > 0.01
    assert (logits - expected).abs().max() <= tolerance


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model_class", TEXTS)
def test_texts(model_class, options):
    model = original(model_class, **OPTIONS[options])
    converted, report = convert_transformers_perceiver(model)
    assert set(report.moved.values()) == set(model.state_dict()) and not report.dropped and not report.fresh
    assert_same_text(model, converted, *padded_ids())


@torch.no_grad()
def test_fewer_inputs_than_positions():
    """The original answers all of its positions; ours those that there are inputs for."""
    model = original(PerceiverForMaskedLM)
    converted, _ = convert_transformers_perceiver(model)
    ids = torch.randint(VOCABULARY, (2, 9))
    assert (converted(input_ids=ids).logits - model(input_ids=ids).logits[:, :9]).abs().max() <= 1e-4


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("model_class", IMAGES)
@torch.no_grad()
def test_images(model_class, options):
    model = original(model_class, **OPTIONS[options] | IMAGES[model_class])
    converted, report = convert_transformers_perceiver(model)
    assert set(report.moved.values()) == set(model.state_dict()) and not report.dropped and not report.fresh
    learned = "Learned" in model_class.__name__
    for height, width in ((8, 8), (16, 12)):
        images = torch.randn(2, 3, height, width)
        more = {"interpolate_pos_encoding": True} if learned else {}
        expected, logits = model(pixel_values=images, **more).logits, converted(pixel_values=images).logits
        assert expected.std() > 0.01
        assert (logits - expected).abs().max() <= 1e-4, (height, width)


@torch.no_grad()
def test_running_statistics_train_on():
    """Both take a step of batch norm alike."""
    model = original(PerceiverForImageClassificationConvProcessing)
    converted, _ = convert_transformers_perceiver(model)
    images = torch.randn(2, 3, 16, 16)
    for each in (model, converted):
        each.train()(pixel_values=images)
    ours, theirs = converted.model.image_adapter.stem.norm, model.perceiver.input_preprocessor.convnet.batchnorm
    assert torch.equal(ours.running_mean, theirs.running_mean)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 1


@torch.no_grad()
def test_a_bare_model():
    model = original(PerceiverModel)
    converted, _ = convert_transformers_perceiver(model)
    inputs = torch.randn(2, 9, SIZES["d_model"])
    expected = model(inputs=inputs).last_hidden_state
    assert (converted(inputs=inputs).last_hidden_state - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("model_class", TEXTS)
def test_all_weights_take_the_same_gradients(model_class):
    """Also those that are tied there."""
    model = original(model_class, attention_probs_dropout_prob=0.0).train()
    converted, report = convert_transformers_perceiver(model)
    ids, mask = padded_ids()
    labels = ids if model_class is PerceiverForMaskedLM else torch.tensor([0, 2])
    if labels.ndim == 2:
        labels = labels.masked_fill(mask == 0, -100)
    for each in (model, converted.train()):
        each(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
    theirs = dict(model.named_parameters())
    for name, parameter in converted.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[report.moved[name]].grad, rtol=1e-4, atol=1e-5)


def test_what_is_refused():
    with pytest.raises(ConversionError, match="the source must be one of PerceiverModel, .*got PerceiverForOptical"):
        convert_transformers_perceiver(PerceiverForOpticalFlow.__new__(PerceiverForOpticalFlow))
    model = original(PerceiverForMaskedLM)
    model.config.v_channels = 16
    with pytest.raises(ConversionError, match=r"v_channels must be d_latents \(32\), got 16"):
        convert_transformers_perceiver(model)


@pytest.mark.slow
def test_the_full_language_perceiver():
    """The configuration of deepmind/language-perceiver, 201 million random weights."""
    torch.manual_seed(0)
    model = PerceiverForMaskedLM(PerceiverConfig(qk_channels=256, v_channels=1280)).eval()
    assert model.num_parameters() == 201_108_230
    converted, _ = convert_transformers_perceiver(model)
    length = model.config.max_position_embeddings
    ids = torch.randint(262, (1, length))
    mask = (torch.arange(length) < length - 100).long()[None]
    assert_same_text(model, converted, ids, mask)


@pytest.mark.parametrize("model_class", [PerceiverForMaskedLM, PerceiverForImageClassificationConvProcessing])
@torch.no_grad()
def test_from_the_command_line(model_class, tmp_path):
    """A folder of the original with its tokenizer or image processor becomes one that the Auto classes load."""
    model, reads_images = original(model_class, vocab_size=262), model_class is not PerceiverForMaskedLM
    model.save_pretrained(tmp_path / "old")
    processor = PerceiverImageProcessorPil(size={"height": 20, "width": 20}) if reads_images else PerceiverTokenizer()
    processor.save_pretrained(tmp_path / "old")
    words = ["--source", "transformers", "--input", str(tmp_path / "old"), "--output_dir", str(tmp_path / "new")]
    report = load_script("convert").main(words)
    assert any(f"copied ({type(processor).__name__})" in note for note in report.notes), report.notes
    if reads_images:
        converted = AutoModelForImageClassification.from_pretrained(tmp_path / "new")
        reader = AutoImageProcessor.from_pretrained(tmp_path / "new")
        inputs = reader(np.random.default_rng(0).integers(0, 256, (30, 24, 3), dtype=np.uint8), return_tensors="pt")
        assert inputs["pixel_values"].shape == (1, 3, 20, 20)
        difference = converted(**inputs).logits - model(**inputs).logits
    else:
        converted = AutoModelForMaskedLM.from_pretrained(tmp_path / "new")
        inputs = AutoTokenizer.from_pretrained(tmp_path / "new")("some bytes", return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        difference = converted(**inputs).logits - model(**inputs).logits[:, :length]
    assert difference.abs().max() <= 1e-4
    with pytest.raises(ValueError, match="--layer_types is for Performers, got one with a Perceiver"):
        load_script("convert").main([*words[:-1], str(tmp_path / "other"), "--layer_types", "full_attention"])
