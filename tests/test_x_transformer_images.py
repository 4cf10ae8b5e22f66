"""What must hold of XTransformers that see images: shapes, batches, padding, caches, gradients, refusals.

What the options compute is in test_conversion_x_transformers_images.py, which compares them with x-transformers.
"""

import copy

import numpy as np
import PIL.Image
import pytest
import torch
from generation_models import NEW_TOKENS, left_padded, tokens
from huggingface_hub.errors import StrictDataclassError
from transformers import Trainer, TrainingArguments, ViTImageProcessorPil, pipeline
from x_transformer_image_models import ENCODERS, IMAGES, WRITERS, classifier, pixels, writer
from x_transformer_models import SIZES

from hf_efficient import (
    XTransformerConfig,
    XTransformerForImageClassification,
    XTransformerForImageTextToText,
    XTransformerImageEncoder,
)


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10 * expected.abs().max().item())


def source(name, lengths=(5, 5), side="right"):
    """The source text of a PaLI, none of a captioner."""
    if "pali" not in name:
        return {}
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    mask = mask.flip(1) if side == "left" else mask
    ids = torch.zeros(2, width, dtype=torch.long).masked_scatter(mask, tokens(1, sum(lengths))[0])
    return {"input_ids": ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_images_of_a_batch_do_not_meet_and_both_forms_agree(name):
    model = classifier(name)
    together = model(pixels()).logits
    close(torch.cat([model(image[None]).logits for image in pixels()]), together)
    written_out = copy.deepcopy(model)
    written_out.set_attn_implementation("eager")
    eager = written_out(pixels(), output_attentions=True)
    close(eager.logits, together)
    inserted = model.config.num_register_tokens + model.config.num_memory_tokens
    assert eager.attentions[0].shape == (2, 4, 6 + inserted, 6 + inserted)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_images_of_other_sizes(name):
    """Rows and columns are told apart, and a learned table is interpolated: the mean of the image stays near."""
    model = classifier(name)
    for height, width in ((8, 8), (16, 24), (4, 12)):
        states = model.model(pixels(1, height, width)).last_hidden_state
        assert states.shape == (1, height // 4 * (width // 4), 32) and states.isfinite().all()


@torch.no_grad()
def test_places_of_patches_matter_where_there_are_positions():
    turned = pixels().flip(3).unflatten(3, (3, 4)).flip(4).flatten(3)  # the columns of patches in reverse
    without, with_positions = classifier("no positions"), classifier("simple vit")
    without.config.classifier_pooling = "mean"
    close(without(turned).logits, without(pixels()).logits)
    assert (with_positions(turned).logits - with_positions(pixels()).logits).abs().min() > 1e-6


@torch.no_grad()
def test_registers_take_part_but_are_not_pooled():
    model = classifier("registers")
    assert model.model(pixels()).last_hidden_state.shape[1] == 6
    before = model(pixels()).logits
    model.model.embed_tokens.registers.data[:] = torch.randn(3, 32)
    assert (model(pixels()).logits != before).all()


@pytest.mark.parametrize(
    "make, name", [(classifier, name) for name in ENCODERS] + [(writer, name) for name in WRITERS]
)
def test_gradients_reach_every_parameter_and_checkpointing_changes_none(make, name):
    model = make(name).train()
    inputs = {"pixel_values": pixels(), "labels": torch.tensor([1, 3])}
    if make is writer:
        inputs = {"pixel_values": pixels(), "labels": tokens(2, 6), **source(name, (5, 3))}
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        model(**inputs).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    without = {name for name, gradient in gradients[0].items() if gradient is None or not gradient.abs().sum() > 0}
    assert without == set()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 5}], ids=str)
@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_generating_with_a_cache_gives_what_it_gives_without(name, options):
    model = writer(name)
    written = []
    for use_cache in (True, False):
        torch.manual_seed(1)
        written.append(
            model.generate(
                pixel_values=pixels(), **source(name, (5, 3)), **options, use_cache=use_cache,
                max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS,
            )
        )  # fmt: skip
    assert torch.equal(*written) and written[0].shape == (2, NEW_TOKENS + 1)


