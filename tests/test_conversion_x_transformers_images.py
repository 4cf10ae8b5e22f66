"""Image models of x-transformers 2.31.10 and what they become compute the same, to 2e-5 in float32."""

import pytest
import torch

from hf_efficient import XTransformerForImageClassification, XTransformerForImageTextToText, XTransformerImageEncoder
from hf_efficient.conversion.weight_transfer import ConversionError
from hf_efficient.conversion.x_transformers_images import IMAGE_FLAGS, convert_image_classifier, convert_image_text


x_transformers = pytest.importorskip("x_transformers")

TOLERANCE, TOKENS, LENGTH = 2e-5, 41, 9
IMAGES = {"image_size": 8, "patch_size": 2}
LAYERS = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
CASES = {
    "defaults": ({}, {}),
    "one channel": ({"channels": 1}, {}),
    "registers": ({"num_register_tokens": 3}, {}),
    "registers, norm, dropout": ({"num_register_tokens": 2, "post_emb_norm": True, "emb_dropout": 0.1}, {}),
    "rotary, registers": ({"num_register_tokens": 2}, {"rotary_pos_emb": True}),
    "alibi, rmsnorm, glu": ({}, {"alibi_pos_bias": True, "use_rmsnorm": True, "ff_glu": True}),
    "memory keys, qk norm, gates": ({}, {"attn_num_mem_kv": 2, "attn_qk_norm": True, "attn_gate_values": True}),
}


def shaken(module):
    """With values other than the initial ones, at which half of the options do nothing."""
    for parameter in module.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def vit(wrapper, layers, classes=5):
    torch.manual_seed(0)
    wrapper, layers = {**IMAGES, "num_classes": classes, **wrapper}, {**LAYERS, **layers}
    module = x_transformers.ViTransformerWrapper(**wrapper, attn_layers=x_transformers.Encoder(**layers))
    return shaken(module), {**wrapper, "attn_layers": {"class": "Encoder", **layers}}


def decoder(**options):
    wrapper, layers = {"num_tokens": TOKENS, "max_seq_len": 24}, {**LAYERS, "cross_attend": True, **options}
    module = x_transformers.TransformerWrapper(**wrapper, attn_layers=x_transformers.Decoder(**layers))
    return shaken(module), {**wrapper, "attn_layers": {"class": "Decoder", **layers}}


def encoder_decoder(**options):
    shared = {"num_tokens": TOKENS, "max_seq_len": 24, "depth": 2, "heads": 4, "attn_dim_head": 8, "verbose": False}
    arguments = {"dim": 32, **{f"{part}_{key}": value for part in ("enc", "dec") for key, value in shared.items()}}
    arguments |= options
    return shaken(x_transformers.XTransformer(**arguments)), arguments


def images(channels=3):
    return torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(1))


def ids(length=LENGTH, seed=1):
    return torch.randint(1, TOKENS, (2, length), generator=torch.Generator().manual_seed(seed))


def close(actual, expected):
    assert expected.std() > 0.02
    torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_same_labels_and_embeddings(name):
    module, arguments = vit(*CASES[name])
    model, _ = convert_image_classifier(module, arguments)
    assert type(model) is XTransformerForImageClassification
    pixels = images(arguments.get("channels", 3))
    logits, embeddings = module(pixels, return_logits_and_embeddings=True)
    close(model(pixels).logits, logits)
    close(model.model(pixels).last_hidden_state, embeddings)


@torch.no_grad()
def test_without_classes_it_is_an_image_encoder():
    module, arguments = vit({"num_register_tokens": 2}, {}, classes=None)
    model, _ = convert_image_classifier(module.state_dict(), arguments)
    assert type(model) is XTransformerImageEncoder
    close(model(images()).last_hidden_state, module(images(), return_embeddings=True))


def test_the_same_gradient_of_an_image():
    module, arguments = vit({"num_register_tokens": 2}, {})
    model, _ = convert_image_classifier(module, arguments)
    gradients = []
    for run in (module, lambda pixels: model(pixels).logits):
        pixels = images().requires_grad_()
        run(pixels).square().sum().backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)


CAPTIONERS = {
    "defaults": ({}, {}, {}),
    "registers": ({"num_register_tokens": 2, "post_emb_norm": True}, {}, {}),
    "halves that differ": (
        {},
        {"depth": 3, "heads": 2, "attn_dim_head": 12, "use_rmsnorm": True, "ff_glu": True, "attn_kv_heads": 1},
        {"rotary_pos_emb": True, "attn_qk_rmsnorm": True, "ff_swish": True, "use_scalenorm": True},
    ),
    "another width": ({}, {"dim": 48}, {"cross_attn_dim_context": 48, "alibi_pos_bias": True}),
}


