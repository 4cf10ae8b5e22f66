"""Tiny PerceiverFlash configurations and inputs that several test files share."""

from functools import cache

import torch

from hf_efficient import PerceiverFlashConfig, PerceiverFlashForCausalLM


VOCABULARY = 61
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_latents": 8,
    "num_self_attention_layers": 2,
    "num_attention_heads": 4,
    "num_cross_attention_heads": 2,
    "num_query_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
}
FEATURES = {**SIZES, "modality": "features", "input_size": 6, "query_size": 10, "output_size": 5}
IMAGES = {**SIZES, "modality": "image", "image_size": [8, 12], "num_channels": 2, "num_frequency_bands": 3}

# Every way in which a Perceiver AR's past can matter.
CAUSAL = {
    "learned positions": {},
    "sinusoidal": {"position_embedding_type": "sinusoidal"},
    "rotary": {"position_embedding_type": "rotary"},
    "part of each head turns": {"position_embedding_type": "none", "rotary_dim": 4, "cross_rotary_dim": 6},
    "a stride of one": {"latent_stride": 1},
    "a stride of all latents": {"latent_stride": 8},
    "two cross-attentions, tied": {
        "num_cross_attention_layers": 3,
        "num_self_attention_layers": 1,
        "weight_tie_layers": True,
    },
    "repeated, gated": {"self_attention_repeats": 2, "gated_feed_forward": True, "position_embedding_type": "rotary"},
    "values of another size": {"value_head_dim": 6, "cross_value_head_dim": 10, "num_latents": 5},
    "more latents than tokens": {"num_latents": 64},
}


@cache
def causal_model(name: str) -> PerceiverFlashForCausalLM:
    torch.manual_seed(0)
    config = PerceiverFlashConfig(**{**SIZES, "tie_word_embeddings": False, **CAUSAL[name]})
    return decisive(PerceiverFlashForCausalLM(config))


def decisive(model):
    """Random weights that keep the variance of what they multiply, so that logits hang on the whole past; float64."""
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    torch.nn.init.normal_(model.get_input_embeddings().weight)
    if model.model.embed_positions is not None and isinstance(model.model.embed_positions, torch.nn.Embedding):
        torch.nn.init.normal_(model.model.embed_positions.weight)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=3 * model.config.hidden_size**-0.5)
    return model.double().eval()


def build(model_class, *, implementation="eager", double=False, **options):
    torch.manual_seed(0)
    model = model_class._from_config(PerceiverFlashConfig(**options), attn_implementation=implementation).eval()
    with torch.no_grad():  # spread out, so that attention is no mean
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn_like(weight) * (1.0 if "latents" in name else weight.shape[-1] ** -0.5))
    return model.double() if double else model


def features(rows=3, length=11, size=6, seed=1):
    return torch.randn(rows, length, size, generator=torch.Generator().manual_seed(seed))


def padded(lengths=(11, 4, 7), length=11):
    return (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