@pytest.mark.parametrize("name", WRITERS)
@torch.no_grad()
def test_an_image_matters_and_may_come_as_embeddings(name):
    model, inputs = writer(name), source(name)
    decoder_input_ids = tokens(2, 6)
    expected = model(pixels(), decoder_input_ids=decoder_input_ids, **inputs).logits
    other = model(pixels(seed=2), decoder_input_ids=decoder_input_ids, **inputs).logits
    assert ((expected - other).abs().amax(-1) > 1e-3).all()
    encoder = model.get_encoder()
    vision = encoder.vision_tower if "pali" in name else encoder
    embeddings = vision(pixels()).last_hidden_state
    close(model(image_embeds=embeddings, decoder_input_ids=decoder_input_ids, **inputs).logits, expected)
    outputs = encoder(pixel_values=pixels(), **inputs)
    mask = {"attention_mask": inputs["attention_mask"]} if inputs else {}
    close(model(encoder_outputs=outputs, decoder_input_ids=decoder_input_ids, **mask).logits, expected)
    assert isinstance(vision, XTransformerImageEncoder)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [name for name in WRITERS if "pali" in name])
@torch.no_grad()
def test_padding_of_the_source_is_masked_exactly(name, side):
    model, decoder_input_ids = writer(name), tokens(2, 6)
    inputs = source(name, (7, 4), side)
    together = model(pixels(), **inputs, decoder_input_ids=decoder_input_ids).logits
    ids = inputs["input_ids"][1][inputs["attention_mask"][1] == 1][None]
    close(together[1:], model(pixels()[1:], ids, decoder_input_ids=decoder_input_ids[1:]).logits)


@torch.no_grad()
def test_a_pali_without_an_image_is_an_encoder_decoder():
    model, inputs = writer("pali"), source("pali", (5, 3))
    logits = model(**inputs, decoder_input_ids=tokens(2, 6)).logits
    assert (logits != model(pixels(), **inputs, decoder_input_ids=tokens(2, 6)).logits).all()
    assert model.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape == (2, 4)


