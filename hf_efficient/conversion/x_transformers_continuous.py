"""x-transformers' `ContinuousTransformerWrapper` -> XTransformerForContinuousPrediction.

arguments = {"dim_in": 32, "dim_out": 100, "max_seq_len": 1024,
             "attn_layers": {"class": "Encoder", "dim": 512, "depth": 12, "heads": 8}}
model, report = convert_continuous(state_dict, arguments)
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..configuration.x_transformer import XTransformerConfig
from ..modeling.x_transformer_vectors import XTransformerForContinuousPrediction
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer
from .x_transformers import LATEST, SourceStack
from .x_transformers_era import Era
from .x_transformers_options import RESEARCH, WRAPPER_FLAGS, Flag, complete, translate


VECTORS = "x_transformer_vectors.py"
# What it has in common with `TransformerWrapper`.
_SHARED = ("emb_dropout", "post_emb_norm", "num_memory_tokens", "use_abs_pos_emb", "scaled_sinu_pos_emb")
CONTINUOUS_FLAGS = (
    Flag("max_seq_len", None, "max_position_embeddings", VECTORS, lambda v, f: {"max_position_embeddings": max(v, 1)}),
    Flag("dim_in", None, "input_feature_size", VECTORS),
    Flag("dim_out", None, "output_feature_size", VECTORS),
    Flag("probabilistic", False, "distribution_output='normal'", VECTORS,
         lambda v, f: {"distribution_output": "normal"}),
    Flag("use_identity_if_same_dim", False, "input_feature_size=None, output_feature_size=None", VECTORS,
         lambda v, f: {}),
    *(flag for flag in WRAPPER_FLAGS if flag.name in _SHARED),
    Flag("project_in", None, refused="a module of one's own"),
    Flag("project_out", None, refused="a module of one's own"),
    Flag("max_mem_len", 0, refused=RESEARCH),
    Flag("average_pool_embed", False, refused=RESEARCH),
)  # fmt: skip


def convert_continuous(
    source: nn.Module | Mapping[str, Tensor], arguments: Mapping[str, Any], *, version: str = LATEST
) -> tuple[XTransformerForContinuousPrediction, ConversionReport]:
    """A model of ours with the weights and the behaviour of a `ContinuousTransformerWrapper`.

    Args:
        source: the module or its state dict, also inside `ContinuousAutoregressiveWrapper`.
        arguments: what it was called with, where `attn_layers` holds the arguments of the `Encoder` or `Decoder` and
            its `class`.
        version: the release that trained the weights.

    Raises:
        ConversionError: anything that has no exact counterpart, and weights that do not fit the arguments.
    """
    state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    while state and all(name.startswith("net.") for name in state):
        state = {name.removeprefix("net."): tensor for name, tensor in state.items()}
    wrapper = dict(arguments)
    layers = dict(wrapper.pop("attn_layers", {}))
    kind = layers.pop("class", None)
    if kind not in ("Encoder", "Decoder"):
        raise ConversionError(f"attn_layers must name its class, Encoder or Decoder, got {kind!r}")
    flags = complete(CONTINUOUS_FLAGS, wrapper, "ContinuousTransformerWrapper")
    shared = {name: flags[name] for name in _SHARED}
    stack = SourceStack(
        kind, {"num_tokens": 1, "max_seq_len": flags["max_seq_len"] or 0, **shared}, layers, Era(version)
    )
    fields = {**stack.fields(), **translate(CONTINUOUS_FLAGS, flags)}
    del fields["vocab_size"]
    if flags["use_identity_if_same_dim"]:
        parts = 2 if flags["probabilistic"] else 1
        for name, width in (("input_feature_size", flags["dim_in"]), ("output_feature_size", flags["dim_out"])):
            if width is not None and width * (parts if name.startswith("output") else 1) == fields["hidden_size"]:
                fields[name] = None
    try:
        model = XTransformerForContinuousPrediction(XTransformerConfig(**fields))
    except ValueError as error:
        raise ConversionError(f"no such model can be built here: {error}") from error
    config = model.config
    transfer = WeightTransfer(state, f"ContinuousTransformerWrapper of x-transformers {version}", type(model).__name__)
    if config.input_feature_size is not None:
        transfer.move("model.embed_tokens.projection.weight", "project_in.weight")
    weights = stack.weights(transfer, config)
    weights.embeddings("", "model.")
    weights.stack("attn_layers.", "model.")
    if config.output_feature_size is not None:
        parts = 1 if config.distribution_output is None else 2

        def means_first(rows):
            """Means and variances take turns there; here all means come first."""
            return rows.unflatten(0, (-1, parts)).transpose(0, 1).flatten(0, 1)

        transfer.move("head.weight", "project_out.weight", means_first)
    return model.eval(), transfer.load_into(model)
