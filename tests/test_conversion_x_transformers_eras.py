"""What earlier releases of x-transformers meant by their weights, and what has no counterpart here."""

import pytest
import torch
from x_transformers_originals import LAYERS, TOKENS, TOLERANCE, WRAPPER, ids, original

from hf_efficient.conversion.weight_transfer import ConversionError
from hf_efficient.conversion.x_transformers import convert_x_transformers


ERAS = {
    "1.26.9": {"names": "weight", "offset": 0.0, "rotary": "halves", "floor": 32},
    "1.30.16": {"names": "weight", "offset": 0.0, "rotary": "pairs", "floor": 32},
    "1.31.0": {"names": "gamma", "offset": 0.0, "rotary": "pairs", "floor": 32},
    "1.43.0": {"names": "gamma", "offset": 1.0, "rotary": "pairs", "floor": 0},
}


@pytest.mark.parametrize("version", ERAS)
@torch.no_grad()
def test_weights_of_earlier_releases(version):
    """The present model, with its weights written as that release would have had them."""
    era = ERAS[version]
    layers = {"rotary_pos_emb": True, "attn_dim_head": 64, "rotary_emb_dim": 32}
    module, arguments = original("Decoder", {}, layers)
    state = {}
    for name, tensor in module.state_dict().items():
        if name.endswith(".gamma"):
            name, tensor = name.replace("gamma", era["names"]), tensor + (1 - era["offset"])
            if version == "1.26.9":
                state[name.replace("weight", "bias")] = torch.zeros_like(tensor)
        if era["rotary"] == "halves" and name.endswith(("to_q.weight", "to_k.weight")):
            rows = tensor.unflatten(0, (4, 64))
            order = torch.cat([torch.arange(0, 32, 2), torch.arange(1, 32, 2), torch.arange(32, 64)])
            tensor = rows[:, order].flatten(0, 1)
        state[name] = tensor
    if version == "1.26.9":
        state["to_logits.bias"] = torch.zeros(TOKENS)
    if era["floor"]:  # then the default was at least 32
        arguments["attn_layers"].pop("rotary_emb_dim")
        arguments["attn_layers"]["rotary_emb_dim"] = None
    model, _ = convert_x_transformers(state, arguments, version=version)
    torch.testing.assert_close(model(ids()).logits, module(ids()), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_value_gates_had_a_bias():
    """The present model with the bias that releases before 2.26 gave it."""
    module, arguments = original("Decoder", {}, {"attn_gate_values": True})
    for name, linear in module.named_modules():
        if name.endswith("to_v_gate"):
            linear.bias = torch.nn.Parameter(torch.randn(32))
    model, _ = convert_x_transformers(module, arguments, version="2.25.0")
    torch.testing.assert_close(model(ids()).logits, module(ids()), rtol=0, atol=TOLERANCE)


REFUSED = {
    "factor of the branches": ({}, {"scale_residual": 0.5}, "constant factor"),
    "unknown activation": ({}, {"ff_custom_activation": torch.nn.Softplus()}, "Softplus"),
    "unknown flag": ({}, {"attn_wings": 2}, "attn_wings"),
    "research option": ({}, {"attn_sparse_topk": 3}, "attn_sparse_topk=3 has no counterpart"),
    "hyper-connections": ({}, {"num_residual_streams": 4}, "no paper"),
    "a value for each layer": ({}, {"attn_num_mem_kv": (1, 2)}, "for each layer"),
    "groups and rotary": (
        {}, {"attn_qk_norm": True, "attn_qk_norm_groups": 2, "rotary_pos_emb": True}, "groups hold other channels"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_counterpart_is_refused(name):
    wrapper, layers, message = REFUSED[name]
    arguments = {**WRAPPER, **wrapper, "attn_layers": {"class": "Decoder", **LAYERS, **layers}}
    with pytest.raises(ConversionError, match=message):
        convert_x_transformers({}, arguments)


def test_bad_arguments_are_refused():
    with pytest.raises(ConversionError, match="version must look like"):
        convert_x_transformers({}, {}, version="new")
    with pytest.raises(ConversionError, match="one of Decoder, Encoder, PrefixDecoder"):
        convert_x_transformers({}, {"attn_layers": {}})
    with pytest.raises(ConversionError, match="attn_layers .* or dim"):
        convert_x_transformers({}, {})
    with pytest.raises(ConversionError, match="values by their positions"):
        arguments = {**WRAPPER, "attn_layers": {"class": "Decoder", **LAYERS, "rotary_pos_emb": True}}
        convert_x_transformers({}, arguments, version="1.19.0")
    module, arguments = original("Decoder", {}, {})
    with pytest.raises(ConversionError, match="no counterpart: .*to_q"):
        convert_x_transformers({**module.state_dict(), "to_q.extra": torch.ones(1)}, arguments)