@torch.no_grad()
def test_a_captioner_continues_a_given_beginning():
    model = writer("captioner")
    alone = [
        model.generate(pixel_values=pixels()[row, None], input_ids=tokens(2, 4)[row, None], max_new_tokens=5)
        for row in range(2)
    ]
    given = {"input_ids": tokens(2, 4), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    together = model.generate(pixel_values=pixels(), **given, max_new_tokens=5)
    assert torch.equal(together, torch.cat(alone))
    assert torch.equal(together[:, 1:5], tokens(2, 4))  # behind the start token
    # Beginnings of different lengths, padded on the left.
    ids, mask = left_padded([2, 4])
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    padded = model.generate(pixel_values=pixels(), input_ids=ids, attention_mask=mask, **options)
    short = model.generate(pixel_values=pixels()[:1], input_ids=ids[:1, 2:], **options)
    assert torch.equal(padded[:1, 5:], short[:, 3:])


@pytest.mark.parametrize("make, name", [(classifier, "registers"), (writer, "captioner"), (writer, "pali")])
def test_saved_and_loaded_to_the_bit(make, name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    inputs = {"pixel_values": pixels()}
    if make is writer:
        inputs |= {"decoder_input_ids": tokens(2, 6), **source(name)}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@torch.no_grad()
def test_a_pipeline_of_a_saved_folder(tmp_path):
    torch.manual_seed(0)
    fields = {**IMAGES, "num_channels": 3, "id2label": {0: "cat", 1: "dog"}, "initializer_range": 0.3}
    del fields["num_labels"]
    model = XTransformerForImageClassification(XTransformerConfig(**SIZES, **fields)).eval()
    processor = ViTImageProcessorPil(size={"height": 8, "width": 12})
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    image = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8))
    answers = pipeline("image-classification", model=str(tmp_path))(image)
    expected = model(**processor(image, return_tensors="pt")).logits.softmax(-1)[0]
    assert {answer["label"]: pytest.approx(answer["score"], abs=1e-5) for answer in answers} == {
        "cat": expected[0].item(), "dog": expected[1].item()
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("make, name", [(classifier, "registers"), (writer, "captioner"), (writer, "pali")])
@torch.no_grad()
def test_compiles_as_one_graph(make, name):
    model = make(name)
    inputs = {"pixel_values": pixels()}
    if make is writer:
        inputs |= {"decoder_input_ids": tokens(2, 6), "use_cache": False, **source(name, (5, 3))}
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    close(compiled(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("make, name", [(classifier, "simple vit"), (writer, "captioner"), (writer, "pali")])
def test_trainer_trains_it(make, name, tmp_path):
    model = make(name).float()
    labels = [torch.tensor(row % 5) for row in range(4)] if make is classifier else list(tokens(4, 6))
    rows = [{"pixel_values": image.float(), "labels": label} for image, label in zip(pixels(4), labels, strict=True)]
    if name == "pali":
        rows = [row | {"input_ids": ids} for row, ids in zip(rows, tokens(4, 5), strict=True)]
    arguments = TrainingArguments(
        tmp_path, max_steps=12, learning_rate=3e-3, report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=4,
        per_device_train_batch_size=4, save_strategy="no",
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.8 * losses[0]


REFUSED_FIELDS = {
    "three sides": ({"image_size": [8, 8, 8]}, "image_size must be a positive number, or height and width"),
    "no patch": ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
    "overrides of nothing": ({"image_encoder_overrides": {"hidden_size": 8}}, "needs is_encoder_decoder=True"),
    "an unknown override": (
        {"image_encoder_overrides": {"wings": 2}, "is_encoder_decoder": True}, "must hold fields .*wings"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_FIELDS)
def test_fields_that_cannot_be_are_refused(name):
    fields, message = REFUSED_FIELDS[name]
    with pytest.raises((StrictDataclassError, ValueError), match=message):
        XTransformerConfig(**SIZES, **fields)


WRITES = {"is_encoder_decoder": True}
REFUSED_MODELS = {
    "uneven patches": ({"image_size": 9}, "image_size must be a multiple of patch_size"),
    "sincos of odd width": ({"hidden_size": 6, "num_attention_heads": 1}, "image_positions='sincos' needs"),
    "a decoder of images": ({"is_decoder": True}, "is_decoder must be False in the encoder of an image"),
    "positions of tokens": ({"absolute_positions": "learned"}, "absolute_positions='learned' needs image_positions"),
    "token types": ({"type_vocab_size": 2}, "type_vocab_size=2 needs tokens"),
    "one stack": ({}, "needs config.is_encoder_decoder=True, got False"),
    "a wider image": (
        {**WRITES, "image_encoder_overrides": {"hidden_size": 40}}, "must be cross_attention_hidden_size .32., got 40"
    ),
    "a wider image in front": (
        {**WRITES, "image_fusion": "prepended", "image_encoder_overrides": {"hidden_size": 40}}, "width of the text"
    ),
    "a text encoder in a captioner": (
        {**WRITES, "encoder_overrides": {"num_hidden_layers": 1}}, "needs image_fusion='prepended'"
    ),
    "a shared table in a captioner": ({**WRITES, "share_embeddings": True}, "share_embeddings=True needs"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_models_that_cannot_be_are_refused(name):
    fields, message = REFUSED_MODELS[name]
    writes = "is_encoder_decoder" in fields or name == "one stack"
    model_class = XTransformerForImageTextToText if writes else XTransformerForImageClassification
    with pytest.raises(ValueError, match=message):
        model_class(XTransformerConfig(**{**SIZES, **IMAGES, **fields}))


def test_bad_inputs_are_refused():
    model = classifier("simple vit")
    for bad, message in (
        (pixels(1, 8, 10), "height and a width that 4 divides, got 8 and 10"),
        (pixels()[:, :1], "with 2 channels, got"),
        (pixels().long(), "floating point"),
        (pixels()[0], "shape .2, 8, 12"),
    ):
        with pytest.raises(ValueError, match=message):
            model(bad)
    captioner, pali = writer("captioner"), writer("pali")
    ids = tokens(2, 6)
    for call, message in (
        (lambda: captioner(decoder_input_ids=ids), "pixel_values and image_embeds must be given, got neither"),
        (lambda: captioner(pixels(), ids, decoder_input_ids=ids), "pass the caption as decoder_input_ids"),
        (lambda: pali(pixels(), ids, image_embeds=pixels(), decoder_input_ids=ids), "at most one of pixel_values"),
        (lambda: pali(image_embeds=torch.ones(2, 3, 5), input_ids=ids, decoder_input_ids=ids), "prepend_embeds must"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