@pytest.mark.parametrize("name", CAPTIONERS)
@torch.no_grad()
def test_captioner(name):
    wrapper, image_layers, text_layers = CAPTIONERS[name]
    module, arguments = vit(wrapper, image_layers, classes=None)
    writer, text_arguments = decoder(**text_layers)
    model, report = convert_image_text(module, arguments, writer, text_arguments)
    assert type(model) is XTransformerForImageTextToText
    expected = writer(ids(), context=module(images(), return_embeddings=True))
    close(model(images(), decoder_input_ids=ids()).logits, expected)
    assert "ViTransformerWrapper" in str(report) and len(report.moved) == len(model.state_dict())


PALI = {
    "defaults": ({}, {}),
    "shared table, memory": ({"tie_token_emb": True, "enc_num_memory_tokens": 2}, {"num_register_tokens": 2}),
    "relative positions": ({"enc_rotary_pos_emb": True, "dec_rel_pos_bias": True, "enc_depth": 3}, {}),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", PALI)
@torch.no_grad()
def test_pali(name, padded):
    """Loss and logits, with an image before the source, padded or not."""
    text_options, wrapper = PALI[name]
    module, arguments = vit(wrapper, {"rotary_pos_emb": name == "relative positions"}, classes=None)
    source, text_arguments = encoder_decoder(**text_options)
    model, _ = convert_image_text(module, arguments, source, text_arguments)
    mask = torch.arange(LENGTH) < torch.tensor([[LENGTH], [5]]) if padded else None
    embeddings, target = module(images(), return_embeddings=True), ids(7, seed=2)
    expected = source(ids(), target, mask=mask, src_prepend_embeds=embeddings)
    given = {"attention_mask": None if mask is None else mask.long(), "decoder_input_ids": target[:, :-1]}
    output = model(images(), ids(), **given, labels=target[:, 1:])
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)
    encoded = source.encoder(ids(), mask=mask, prepend_embeds=embeddings, return_embeddings=True)
    extended = None if mask is None else torch.nn.functional.pad(mask, (embeddings.shape[1], 0), value=True)
    close(output.logits, source.decoder.net(target, context=encoded, context_mask=extended)[:, :-1])
    tables = model.model.encoder.embed_tokens.weight, model.model.decoder.embed_tokens.weight
    assert (tables[0] is tables[1]) == ("shared" in name)


@torch.no_grad()
def test_prepended_embeddings_of_a_decoder():
    """As `TransformerWrapper.forward(prepend_embeds=, prepend_mask=)`, whose outputs for them are left out here."""
    from hf_efficient.conversion.x_transformers import convert_x_transformers

    for options in ({}, {"rotary_pos_emb": True}, {"alibi_pos_bias": True}):
        torch.manual_seed(0)
        layers = {**LAYERS, **options}
        wrapper = {"num_tokens": TOKENS, "max_seq_len": 24, "post_emb_norm": True}
        module = shaken(x_transformers.TransformerWrapper(**wrapper, attn_layers=x_transformers.Decoder(**layers)))
        model, _ = convert_x_transformers(module, {**wrapper, "attn_layers": {"class": "Decoder", **layers}})
        vectors, mask = torch.randn(2, 4, 32), torch.arange(4) < torch.tensor([[4], [2]])
        expected = module(ids(), prepend_embeds=vectors, prepend_mask=mask)[:, 4:]
        actual = model(ids(), prepend_embeds=vectors, prepend_mask=mask.long(), use_cache=False).logits
        close(actual, expected)


def test_what_has_no_counterpart_is_refused():
    module, arguments = vit({}, {})
    writer, text_arguments = decoder()
    with pytest.raises(ConversionError, match="class Encoder"):
        convert_image_classifier(module, {**IMAGES, "attn_layers": {"class": "Decoder", **LAYERS}})
    with pytest.raises(ConversionError, match="no argument stride"):
        convert_image_classifier(module, {**arguments, "stride": 2})
    with pytest.raises(ConversionError, match="must hold patch_size"):
        convert_image_classifier(module, {"image_size": 8, "attn_layers": arguments["attn_layers"]})
    with pytest.raises(ConversionError, match="num_channels|shape|do the arguments belong"):
        convert_image_classifier(module, {**arguments, "channels": 1})
    wide, wide_arguments = vit({}, {"dim": 48}, classes=None)
    with pytest.raises(ConversionError, match="does not fit .*cross_attention_hidden_size .32., got 48"):
        convert_image_text(wide, wide_arguments, writer, text_arguments)
    plain = {**text_arguments, "attn_layers": {"class": "Decoder", **LAYERS}}
    alone = x_transformers.TransformerWrapper(num_tokens=TOKENS, max_seq_len=24,
                                              attn_layers=x_transformers.Decoder(**LAYERS))  # fmt: skip
    with pytest.raises(ConversionError, match="cross_attend=True"):
        convert_image_text(module, arguments, alone, plain)


def test_every_flag_is_in_a_case():
    used = {name for wrapper, _ in CASES.values() for name in wrapper} | {*IMAGES, "num_classes"}
    assert {flag.name for flag in IMAGE_FLAGS} == used
