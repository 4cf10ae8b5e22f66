# Copyright 2026 The hf_efficient authors. Licensed under the Apache License, Version 2.0.
"""What an XTransformerConfig cannot be, group by group, each with the reason.

A rule raises a `ValueError` that names the field, what was expected and what came.
"""

import dataclasses


# Rotary scalings whose angles depend on the positions alone, so that a cached key stays what it was.
ROPE_TYPES = ("default", "linear", "yarn", "llama3")


def check_at_least(config, minimum: int, *names: str) -> None:
    """The fields `names` are None or at least `minimum`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < minimum:
            raise ValueError(f"{name} must be at least {minimum}, got {value}")


def refuse(config, name: str, needed: str, why: str) -> None:
    """Refuse the field `name`, which needs `needed`."""
    raise ValueError(f"{name}={getattr(config, name)!r} needs {needed}: {why}")


def check_each_branch(config, name: str, holds, expected: str) -> None:
    """The field `name` is one value, or a list with one for each branch of the stack, for all of which `holds`."""
    value, branches = getattr(config, name), sum(len(order) for order in config.block_orders)
    values = value if isinstance(value, list) else [value]
    # Of an encoder–decoder, each half checks its own list.
    if isinstance(value, list) and len(value) != branches and not config.is_encoder_decoder:
        raise ValueError(f"{name} must have one entry for each of the {branches} branches, got {len(value)}")
    if not all(holds(entry) for entry in values):
        raise ValueError(f"{name} must be {expected}, got {value}")


def check_sizes(config) -> None:
    """Ranges of single numbers."""
    check_at_least(config, 1, "vocab_size", "intermediate_size", "num_key_value_heads", "max_position_embeddings")
    check_at_least(config, 1, "head_dim", "value_head_dim", "embedding_size", "value_gate_rank", "qk_norm_groups")
    check_at_least(config, 1, "sliding_window", "dynamic_bias_depth", "xpos_scale_base")
    check_at_least(config, 1, "num_residual_streams", "sinkhorn_iterations")
    check_at_least(config, 0, "num_memory_tokens", "num_memory_key_values", "num_cls_tokens")
    check_at_least(config, 0, "mem_len")
    types = config.type_vocab_size
    if types < 0 if isinstance(types, int) else min(types, default=0) < 1:
        raise ValueError(f"type_vocab_size must be at least 0, or a list of numbers of at least 1, got {types}")
    check_at_least(config, 0, "chunk_size_feed_forward", "sliding_window_ahead")
    for name in (
        "embedding_dropout", "attention_dropout", "attention_output_dropout", "feed_forward_dropout",
        "feed_forward_output_dropout", "masked_key_probability", "encoder_token_dropout",
        "classifier_dropout",
    ):  # fmt: skip
        if not 0 <= getattr(config, name) < 1:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")
    for name in ("attn_logit_softcapping", "hidden_state_softcapping"):
        if getattr(config, name) is not None and getattr(config, name) <= 0:
            raise ValueError(f"{name} must be positive or None, got {getattr(config, name)}")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"num_key_value_heads must divide num_attention_heads ({config.num_attention_heads}), got "
            f"{config.num_key_value_heads}"
        )


def check_positions(config) -> None:
    """Absolute and rotary positions, and biases."""
    if config.rotary_positions is not None:
        kind = config.rope_parameters.get("rope_type", "default")
        if kind not in ROPE_TYPES:
            raise ValueError(
                f"rope_parameters must have a rope_type whose angles do not depend on the length, so that cached "
                f"keys stay right: one of {', '.join(ROPE_TYPES)}, got {kind!r}"
            )
        if config.rotary_dim % 2 or config.rotary_dim < 2:
            raise ValueError(
                f"head_dim times rope_parameters['partial_rotary_factor'] must be even and at least 2, got "
                f"{config.rotary_dim}"
            )
        if config.rotary_positions == "xpos" and kind not in ("default", "linear"):
            refuse(config, "rotary_positions", "rope_type 'default' or 'linear'", "others rescale scores themselves")
    if config.absolute_positions == "scaled_sinusoidal":
        if config.token_size % 2:
            raise ValueError(f"embedding_size must be even for sinusoidal positions, got {config.token_size}")
        if config.l2_normalize_embeddings:
            refuse(
                config, "l2_normalize_embeddings", "absolute_positions 'learned' or None", "sinusoids have no table"
            )
    if config.alibi_slopes is not None and len(config.alibi_slopes) != config.num_attention_heads:
        raise ValueError(
            f"alibi_slopes must have num_attention_heads ({config.num_attention_heads}) entries, got "
            f"{len(config.alibi_slopes)}"
        )
    buckets, distance = config.relative_attention_num_buckets, config.relative_attention_max_distance
    if config.position_bias == "t5" and (buckets < 4 or buckets % 2 or distance < buckets):
        raise ValueError(
            f"relative_attention_num_buckets must be even, at least 4 and at most relative_attention_max_distance "
            f"({distance}), got {buckets}"
        )


def check_attention(config) -> None:
    """Options of attention that need, or exclude, one another."""
    if config.qk_norm in ("l2", "l2_learned") and config.head_dim % config.qk_norm_groups:
        raise ValueError(f"qk_norm_groups must divide head_dim ({config.head_dim}), got {config.qk_norm_groups}")
    if config.qk_norm in (None, "rms", "rms_key") and config.qk_norm_groups != 1:
        refuse(config, "qk_norm_groups", "qk_norm 'l2' or 'l2_learned'", "no other norm has groups")
    for name, plain in (("value_gate_rank", None), ("value_gate_per_head", False), ("value_gate_bias", False)):
        if config.value_gate is None and getattr(config, name) != plain:
            refuse(config, name, "value_gate 'sigmoid' or 'silu'", "there is no gate to shape")
    if config.value_gate_rank is not None and config.value_gate_per_head:
        refuse(config, "value_gate_per_head", "value_gate_rank=None", "a gate per head has no bottleneck")
    if config.attention_on_attention and config.attention_out_bias:
        refuse(config, "attention_on_attention", "attention_out_bias=False", "the GLU takes the projection's place")
    if config.attention_z_loss_coef < 0:
        raise ValueError(f"attention_z_loss_coef must be at least 0, got {config.attention_z_loss_coef}")
    if config.attention_z_loss_coef and config.is_encoder_decoder:
        refuse(
            config, "attention_z_loss_coef", "is_encoder_decoder=False", "only the causal model adds it to its loss"
        )
    if config.mem_len:
        if config.absolute_positions is not None:
            refuse(config, "mem_len", "absolute_positions=None", "they begin anew in each segment")
        for name in ("num_memory_tokens", "num_cls_tokens", "prepend_embeddings"):
            if getattr(config, name):
                refuse(config, name, "mem_len=0", "each segment would remember those of the last")
        if config.shifts_tokens:
            refuse(config, "mem_len", "shift_tokens=0", "a segment's first tokens would not know their neighbours")
        if config.prefix_lm:
            refuse(config, "mem_len", "prefix_lm=False", "a prefix stands in the first segment")
        if config.masked_key_probability:
            refuse(config, "mem_len", "masked_key_probability=0", "it hides tokens of one segment")
        if config.is_encoder_decoder:
            refuse(config, "mem_len", "is_encoder_decoder=False", "its decoder begins anew with each source")
    if config.sliding_window_ahead is not None and config.sliding_window is None:
        refuse(config, "sliding_window_ahead", "sliding_window", "without a window everything is seen")
    if config.kernel_backend == "triton" and config.materializes_scores:
        refuse(config, "kernel_backend", "no talking heads or residual attention", "they hold N×M scores in PyTorch")
    if config.cross_residual_attention and not (config.add_cross_attention or config.is_encoder_decoder):
        refuse(config, "cross_residual_attention", "add_cross_attention=True", "there are no such scores")


def check_layout(config) -> None:
    """Norms, residual rules, and the order in which branches and blocks run."""
    if config.gate_channel_scale and not config.gated_feed_forward:
        refuse(config, "gate_channel_scale", "gated_feed_forward=True", "there is no gate to scale")
    if config.residual_type == "gru" and config.residual_scale != 1:
        refuse(config, "residual_scale", "residual_type='sum'", "a GRU cell does not sum")
    if config.num_residual_streams > 1:
        if config.norm_position not in ("pre", "sandwich"):
            refuse(config, "num_residual_streams", "norm_position 'pre' or 'sandwich'", "streams are summed unnormed")
        for name, plain in (("residual_type", "sum"), ("residual_scale", 1), ("learned_residual_scale", False)):
            if getattr(config, name) != plain:
                refuse(config, name, "num_residual_streams=1", "hyper-connections are a residual rule themselves")
    elif config.residual_stream_mixing != "free":
        refuse(config, "residual_stream_mixing", "num_residual_streams above 1", "a single stream mixes with nothing")
    if config.norm_type == "dynamic_tanh" and config.norm_position == "post":
        refuse(config, "norm_type", "a norm_position other than 'post'", "it bounds the stream, which then dies out")
    if config.cross_attention_only:
        if config.sublayer_order is not None:
            refuse(config, "cross_attention_only", "sublayer_order=None", "the order already says what runs")
        if config.is_encoder_decoder or not config.add_cross_attention:
            refuse(config, "cross_attention_only", "one stack with add_cross_attention=True", "else nothing is read")
    if config.sublayer_order is not None:
        order, crosses = config.sublayer_order, config.add_cross_attention or config.is_encoder_decoder
        if "a" not in order or set(order) - set("afc|") or ("c" in order) != crosses:
            raise ValueError(
                "sublayer_order must hold a and f, c exactly where there is cross-attention, and at least one "
                f"'a', got {order!r}"
            )
        if len(config.block_orders) != config.num_hidden_layers and config.layer_execution_order is None:
            count = "bars and one block more" if "|" in order else "times 'a'"
            raise ValueError(
                f"sublayer_order must have num_hidden_layers ({config.num_hidden_layers}) {count}, got {order!r}"
            )
        if config.macaron:
            refuse(config, "macaron", "sublayer_order=None", "the order already says where feed-forwards stand")
        if any(block.count("c") > 1 for block in config.block_orders):
            raise ValueError(f"sublayer_order must have at most one 'c' after each 'a', got {order!r}")
        if "|" in order:
            check_split_blocks(config)
    order = config.layer_execution_order
    if order is not None:
        if len(order) != config.num_hidden_layers:
            raise ValueError(
                f"layer_execution_order must have num_hidden_layers ({config.num_hidden_layers}) entries, got "
                f"{len(order)}"
            )
        if set(order) != set(range(len(config.block_orders))):
            raise ValueError(
                f"layer_execution_order must name every block from 0 to {len(config.block_orders) - 1} and no "
                f"other, got {order}"
            )
    largest = (config.hidden_size - 1) // 2  # each shift takes a part of the channels
    check_each_branch(config, "shift_tokens", lambda shift: 0 <= shift <= largest, f"from 0 to {largest}")
    check_each_branch(config, "layerdrop", lambda share: 0 <= share < 1, "in [0, 1)")


def check_split_blocks(config) -> None:
    """Blocks that `sublayer_order` parts by bars, some of which lack self-attention."""
    order, blocks = config.sublayer_order, config.block_orders
    if not all(blocks) or any(block.count("a") > 1 for block in blocks):
        raise ValueError(f"sublayer_order must have branches between its bars, at most one 'a' each, got {order!r}")
    first = (config.layer_execution_order or [0])[0]
    if "a" not in blocks[0] or not 0 <= first < len(blocks) or "a" not in blocks[first]:
        raise ValueError(
            f"sublayer_order must have an 'a' in its first block and in the one that runs first: a cache counts its "
            f"tokens there; got {order!r} and layer_execution_order={config.layer_execution_order}"
        )
    if all("a" in block for block in blocks):
        return
    if config.mem_len:
        refuse(config, "mem_len", "self-attention in every block", "a memory has the states before each")
    if config.shifts_tokens:
        refuse(config, "shift_tokens", "self-attention in every block", "its cache keeps the tokens before")


def check_kind(config) -> None:
    """Decoders, encoders and both."""
    if config.prefix_lm:
        if config.shifts_tokens:
            refuse(config, "prefix_lm", "shift_tokens=0", "a shift only knows what comes before")
        if config.rotary_positions == "xpos":
            refuse(config, "prefix_lm", "rotary_positions other than 'xpos'", "its decay grows for later keys")
    if config.encoder_overrides:
        known = {field.name for field in dataclasses.fields(config)}
        unknown = sorted(set(config.encoder_overrides) - known)
        if unknown:
            raise ValueError(f"encoder_overrides must hold fields of XTransformerConfig, got {unknown}")
        if not config.is_encoder_decoder:
            raise ValueError("encoder_overrides needs is_encoder_decoder=True, got False")
        size = config.encoder_overrides.get("hidden_size", config.hidden_size)
        if size != config.encoder_state_size:
            raise ValueError(
                f"cross_attention_hidden_size must be the encoder's hidden_size ({size}), got "
                f"{config.encoder_state_size}"
            )
    if config.classifier_pooling == "cls" and not config.num_cls_tokens:
        refuse(config, "classifier_pooling", "num_cls_tokens above 0", "there is no token to read")
    if config.share_embeddings and config.is_encoder_decoder:
        for name in ("vocab_size", "embedding_size"):
            other = (config.encoder_overrides or {}).get(name, getattr(config, name))
            if other != getattr(config, name):
                raise ValueError(
                    f"share_embeddings=True needs one {name} ({getattr(config, name)}), got {other} in "
                    "encoder_overrides"
                )
    if config.tie_word_embeddings and config.token_size != config.hidden_size:
        refuse(config, "tie_word_embeddings", f"embedding_size={config.hidden_size}", "the head reads hidden states")


def check_stack(config) -> None:
    """See `XTransformerConfig.check_stack`."""
    if config.is_encoder_decoder:
        refuse(config, "is_encoder_decoder", "XTransformerForConditionalGeneration", "this model is one stack")
    if config.is_decoder:
        if config.num_cls_tokens:
            refuse(
                config, "num_cls_tokens", "is_decoder=False", "in front of a causal sequence they see nothing of it"
            )
        if config.cross_attention_only:
            refuse(config, "cross_attention_only", "is_decoder=False", "without self-attention nothing is causal")
        return
    if config.attention_z_loss_coef:
        refuse(config, "attention_z_loss_coef", "is_decoder=True", "only the causal model adds it to its loss")
    if config.cross_attention_only and config.mem_len:
        refuse(config, "mem_len", "cross_attention_only=False", "self-attention is what remembers")
    if config.rotary_positions == "xpos":
        refuse(config, "rotary_positions", "is_decoder=True", "its decay grows without bound for later keys")
    if config.prefix_lm:
        refuse(config, "prefix_lm", "is_decoder=True", "all tokens of an encoder see each other")
