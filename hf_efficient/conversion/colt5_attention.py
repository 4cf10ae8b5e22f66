"""CoLT5-attention 0.11.2 -> the routed blocks here, with every option.

The converted block computes what the original computes, as long as the original's scores are not saturated: it chooses
tokens by their scores, in which many are exactly 1 once logits are large, and here the logits decide. Its mistakes are
not converted: samples that influence each other, positions chosen under a mask, windows that attend to their filling.
Its autoregressive attention routes by what comes later; its weights load, and are routed causally here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..modeling.token_router import RouterOptions
from .routed_block_files import BlockDescription
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer


FIXED_TABLE = "a fixed table that is computed instead"
# The original's norms have no epsilon but one far below every number that occurs.
NORM_EPS = 1e-24


def convert_colt5_attention(module: nn.Module) -> tuple[nn.Module, ConversionReport]:
    """A block of ours with the weights and the behaviour of one of CoLT5-attention.

    Args:
        module: a `ConditionalRoutedFeedForward`, `-Attention`, `-AutoregressiveAttention`, `-CrossAttention`,
            `-ImageAttention` or `-TransformerBlock`.

    Raises:
        ConversionError: another class, or an option without a counterpart.
    """
    block = describe(module).build()
    transfer = WeightTransfer(module.state_dict(), type(module).__name__, type(block).__name__)
    _KINDS[type(module).__name__][1](transfer, "", "", module)
    transfer.drop_matching(lambda key: key.endswith("rotary_emb.inv_freq"), FIXED_TABLE)
    return block.eval(), transfer.load_into(block)


def describe(module: nn.Module) -> BlockDescription:
    """Which block of ours `convert_colt5_attention` makes of a module, and how it is constructed.

    Raises:
        ConversionError: as there.
    """
    name = type(module).__name__
    if name not in _KINDS:
        raise ConversionError(f"the source must be one of {', '.join(_KINDS)}, got {name}")
    return _KINDS[name][0](module)


def original_module(state: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> nn.Module:
    """The module of CoLT5-attention, which has to be installed, with the weights `state`.

    Args:
        arguments: those of its constructor, and `"class"`, its name.

    Raises:
        ConversionError: no such class, arguments it does not take, weights that are not its own, no CoLT5-attention.
    """
    try:
        import colt5_attention
        from colt5_attention.vit import ConditionalRoutedViT
    except ImportError as error:
        raise ConversionError(f"colt5-attention must be installed to read its modules, got {error}") from error
    arguments, classes = dict(arguments), {name: getattr(colt5_attention, name, None) for name in _KINDS}
    classes |= {
        "ConditionalRoutedCrossAttention": colt5_attention.transformer_block.ConditionalRoutedCrossAttention,
        "ConditionalRoutedViT": ConditionalRoutedViT,
    }
    name = arguments.pop("class", None)
    if name not in classes:
        raise ConversionError(f'the arguments must hold "class", one of {", ".join(classes)}, got {name!r}')
    try:
        module = classes[name](**arguments)
        module.load_state_dict(state)
    except (TypeError, AssertionError, RuntimeError) as error:
        raise ConversionError(f"the arguments must be those of the {name} that was saved, got: {error}") from error
    return module.eval()


def router_options(router: nn.Module) -> RouterOptions:
    if router.routing_token is None:
        raise ConversionError("a router must have its own routing_token, got learned_routing_tokens=True")
    if router.route_block_size is not None:
        raise ConversionError(
            f"route_block_size must be None, got {router.route_block_size}: rows of any length are routed whole here"
        )
    return RouterOptions(
        score_ratio=router.fetch_k_ratio,
        temperature=router.eps,
        method="coordinate_descent",
        num_iterations=router.n_iters,
        initial_temperature=router.eps_init,
        temperature_decay=router.eps_decay,
        straight_through=router.straight_through,
        normalization="cosine" if router.cosine_sim_routing else "none",
    )


def feed_forward_options(module: nn.Module) -> dict:
    return {
        "light_intermediate_size": module.light_ff[1].out_features,
        "heavy_intermediate_size": module.heavy_ff[1].out_features,
        "num_routed": module.num_heavy_tokens,
        "hidden_act": "gelu",
        "gated": False,
        "bias": True,
        "norm_eps": NORM_EPS,
        "router_options": router_options(module.router),
    }


def _heavy_options(module: nn.Module, queries: int, keys: int) -> dict:
    heavy = module.heavy_attn
    rotary = getattr(module, "rotary_emb", None)
    return {
        "num_routed_queries": queries,
        "num_routed_keys": keys,
        "num_key_value_sets": module.kv_router.num_routing_tokens,
        "rotary_base": None if rotary is None else 10000.0,
        "multiply_keys_by_score": heavy.multiply_keys_by_score,
        "multiply_queries_by_score": getattr(module, "multiply_queries_by_score", False),
        "null_query_token": module.null_q_token is not None,
        "null_key_value": True,
        "norm_eps": NORM_EPS,
        "router_options": router_options(module.q_router),
    }


def attention_options(module: nn.Module) -> dict:
    light, heavy = module.light_attn, module.heavy_attn
    options = _heavy_options(module, module.num_heavy_tokens_q, module.num_heavy_tokens_kv)
    options |= {"heavy_heads": heavy.heads, "heavy_head_dim": heavy.null_kv.shape[-1]}
    if light is None:
        return options | {"light_heads": 0}
    return options | {
        "light_heads": light.heads,
        "light_head_dim": light.to_qkv.out_features // (3 * light.heads),
    }


def _width(module: nn.Module) -> int:
    return module.heavy_attn.to_q.in_features


def _attention(module: nn.Module) -> BlockDescription:
    return BlockDescription("RoutedAttention", _width(module), _self_attention_options(module))


def _self_attention_options(module: nn.Module) -> dict:
    # Its buckets are half as wide as its window, and it sees that far to either side.
    radius = 1 if module.light_attn is None else module.light_attn.window_size
    return {**attention_options(module), "light_norm_type": "layer_norm", "radius": radius}


def _autoregressive(module: nn.Module) -> BlockDescription:
    options = attention_options(module)
    window = module.heavy_window_size
    # Numbers of keys are those of a whole past there, and of a window here.
    options["num_routed_keys"] = min(options["num_routed_keys"], window)
    options |= {
        "light_norm_type": "layer_norm",
        "radius": 2 * module.light_attn.window_size - 1,
        "routing_window": window,
    }
    return BlockDescription("RoutedAutoregressiveAttention", _width(module), options)


def _cross_attention(module: nn.Module) -> BlockDescription:
    heavy = module.heavy_attn
    options = _heavy_options(module, module.num_tokens_q, module.num_tokens_kv)
    options |= {"num_heads": heavy.heads, "head_dim": heavy.null_kv.shape[-1]}
    return BlockDescription("RoutedCrossAttention", _width(module), options)


def _image_attention(module: nn.Module) -> BlockDescription:
    options = attention_options(module) | {
        "window_size": module.light_window_size,
        "channel_first": module.channel_first,
        "heavy_in_windows": True,
    }
    return BlockDescription("RoutedImageAttention", _width(module), options)


def _feed_forward(module: nn.Module) -> BlockDescription:
    return BlockDescription("RoutedFeedForward", module.light_ff[1].in_features, feed_forward_options(module))


def _block(module: nn.Module) -> BlockDescription:
    attention, feed_forward = module.conditional_attn, module.conditional_ff
    options = {
        "attention": _self_attention_options(attention),
        "feed_forward": feed_forward_options(feed_forward),
    }
    return BlockDescription("RoutedTransformerBlock", _width(attention), options)


def move_feed_forward(transfer: WeightTransfer, source: str, target: str, module: nn.Module) -> None:
    transfer.move(f"{target}router.routing_vectors", f"{source}router.routing_token")
    for branch in ("light", "heavy"):
        transfer.move(f"{target}{branch}_norm.weight", f"{source}{branch}_ff.0.gamma")
        transfer.move_linear(f"{target}{branch}_mlp.up_proj", f"{source}{branch}_ff.1")
        transfer.move_linear(f"{target}{branch}_mlp.down_proj", f"{source}{branch}_ff.3")


def move_attention(transfer: WeightTransfer, source: str, target: str, module: nn.Module) -> None:
    if getattr(module, "light_attn", None) is not None:
        light = f"{target}light_attn."
        if f"{source}light_attn.norm.gamma" in transfer.source:
            transfer.move(f"{light}norm.weight", f"{source}light_attn.norm.gamma")
        else:
            transfer.move_linear(f"{light}norm", f"{source}light_attn.norm")
        for part, name in enumerate(("q_proj", "k_proj", "v_proj")):
            fused = f"{source}light_attn.to_qkv.weight"
            transfer.move(f"{light}{name}.weight", fused, lambda rows, part=part: rows.chunk(3)[part])
        transfer.move(f"{light}o_proj.weight", f"{source}light_attn.to_out.weight")
    heavy, old = f"{target}heavy_attn.", f"{source}heavy_attn."
    transfer.move(f"{heavy}q_router.routing_vectors", f"{source}q_router.routing_token")
    transfer.move(f"{heavy}key_value_router.routing_vectors", f"{source}kv_router.routing_token")
    transfer.move(f"{heavy}norm.weight", f"{old}norm.gamma")
    transfer.move(f"{heavy}q_proj.weight", f"{old}to_q.weight")
    heads = module.heavy_attn.heads
    for part, name in enumerate(("k", "v")):
        transfer.move(f"{heavy}{name}_proj.weight", f"{old}to_kv.weight", lambda t, p=part: _of_each_head(t, heads, p))
    transfer.move(f"{heavy}o_proj.weight", f"{old}to_out.weight")
    transfer.move(f"{heavy}null_key", f"{old}null_kv", lambda pair: pair[0])
    transfer.move(f"{heavy}null_value", f"{old}null_kv", lambda pair: pair[1])
    if module.null_q_token is not None:
        transfer.move(f"{heavy}null_query_token", f"{source}null_q_token")


def _move_block(transfer: WeightTransfer, source: str, target: str, module: nn.Module) -> None:
    move_attention(transfer, "conditional_attn.", "self_attn.", module.conditional_attn)
    move_feed_forward(transfer, "conditional_ff.", "mlp.", module.conditional_ff)


def _of_each_head(rows: Tensor, heads: int, part: int) -> Tensor:
    """The keys' (0) or values' (1) rows of `[heads * 2 * D, C]`, in which each head has both one after the other."""
    return torch.chunk(rows.unflatten(0, (heads, -1)), 2, dim=1)[part].flatten(0, 1)


_KINDS = {
    "ConditionalRoutedFeedForward": (_feed_forward, move_feed_forward),
    "ConditionalRoutedAttention": (_attention, move_attention),
    "ConditionalRoutedAutoregressiveAttention": (_autoregressive, move_attention),
    "ConditionalRoutedCrossAttention": (_cross_attention, move_attention),
    "ConditionalRoutedImageAttention": (_image_attention, move_attention),
    "ConditionalRoutedTransformerBlock": (_block, _move_block),
}
