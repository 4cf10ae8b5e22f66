"""x-transformers' images -> XTransformer: `ViTransformerWrapper`, and the captioner and PaLI around one.

    arguments = {"image_size": 256, "patch_size": 32, "num_classes": 1000,
                 "attn_layers": {"class": "Encoder", "dim": 512, "depth": 6, "heads": 8}}
    classifier, report = convert_image_classifier(state_dict, arguments)
    captioner, report = convert_image_text(vit, vit_arguments, decoder, decoder_arguments)

The original has no class for the last two: they are an image encoder, and a `TransformerWrapper` or `XTransformer`
that is given its output.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..configuration.x_transformer import DERIVED_FROM, XTransformerConfig
from ..configuration.x_transformer_inputs import XTransformerInputsConfig
from ..modeling.x_transformer import XTransformerPreTrainedModel
from ..modeling.x_transformer_image_text import XTransformerForImageTextToText
from ..modeling.x_transformer_images import XTransformerForImageClassification, XTransformerImageEncoder
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer
from .x_transformers import LATEST, SourceStack, convert_x_transformers
from .x_transformers_era import Era
from .x_transformers_options import REQUIRED, Flag, complete, translate


# `ViTransformerWrapper`: nothing of it is ever cached.
IMAGE_FLAGS = tuple(
    Flag(name, default, field, "x_transformer_images.py", cached="—")
    for name, default, field in (
        ("image_size", REQUIRED, "image_size"),
        ("patch_size", REQUIRED, "patch_size"),
        ("channels", 3, "num_channels"),
        ("num_classes", None, "num_labels"),
        ("post_emb_norm", False, "embedding_norm"),
        ("num_register_tokens", 0, "num_register_tokens"),
        ("emb_dropout", 0.0, "embedding_dropout"),
    )
)

Source = nn.Module | Mapping[str, Tensor]


def convert_image_classifier(
    source: Source, arguments: Mapping[str, Any], *, version: str = LATEST
) -> tuple[XTransformerPreTrainedModel, ConversionReport]:
    """`XTransformerForImageClassification` of a `ViTransformerWrapper`; `XTransformerImageEncoder` without classes.

    Args:
        source: the module or its state dict.
        arguments: what it was called with, where `attn_layers` holds the arguments of the `Encoder`.
        version: the release that trained the weights.

    Raises:
        ConversionError: anything that has no exact counterpart, and weights that do not fit the arguments.
    """
    state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    wrapper = dict(arguments)
    layers = dict(wrapper.pop("attn_layers", {}))
    if layers.pop("class", None) != "Encoder":
        raise ConversionError(f"attn_layers of a ViTransformerWrapper must name the class Encoder, got {arguments}")
    flags = complete(IMAGE_FLAGS, wrapper, "ViTransformerWrapper")
    # The stack as it would be around tokens, without tokens and their positions.
    stack = SourceStack("Encoder", {"num_tokens": 1, "max_seq_len": 0}, layers, Era(version))
    fields = {**stack.fields(), **translate(IMAGE_FLAGS, flags), "image_positions": "learned"}
    for name in ("vocab_size", "max_position_embeddings"):
        del fields[name]
    config = XTransformerConfig(**fields)
    is_classifier = flags["num_classes"] is not None
    model = (XTransformerForImageClassification if is_classifier else XTransformerImageEncoder)(config)
    target = "model." if is_classifier else ""
    transfer = WeightTransfer(state, f"ViTransformerWrapper of x-transformers {version}", type(model).__name__)
    inputs = f"{target}embed_tokens."
    transfer.move(f"{inputs}positions", "pos_embedding", lambda table: table[0])
    if config.num_register_tokens:
        transfer.move(f"{inputs}registers", "register_tokens")
    weights = stack.weights(transfer, config)
    weights.layer_norm(f"{inputs}patches.patch_norm", "patch_to_embedding.0")
    transfer.move_linear(f"{inputs}patches.projection", "patch_to_embedding.1")
    weights.layer_norm(f"{inputs}patches.norm", "patch_to_embedding.2")
    if config.embedding_norm:
        weights.layer_norm(f"{inputs}norm", "post_emb_norm")
    if is_classifier:
        transfer.move_linear("score", "mlp_head")
    weights.stack("attn_layers.", target)
    return model.eval(), transfer.load_into(model)


def convert_image_text(
    image_source: Source,
    image_arguments: Mapping[str, Any],
    text_source: Source,
    text_arguments: Mapping[str, Any],
    *,
    version: str = LATEST,
) -> tuple[XTransformerForImageTextToText, ConversionReport]:
    """`XTransformerForImageTextToText` of an image encoder and what reads its output.

    Args:
        image_source, image_arguments: a `ViTransformerWrapper`, see `convert_image_classifier`; its classes, if it has
            any, are left behind.
        text_source, text_arguments: a `TransformerWrapper` around a `Decoder` with `cross_attend`, whose `context` is
            the image (a captioner); or an `XTransformer`, whose `src_prepend_embeds` it is (PaLI). See
            `convert_x_transformers`.
        version: the release that trained the weights.

    Raises:
        ConversionError: as in both, and widths that do not fit together.
    """
    images, image_report = convert_image_classifier(image_source, image_arguments, version=version)
    text, text_report = convert_x_transformers(text_source, text_arguments, version=version)
    is_pali = text.config.is_encoder_decoder
    if not is_pali and not text.config.add_cross_attention:
        raise ConversionError("text_arguments must be those of a Decoder with cross_attend=True or of an XTransformer")
    own = {name for kind in (XTransformerConfig, XTransformerInputsConfig) for name in kind.__annotations__}
    of_images = {"image_size", "image_positions", "patch_size", "num_channels", "num_register_tokens"}
    derived = {name for names in DERIVED_FROM.values() for name in names}
    fields = {name: getattr(text.config, name) for name in own - of_images}
    fields |= {name: getattr(images.config, name) for name in of_images}
    fields |= {
        "is_encoder_decoder": True,
        "is_decoder": False,
        "add_cross_attention": False,
        "image_fusion": "prepended" if is_pali else "cross_attention",
        "image_encoder_overrides": {
            name: getattr(images.config, name)
            for name in own - of_images - {"is_decoder", "add_cross_attention", "use_cache", "encoder_overrides"}
            if name in derived or getattr(images.config, name) != getattr(text.config, name)
        },
    }
    try:
        model = XTransformerForImageTextToText(XTransformerConfig(**fields)).to(text.dtype).eval()
    except ValueError as error:
        raise ConversionError(f"the image encoder does not fit what reads it: {error}") from error
    vision = "model.encoder.vision_tower." if is_pali else "model.encoder."
    decoder = "model." if is_pali else "model.decoder."
    report = ConversionReport(f"{image_report.source} and {text_report.source}", type(model).__name__)
    state = {}
    for part, part_report, prefix, place in (
        (images, image_report, "model." if hasattr(images, "score") else "", vision),
        (text, text_report, "model.", decoder),
    ):
        names = {
            name: place + name.removeprefix(prefix) if name.startswith(prefix) else name
            for name in part.state_dict()
            if not name.startswith("score.")
        }
        state |= {new: part.state_dict()[name] for name, new in names.items()}
        report.moved |= {names[name]: source for name, source in part_report.moved.items() if name in names}
        report.dropped |= part_report.dropped
        report.notes += part_report.notes
    model.load_state_dict(state)
    return model, report
