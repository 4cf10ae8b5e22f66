"""performer-pytorch 1.1.4 -> Performer: `PerformerLM`, `Performer` and `PerformerEncDec`, with every option.

The converted model computes what the original computes, including what new models should not do: the stabiliser that
spans the sequence, keys of padded positions in the normaliser, and the shifted rotary positions of bidirectional local
heads. One thing is not reproduced: without a mask, and at a length that is no multiple of the window, the original's
local heads attend to the zeros that it pads the last window with.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration.performer import PerformerConfig
from ..modeling.performer import (
    PerformerForCausalLM,
    PerformerForConditionalGeneration,
    PerformerForMaskedLM,
    PerformerModel,
    PerformerPreTrainedModel,
)
from .performer_pytorch_module import kind_of, read_arguments, unwrapped
from .performer_pytorch_options import (
    ENCODER_DECODER,
    LANGUAGE_MODEL,
    STACK,
    complete_arguments,
    encoder_decoder_config,
    split_encoder_decoder_arguments,
    stack_fields,
)
from .weight_transfer import ConversionError, ConversionReport, WeightTransfer


FIXED_TABLE = "a fixed table that is computed instead"
UNUSED_PROJECTION = "a projection that no head of this layer uses"
DUPLICATE = "a second name of the same weights"


def convert_performer_pytorch(
    source: nn.Module | Mapping[str, Tensor], arguments: Mapping[str, Any] | None = None, *, rotary: bool = False
) -> tuple[PerformerPreTrainedModel, ConversionReport]:
    """A model of ours with the weights and the behaviour of one of performer-pytorch.

    A causal `PerformerLM` becomes `PerformerForCausalLM`, another one `PerformerForMaskedLM`, a `Performer`
    `PerformerModel` (call it with `inputs_embeds`), a `PerformerEncDec` `PerformerForConditionalGeneration`.

    Args:
        source: the module, also inside `AutoregressiveWrapper`; or its state dict.
        arguments: what the constructor was called with, for a state dict: a module tells itself. `kernel_fn` may be
            given by name ("relu", "gelu", ...).
        rotary: for a bare `Performer` that is called with `pos_emb`: turn queries and keys by their positions.

    Raises:
        ConversionError: anything that has no exact counterpart, and weights that do not fit the arguments.
    """
    if isinstance(source, nn.Module):
        if arguments is not None:
            raise ConversionError("arguments belong to a state dict; a module is asked for its own")
        module = unwrapped(source)
        kind, state = kind_of(module), module.state_dict()
        arguments = read_arguments(module)
    else:
        kind, state = _recognise(source)
        if arguments is None:
            raise ConversionError(f"the arguments that the {kind} was constructed with must be given, got None")
    if rotary and kind != STACK:
        raise ConversionError(f"rotary=True is for a bare {STACK}; a {kind} brings its positions along")
    _check_tensors(state)
    if kind == ENCODER_DECODER:
        return _convert_encoder_decoder(state, arguments)
    arguments = complete_arguments(kind, arguments)
    config = PerformerConfig(**stack_fields(arguments, kind, rotary))
    if kind == STACK:
        model: PerformerPreTrainedModel = PerformerModel(config)
    else:
        model = PerformerForCausalLM(config) if arguments["causal"] else PerformerForMaskedLM(config)
    transfer = WeightTransfer(state, kind, type(model).__name__)
    if kind == STACK:
        _Stack(transfer, "", "", config).transfer()
        transfer.leave("embed_tokens.weight", "the original takes embeddings: call the model with inputs_embeds")
        if arguments["ff_chunks"] > 1:
            transfer.note(f"ff_chunks={arguments['ff_chunks']} saves memory only; see config.chunk_size_feed_forward")
    else:
        _LanguageModel(transfer, "", "model.", config).transfer(head="lm_head")
    _note_redraws(transfer, arguments)
    _drop_duplicates(transfer)
    report = transfer.load_into(model)
    return model.eval(), report


def _convert_encoder_decoder(state, arguments):
    encoder, decoder, rest = split_encoder_decoder_arguments(arguments)
    if encoder["causal"] or encoder["cross_attend"]:
        raise ConversionError("the encoder must look both ways and at itself only, got enc_causal or enc_cross_attend")
    config = encoder_decoder_config(encoder, decoder, rest)
    model = PerformerForConditionalGeneration(config)
    transfer = WeightTransfer(state, ENCODER_DECODER, type(model).__name__)
    _LanguageModel(transfer, "enc.", "model.encoder.", config.encoder_config()).transfer(head=None)
    _LanguageModel(transfer, "dec.net.", "model.decoder.", config.decoder_config()).transfer(head="lm_head")
    unused = ("enc.to_out.weight", "enc.to_out.bias")
    transfer.drop_matching(lambda name: name in unused, "the encoder's own head, which the original never calls")
    if rest["tie_token_embeds"] and not decoder["tie_embed"]:
        transfer.note("the shared token embeddings became two equal tables, which training will let drift apart")
    transfer.note(
        f"the original's loss ignores the token {rest['ignore_index']}: give -100 as the label where that is wanted"
    )
    for part in (encoder, decoder):
        _note_redraws(transfer, part)
    _drop_duplicates(transfer)
    return model.eval(), transfer.load_into(model)


class _Stack:
    """One `Performer` inside the source, written to one `PerformerModel`."""

    def __init__(self, transfer: WeightTransfer, source: str, target: str, config: PerformerConfig):
        self.transfer_weights, self.source, self.target, self.config = transfer, source, target, config
        prefix = f"{source}net.{'blocks' if config.reversible else 'layers'}."
        # Names under a branch, without the levels of wrappers, whose number depends on the options.
        self.branches: dict[tuple[int, int], dict[str, str]] = {}
        for name in transfer.source:
            if not name.startswith(prefix):
                continue
            index, branch, *rest = name[len(prefix) :].split(".")
            if config.reversible:
                branch, rest = {"f": "0", "g": "1"}.get(branch, branch), rest[1:]
            while rest and rest[0] == "fn":
                rest = rest[1:]
            if index.isdigit() and branch in ("0", "1"):
                self.branches.setdefault((int(index), int(branch)), {})[".".join(rest)] = name

    def transfer(self) -> None:
        config = self.config
        per_layer = 2 if config.add_cross_attention else 1
        for layer in range(config.num_hidden_layers):
            target = f"{self.target}layers.{layer}."
            self._attention((per_layer * layer, 0), f"{target}self_attn", config.local_heads(layer))
            self._feed_forward((per_layer * layer, 1), f"{target}mlp")
            if config.add_cross_attention:
                self._attention((per_layer * layer + 1, 0), f"{target}cross_attn", None)
                self._feed_forward((per_layer * layer + 1, 1), f"{target}cross_mlp")
        # Theirs counts forwards from 0 behind a draw, ours from 1.
        counter = f"{self.source}proj_updater.calls_since_last_redraw"
        self.transfer_weights.move(f"{self.target}forwards_since_redraw", counter, lambda count: count + 1)
        self.transfer_weights.leave(f"{self.target}num_redraws", "counts our own draws")

    def _name(self, branch: tuple[int, int], name: str) -> str:
        """The source's full name, or a readable stand-in if it does not exist."""
        return self.branches.get(branch, {}).get(name, f"{self.source}net.*.{branch[0]}.{branch[1]}.*.{name}")

    def _move(self, branch, target, name, change=None) -> None:
        self.transfer_weights.move(target, self._name(branch, name), change)

    def _linear(self, branch, target, name, bias, change=None) -> None:
        for part in ("weight", "bias") if bias else ("weight",):
            self._move(branch, f"{target}.{part}", f"{name}.{part}", change)

    def _wrapper(self, branch, target) -> None:
        kind = self.config.norm_type
        if kind == "layer_norm":
            self._linear(branch, f"{target}.norm", "norm", bias=True)
        elif kind == "scale_norm":
            self._move(branch, f"{target}.norm.g", "g")
        else:
            self._move(branch, f"{target}.rezero.g", "g", lambda factor: factor.reshape(1))

    def _attention(self, branch, target, local_heads: int | None) -> None:
        """`local_heads` is None for cross-attention, which knows neither local heads nor positions."""
        config, heads = self.config, self.config.num_attention_heads
        global_heads = heads - (local_heads or 0)
        turned = global_heads if config.uses_rotary and local_heads is not None else 0
        bias = config.attention_bias
        self._wrapper(branch, f"{target}_branch")
        for name in ("q", "k"):
            self._linear(branch, f"{target}.{name}_proj", f"to_{name}", bias, lambda t: _unpair(t, heads, turned))
        self._linear(branch, f"{target}.v_proj", "to_v", bias)
        self._linear(branch, f"{target}.o_proj", "to_out", config.attention_out_bias)
        projection = "fast_attention.projection_matrix"
        if global_heads and config.feature_map != "no_projection":
            self._move(
                branch,
                f"{target}.projection_matrix",
                projection,
                lambda rows: _unpair(rows.mT, 1, min(turned, 1)).mT.contiguous(),
            )
        else:
            self.transfer_weights.drop(self._name(branch, projection), UNUSED_PROJECTION)
        for name, full_name in self.branches.get(branch, {}).items():
            if name.startswith("local_attn."):
                self.transfer_weights.drop(full_name, FIXED_TABLE)

    def _feed_forward(self, branch, target) -> None:
        self._wrapper(branch, f"{target}_branch")
        if not self.config.gated_feed_forward:
            self._linear(branch, f"{target}.up_proj", "w1", bias=True)
        else:  # the half that goes through the activation comes first
            self._linear(branch, f"{target}.gate_proj", "w1", True, lambda t: t.chunk(2)[0])
            self._linear(branch, f"{target}.up_proj", "w1", True, lambda t: t.chunk(2)[-1])
        self._linear(branch, f"{target}.down_proj", "w2", bias=True)


