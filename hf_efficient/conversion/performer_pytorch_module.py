"""Reads the constructor's arguments back out of a module of performer-pytorch 1.1.4, without importing the package."""

from typing import Any

from torch import nn

from .performer_pytorch_options import ENCODER_DECODER, LANGUAGE_MODEL, STACK
from .weight_transfer import ConversionError


def unwrapped(module: nn.Module) -> nn.Module:
    """The model inside `AutoregressiveWrapper` and the wrappers of parallel training."""
    while type(module).__name__ in ("AutoregressiveWrapper", "DataParallel", "DistributedDataParallel"):
        module = module.net if type(module).__name__ == "AutoregressiveWrapper" else module.module
    return module


def kind_of(module: nn.Module) -> str:
    """Which of the original's models this is, also for a subclass of it.

    Raises:
        ConversionError: none of them.
    """
    names = [cls.__name__ for cls in type(module).__mro__]
    for kind in (LANGUAGE_MODEL, STACK, ENCODER_DECODER):
        if kind in names:
            return kind
    raise ConversionError(
        f"the source must be a {LANGUAGE_MODEL}, {STACK} or {ENCODER_DECODER} of performer-pytorch or a state dict, "
        f"got {type(module).__name__}"
    )


def read_arguments(module: nn.Module) -> dict[str, Any]:
    """Arguments with which the constructor of `module`'s class would build it again."""
    kind = kind_of(module)
    if kind == LANGUAGE_MODEL:
        return _language_model(module)
    if kind == STACK:
        return _stack(module)
    encoder, decoder = module.enc, unwrapped(module.dec)
    parts = (("enc_", _language_model(encoder)), ("dec_", _language_model(decoder)))
    # What the constructor gives to both stands without a prefix; what it decides itself is no argument.
    own = ("dim", "no_projection", "causal", "cross_attend")
    arguments = {
        f"{prefix}{name}": value
        for prefix, part in parts
        for name, value in part.items()
        if name not in own or (prefix == "enc_" and name in ("causal", "cross_attend"))
    }
    return arguments | {
        "dim": parts[0][1]["dim"],
        "no_projection": parts[0][1]["no_projection"],
        "tie_token_embeds": encoder.token_emb is decoder.token_emb,
        "ignore_index": module.dec.ignore_index,
        "pad_value": module.dec.pad_value,
    }


def _language_model(module: nn.Module) -> dict[str, Any]:
    positions = type(module.pos_emb).__name__
    axial = positions == "AxialPositionalEmbedding"
    return {
        **_stack(module.performer),
        "num_tokens": module.token_emb.num_embeddings,
        "max_seq_len": module.max_seq_len,
        "emb_dropout": module.dropout.p,
        "tie_embed": module.to_out is None,
        "rotary_position_emb": positions == "FixedPositionalEmbedding",
        "axial_position_emb": axial,
        "axial_position_shape": tuple(module.pos_emb.shape) if axial else None,
    }


def _stack(module: nn.Module) -> dict[str, Any]:
    reversible = hasattr(module.net, "blocks")
    pairs = module.net.blocks if reversible else module.net.layers
    pairs = [(pair.f.net, pair.g.net) if reversible else tuple(pair) for pair in pairs]
    attentions = [_innermost(attention, "to_q") for attention, _ in pairs]
    cross = any(type(attention).__name__ == "CrossAttention" for attention in attentions)
    selves = attentions[::2] if cross else attentions
    attention, fast = selves[0], selves[0].fast_attention
    chunk = _innermost(pairs[0][1], "chunks")
    feed_forward = chunk.fn
    local = [attention.heads - attention.global_heads for attention in selves]
    windows = [attention.local_attn.window_size for attention in selves if attention.local_attn is not None]
    wrapper = type(pairs[0][0]).__name__
    return {
        "dim": attention.to_q.in_features,
        "depth": len(selves),
        "heads": attention.heads,
        "dim_head": fast.dim_heads,
        "local_attn_heads": tuple(local),
        "local_window_size": windows[0] if windows else 256,
        "causal": fast.causal,
        "ff_mult": feed_forward.w2.in_features // attention.to_q.in_features,
        "nb_features": fast.nb_features,
        "feature_redraw_interval": module.proj_updater.feature_redraw_interval,
        "reversible": reversible,
        "ff_chunks": chunk.chunks,
        "generalized_attention": fast.generalized_attention,
        "kernel_fn": fast.kernel_fn,
        "use_scalenorm": wrapper == "PreScaleNorm",
        "use_rezero": wrapper == "ReZero",
        "ff_glu": feed_forward.glu,
        "ff_dropout": feed_forward.dropout.p,
        "attn_dropout": attention.dropout.p,
        "cross_attend": cross,
        "no_projection": fast.no_projection,
        "auto_check_redraw": module.auto_check_redraw,
        "qkv_bias": attention.to_q.bias is not None,
        "attn_out_bias": attention.to_out.bias is not None,
        "shift_tokens": type(pairs[0][0].fn).__name__ == "PreShiftTokens",
    }


def _innermost(module: nn.Module, attribute: str) -> nn.Module:
    """The first module inside the wrappers around a branch that has `attribute`."""
    while not hasattr(module, attribute):
        module = module.fn
    return module
