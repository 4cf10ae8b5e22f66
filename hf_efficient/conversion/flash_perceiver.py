"""flash-perceiver (0.2.0 and the repository) -> PerceiverFlash: `Perceiver` and `PerceiverIO`, from a state dict.

    arguments = {"class": "Perceiver", "input_dim": 64, "depth": 2, "output_dim": 10, "num_latents": 128}
    model, report = convert_flash_perceiver(state_dict, arguments)

The width of a feed-forward depends on the release of flash-attn that trained it, and is read from the weights. An
`input_dim` that is a number means one tensor for all layers, of which the original gives each the learned tokens of
its first layer; a list, also of equal widths, means an input, and tokens, for each.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.perceiver_flash import PerceiverFlashConfig
from ..modeling.perceiver_flash import PerceiverFlashIOModel, PerceiverFlashModel, PerceiverFlashPreTrainedModel
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer


_SHARED = {
    "input_dim": None,
    "depth": None,
    "num_latents": 512,
    "latent_dim": 512,
    "cross_heads": 1,
    "cross_head_dim": 64,
    "cross_rotary_emb_dim": 0,
    "cross_attn_dropout": 0.0,
    "latent_heads": 8,
    "latent_head_dim": 64,
    "latent_rotary_emb_dim": 0,
    "latent_attn_dropout": 0.0,
    "latent_drop": 0.0,
    "weight_tie_layers": False,
    "gated_mlp": True,
    "num_zero_tokens": None,
    "use_flash_attn": True,
}
DEFAULTS = {
    "Perceiver": {**_SHARED, "self_per_cross_attn": 1, "output_dim": None, "output_mode": "average"},
    "PerceiverIO": {
        **_SHARED,
        "query_dim": None,
        "proj_dim": None,
        "query_heads": 1,
        "query_head_dim": 64,
        "query_rotary_emb_dim": 0,
        "query_attn_dropout": 0.0,
    },
}
REQUIRED = {"Perceiver": ("input_dim", "depth"), "PerceiverIO": ("input_dim", "query_dim", "depth")}
# The package of the index calls the mean "mean", and then refuses it; the repository calls it "average".
POOLING = {"average": "mean", "mean": "mean", "concat": "concat", "first": "first"}
TIED = "shares its weights with an earlier layer"


def convert_flash_perceiver(
    source: nn.Module | Mapping[str, Tensor], arguments: Mapping[str, Any]
) -> tuple[PerceiverFlashPreTrainedModel, ConversionReport]:
    """A PerceiverFlash with the weights and the results of a model of flash-perceiver.

    A `Perceiver` becomes a `PerceiverFlashModel` (`pooler_output` is what it returns with an `output_dim`,
    `last_hidden_state` without), a `PerceiverIO` a `PerceiverFlashIOModel`.

    Args:
        source: the module or its state dict.
        arguments: what it was constructed with, and its `class`.

    Raises:
        ConversionError: arguments without a counterpart, and weights that do not fit them.
    """
    state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    given = dict(arguments)
    kind = given.pop("class", None)
    if kind not in DEFAULTS:
        raise ConversionError(f"arguments must name the class, one of {', '.join(DEFAULTS)}, got {kind!r}")
    unknown = sorted(set(given) - set(DEFAULTS[kind]))
    if unknown:
        raise ConversionError(f"{kind} has no argument {', '.join(unknown)}")
    lacking = [name for name in REQUIRED[kind] if given.get(name) is None]
    if lacking:
        raise ConversionError(f"arguments must hold {', '.join(lacking)} of {kind}")
    values = DEFAULTS[kind] | given
    for name in ("cross_rotary_emb_dim", "query_rotary_emb_dim"):
        if values.get(name):
            raise ConversionError(f"{name} must be 0, got {values[name]}: the original cannot run with it")
    is_io = kind == "PerceiverIO"
    fields = _fields(state, values, is_io)
    model = (PerceiverFlashIOModel if is_io else PerceiverFlashModel)(PerceiverFlashConfig(**fields))
    transfer = WeightTransfer(state, f"{kind} of flash-perceiver", type(model).__name__)
    _Weights(transfer, values, model.config).move(is_io)
    if values["latent_drop"]:
        transfer.note("latent_drop keeps the latents in their order and at least one of them")
    return model.eval(), transfer.load_into(model)


def _fields(state: Mapping[str, Tensor], values: Mapping[str, Any], is_io: bool) -> dict[str, Any]:
    size, width = values["input_dim"], values["latent_dim"]
    depth = values["depth"]
    if isinstance(size, (list, tuple)):
        size = list(size) if len(size) > 1 else size[0]
    fields = {
        "modality": "features",
        "input_size": size,
        "hidden_size": width,
        "num_latents": values["num_latents"],
        "num_cross_attention_layers": 1 if is_io else depth,
        "num_self_attention_layers": depth if is_io else values["self_per_cross_attn"],
        # All but the first block of an IO's only layer is tied to nothing.
        "weight_tie_layers": values["weight_tie_layers"] and not is_io,
        "num_cross_attention_heads": _heads(values, "cross", width),
        "cross_head_dim": values["cross_head_dim"],
        "cross_attention_dropout": values["cross_attn_dropout"],
        "num_attention_heads": _heads(values, "latent", width),
        "head_dim": values["latent_head_dim"],
        "rotary_dim": values["latent_rotary_emb_dim"],
        "cross_rotary_dim": 0,
        "attention_dropout": values["latent_attn_dropout"],
        "attention_bias": True,
        "cross_attention_bias": False,
        "latent_drop": values["latent_drop"],
        "num_zero_tokens": values["num_zero_tokens"] or 0,
        "mlp_residual": False,
        "normalize_context": False,
        "intermediate_size": _inner_width(state, "layers.0.1.0.", values),
        "cross_intermediate_size": _inner_width(state, "layers.0.0.", values),
        **({"gated_feed_forward": True, "hidden_act": "sigmoid"} if values["gated_mlp"] else {}),
    }
    if is_io:
        return fields | {
            "query_size": values["query_dim"],
            "num_query_attention_heads": _heads(values, "query", values["query_dim"]),
            "query_head_dim": values["query_head_dim"],
            "query_attention_dropout": values["query_attn_dropout"],
            "query_intermediate_size": _inner_width(state, "query_block.", values),
            "output_size": values["proj_dim"],
        }
    mode = values["output_mode"]
    if mode not in POOLING:
        raise ConversionError(f"output_mode must be one of {', '.join(POOLING)}, got {mode!r}")
    # It has no queries, and any width divides into one head.
    return fields | {"pooling": POOLING[mode], "output_size": values["output_dim"], "num_query_attention_heads": 1}


def _heads(values: Mapping[str, Any], name: str, width: int) -> int:
    heads = values[f"{name}_heads"]
    return width // values[f"{name}_head_dim"] if heads is None else heads


def _inner_width(state: Mapping[str, Tensor], block: str, values: Mapping[str, Any]) -> int | None:
    """Width of a feed-forward; None for a block that does not exist or a state dict that the transfer will refuse."""
    rows = state.get(f"{block}mlp.fc1.weight")
    if rows is None:
        return None
    return rows.shape[0] // 2 if values["gated_mlp"] else rows.shape[0]


class _Weights:
    """Which weight goes where."""

    def __init__(self, transfer: WeightTransfer, values: Mapping[str, Any], config: PerceiverFlashConfig):
        self.transfer, self.values, self.config = transfer, values, config

    def move(self, is_io: bool) -> None:
        transfer, prefix = self.transfer, "model." if is_io else ""
        if self.config.num_latents is not None:
            transfer.move(f"{prefix}latents", "latents")
        self._move_zero_tokens(prefix)
        inner = self.config.num_self_attention_layers
        layers = {}
        for number in range(self.config.num_cross_attention_layers):
            tied = self.config.weight_tie_layers and number > 1
            start = layers.setdefault(min(number, 1) if tied else number, len(layers) * (1 + inner))
            blocks = [(f"layers.{number}.0.", start)]
            blocks += [(f"layers.{number}.1.{index}.", start + 1 + index) for index in range(inner)]
            for offset, (old, index) in enumerate(blocks):
                if tied:
                    self._drop_tied(old, number)
                else:
                    self._move_block(f"{prefix}layers.{index}.", self._stored(old), is_self=offset > 0)
        if is_io:
            self._move_block("decoder.layer.", "query_block.", is_self=False)
        head = "decoder.projection" if is_io else "pooler"
        if self.config.output_size is not None:
            for part in (0, 1):
                transfer.move_linear(f"{head}.{part}", f"out_proj.{part}")

    def _move_zero_tokens(self, prefix: str) -> None:
        if not self.config.num_zero_tokens:
            return
        for index in range(self.config.num_cross_attention_layers):
            shared = index > 0 and isinstance(self.values["input_dim"], int)
            self.transfer.move(f"{prefix}zero_tokens.{index}", f"zero_tokens.{0 if shared else index}")
            if shared:
                self.transfer.drop(f"zero_tokens.{index}", "the original never reads it")

    def _stored(self, block: str) -> str:
        """Where a tied block stands: safetensors keeps one of its names."""
        number, rest = block.split(".", 2)[1:]
        if not self.config.weight_tie_layers or number == "0":
            return block
        candidates = [f"layers.{index}.{rest}" for index in range(1, self.config.num_cross_attention_layers)]
        found = (name for name in candidates if f"{name}norm1.weight" in self.transfer.source)
        return next(found, block)

    def _drop_tied(self, block: str, number: int) -> None:
        first, source = self._stored(block), self.transfer.source
        for name in [name for name in source if name.startswith(block) and first != block]:
            if not torch.equal(source[name], source[first + name.removeprefix(block)]):
                raise ConversionError(f"weight_tie_layers=True, but {name} differs from that of {first}")
            self.transfer.drop(name, TIED)

    def _move_block(self, target: str, source: str, is_self: bool) -> None:
        transfer, new, old = self.transfer, f"{target}attention.", f"{source}mixer."
        for ours, theirs in (("attention_norm", "norm1"), ("mlp_norm", "norm2"), ("mlp.down_proj", "mlp.fc2")):
            transfer.move_linear(f"{target}{ours}", f"{source}{theirs}")
        transfer.move_linear(f"{new}o_proj", f"{old}out_proj")
        names = ("q_proj", "k_proj", "v_proj")
        if is_self:
            for part, name in enumerate(names):
                transfer.move_linear(f"{new}{name}", f"{old}Wqkv", change=_part(part, 3))
        else:
            transfer.move(f"{new}q_proj.weight", f"{old}Wq.weight")
            for part, name in enumerate(names[1:]):
                transfer.move(f"{new}{name}.weight", f"{old}Wkv.weight", _part(part, 2))
        if not self.config.gated_feed_forward:
            transfer.move_linear(f"{target}mlp.up_proj", f"{source}mlp.fc1")
            return
        # The first half times the sigmoid of the second.
        for part, name in enumerate(("up_proj", "gate_proj")):
            transfer.move_linear(f"{target}mlp.{name}", f"{source}mlp.fc1", change=_part(part, 2))


def _part(index: int, count: int):
    return lambda rows: rows.chunk(count)[index]