class _LanguageModel:
    """One `PerformerLM` inside the source: embeddings, stack, final norm and head."""

    def __init__(self, transfer: WeightTransfer, source: str, target: str, config: PerformerConfig):
        self.weights, self.source, self.target, self.config = transfer, source, target, config

    def transfer(self, head: str | None) -> None:
        weights, source, target = self.weights, self.source, self.target
        weights.move(f"{target}embed_tokens.weight", f"{source}token_emb.weight")
        self._positions()
        _Stack(weights, f"{source}performer.", target, self.config).transfer()
        weights.move_linear(f"{target}norm", f"{source}norm")
        if head and not self.config.tie_word_embeddings:
            weights.move_linear(head, f"{source}to_out")

    def _positions(self) -> None:
        kind, table = self.config.position_embedding_type, f"{self.source}pos_emb"
        if kind == "rotary_and_sinusoidal":
            for name in (f"{table}.emb", f"{self.source}layer_pos_emb.emb"):
                self.weights.drop(name, FIXED_TABLE)
        elif kind == "learned":
            self.weights.move(f"{self.target}embed_positions.weight", f"{table}.emb.weight")
        else:
            self._axial(table)

    def _axial(self, table: str) -> None:
        """The last axis becomes our columns; the sum over all the others our rows."""
        names = sorted(name for name in self.weights.source if name.startswith(f"{table}.weights"))
        if not names:
            self.weights.read(f"{table}.weights.0")
            return
        size = self.config.hidden_size
        *first, last = (self.weights.source[name] for name in names)
        rows = sum(first).reshape(-1, size) if first else torch.zeros_like(last.reshape(-1, size)[:1])
        embedding = f"{self.target}embed_positions."
        self.weights.put(f"{embedding}columns.weight", last.reshape(-1, size), names[-1:])
        self.weights.put(f"{embedding}rows.weight", rows, names[:-1] or names)


