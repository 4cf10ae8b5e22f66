"""Tiny CoLT5 models that several test files share: random, but decisive (see generation_models.py)."""

from functools import cache

import torch
from generation_models import decisive

from hf_efficient import CoLT5Config, CoLT5ForCausalLM, CoLT5ForConditionalGeneration
from hf_efficient.modeling.token_router import TokenRouter


VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 8,
    "intermediate_size": 24,
    "light_attention_radius": 3,
    "num_routed_tokens": 0.25,
    "num_routed_queries": 0.25,
    "num_routed_keys": 0.5,
    "routing_window": 8,
    "dropout_rate": 0.0,
    "image_size": 16,
    "patch_size": 2,
    "image_window_size": 4,
    "bos_token_id": 2,
    "eos_token_id": None,
}
# Of a T5 v1.1 or LongT5 that is to become a CoLT5.
T5_SIZES = {
    "vocab_size": 61,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 2,
    "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
ENCODERS = {
    "paper": {},
    "two sets of keys": {"num_key_value_sets": 3},
    "relative bias": {"heavy_position_embedding_type": "relative_bias"},
    "numbers of tokens": {"num_routed_tokens": 5, "num_routed_queries": 4, "num_routed_keys": 9},
    "null tokens": {"null_query_token": True, "null_key_value": True, "heavy_position_embedding_type": "none"},
    "iterations": {"routing_method": "coordinate_descent", "straight_through_routing": True},
    "low temperature": {"routing_temperature": 0.1, "multiply_keys_by_score": False},
}
DECODERS = {**ENCODERS, "deeper decoder": {"num_decoder_layers": 3}, "tied": {"tie_word_embeddings": True}}
CAUSAL = {**ENCODERS, "long window": {"routing_window": 64}, "window of one": {"routing_window": 1}}


def make(model_class, dtype=torch.float32, **options):
    torch.manual_seed(0)
    return model_class(CoLT5Config(**{**SIZES, **options})).to(dtype).eval()


@cache
def causal_model(name: str) -> CoLT5ForCausalLM:
    return _routing(make(CoLT5ForCausalLM, **CAUSAL[name]))


@cache
def conditional_model(name: str) -> CoLT5ForConditionalGeneration:
    model = make(CoLT5ForConditionalGeneration, **DECODERS[name])
    if name == "tied":
        return model.double()
    with torch.no_grad():
        _routing(model).get_input_embeddings().weight.mul_(0.2)  # or a decoder only says its last token again
    return model


def _routing(model):
    """Decisive, and with routers whose logits have unit variance."""
    decisive(model)
    for module in model.modules():
        if isinstance(module, TokenRouter):
            torch.nn.init.normal_(module.routing_vectors, std=module.hidden_size**-0.5)
    return model
