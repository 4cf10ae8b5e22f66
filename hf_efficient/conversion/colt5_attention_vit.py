"""CoLT5-attention's `ConditionalRoutedViT` -> `CoLT5ForImageClassification`, windows that nothing leaves included."""

from torch import nn

from ..configuration.colt5 import CoLT5Config
from ..modeling.colt5_images import CoLT5ForImageClassification
from .colt5_attention import attention_options, feed_forward_options, move_attention, move_feed_forward
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer


def convert_colt5_vit(module: nn.Module, image_size: int) -> tuple[CoLT5ForImageClassification, ConversionReport]:
    """An image classifier with the weights and the results of a `ConditionalRoutedViT`.

    Args:
        module: the original.
        image_size: what it was constructed with; it does not keep it.

    Raises:
        ConversionError: another class, images or patches that are no squares, heads of two sizes.
    """
    name = type(module).__name__
    if name != "ConditionalRoutedViT":
        raise ConversionError(f"the source must be a ConditionalRoutedViT, got {name}")
    if not isinstance(image_size, int):
        raise ConversionError(f"image_size must be one number, for square images, got {image_size!r}")
    model = CoLT5ForImageClassification(_config(module, image_size))
    transfer = WeightTransfer(module.state_dict(), name, type(model).__name__)
    for part, layer in enumerate(("patch_norm", "projection", "norm"), start=1):
        transfer.move_linear(f"model.embeddings.{layer}", f"to_patch_embedding.{part}")
    for index, (attention, feed_forward) in enumerate(module.transformer.layers):
        source, target = f"transformer.layers.{index}.", f"model.layers.{index}."
        move_attention(transfer, f"{source}0.", f"{target}self_attn.", attention)
        move_feed_forward(transfer, f"{source}1.", f"{target}mlp.", feed_forward)
    transfer.move_linear("model.norm", "linear_head.1")
    transfer.move_linear("classifier", "linear_head.2")
    return model.eval(), transfer.load_into(model)


def _config(module: nn.Module, image_size: int) -> CoLT5Config:
    sides = module.to_patch_embedding[0].axes_lengths
    if sides["p1"] != sides["p2"]:
        raise ConversionError(f"patches must be squares, got {sides['p1']} by {sides['p2']}")
    attention, feed_forward = module.transformer.layers[0]
    heads, inner = attention_options(attention), feed_forward_options(feed_forward)
    if heads["light_head_dim"] != heads["heavy_head_dim"]:
        raise ConversionError(
            f"light and heavy heads must be of one size, got {heads['light_head_dim']} and {heads['heavy_head_dim']}"
        )
    router = heads["router_options"]
    return CoLT5Config(
        is_encoder_decoder=False,
        hidden_size=module.linear_head[1].normalized_shape[0],
        num_hidden_layers=len(module.transformer.layers),
        num_attention_heads=heads["heavy_heads"],
        num_light_attention_heads=heads["light_heads"],
        num_heavy_attention_heads=heads["heavy_heads"],
        head_dim=heads["heavy_head_dim"],
        light_intermediate_size=inner["light_intermediate_size"],
        heavy_intermediate_size=inner["heavy_intermediate_size"],
        hidden_act=inner["hidden_act"],
        gated_feed_forward=inner["gated"],
        mlp_bias=inner["bias"],
        norm_eps=inner["norm_eps"],
        dropout_rate=0.0,
        heavy_position_embedding_type="none",
        num_routed_tokens=inner["num_routed"],
        num_routed_queries=heads["num_routed_queries"],
        num_routed_keys=heads["num_routed_keys"],
        num_key_value_sets=heads["num_key_value_sets"],
        routing_score_ratio=router.score_ratio,
        routing_temperature=router.temperature,
        routing_method=router.method,
        routing_iterations=router.num_iterations,
        routing_initial_temperature=router.initial_temperature,
        routing_temperature_decay=router.temperature_decay,
        straight_through_routing=router.straight_through,
        routing_normalization=router.normalization,
        multiply_keys_by_score=heads["multiply_keys_by_score"],
        null_query_token=heads["null_query_token"],
        null_key_value=heads["null_key_value"],
        image_size=image_size,
        patch_size=sides["p1"],
        num_channels=module.to_patch_embedding[1].normalized_shape[0] // sides["p1"] ** 2,
        image_window_size=attention.light_window_size,
        heavy_attention_in_windows=True,
        num_labels=module.linear_head[2].out_features,
    )