def _unpair(rows: Tensor, heads: int, turned: int) -> Tensor:
    """Reorders the rows `[heads * D, ...]` of the first `turned` heads for our layout of rotary positions.

    The original turns the pairs (2i, 2i + 1), we turn (i, i + D/2). Dot products and norms do not notice, if queries,
    keys and the columns of the projection move alike.
    """
    if not turned:
        return rows
    split = rows.reshape(heads, -1, *rows.shape[1:])
    size = split.shape[1]
    order = torch.cat([torch.arange(0, size, 2), torch.arange(1, size, 2)]).to(rows.device)
    return torch.cat([split[:turned, order], split[turned:]]).reshape(rows.shape)


def _recognise(state: Mapping[str, Tensor]) -> tuple[str, dict[str, Tensor]]:
    """Which model a state dict belongs to, and the dict without the prefixes of wrappers."""
    state = dict(state)
    for prefix in ("module.", "net."):
        wrapped = state and all(name.startswith(prefix) for name in state)
        if wrapped and (prefix == "module." or f"{prefix}token_emb.weight" in state):
            state = {name[len(prefix) :]: tensor for name, tensor in state.items()}
    if "token_emb.weight" in state:
        return LANGUAGE_MODEL, state
    if "enc.token_emb.weight" in state and "dec.net.token_emb.weight" in state:
        return ENCODER_DECODER, state
    if any(name.startswith(("net.layers.", "net.blocks.")) for name in state):
        return STACK, state
    raise ConversionError(
        f"the state dict must be one of {LANGUAGE_MODEL}, {STACK} or {ENCODER_DECODER} of performer-pytorch, got the "
        f"names {', '.join(sorted(map(str, state))[:5]) or '(none)'}"
    )


def _check_tensors(state: Mapping[str, Any]) -> None:
    others = sorted(str(name) for name, value in state.items() if not isinstance(value, Tensor))
    if others:
        raise ConversionError(f"a state dict must hold tensors only, got something else at {', '.join(others[:5])}")


def _drop_duplicates(transfer: WeightTransfer) -> None:
    """Drops the second name that the redraw counter's module gives to every weight of its stack.

    Raises:
        ConversionError: the two names hold different weights.
    """
    marker = "proj_updater.instance."
    for name, tensor in transfer.source.items():
        head, found, tail = name.partition(marker)
        if not found:
            continue
        first = transfer.source.get(f"{head}net.{tail}")
        if first is not None and not torch.equal(first, tensor):
            raise ConversionError(f"{name} must equal {head}net.{tail}, of which it is a second name, and does not")
    transfer.drop_matching(lambda name: marker in name, DUPLICATE)


def _note_redraws(transfer: WeightTransfer, arguments: Mapping[str, Any]) -> None:
    if not arguments["auto_check_redraw"]:
        transfer.note("auto_check_redraw=False: the features are never drawn anew (feature_redraw_interval=None)")
