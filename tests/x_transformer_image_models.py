"""Tiny XTransformers for images, and for images and text, that the tests share."""

import torch
from generation_models import decisive
from x_transformer_models import SIZES, T5, settled

from hf_efficient import XTransformerConfig, XTransformerForImageClassification, XTransformerForImageTextToText


IMAGES = {"image_size": [8, 12], "patch_size": 4, "num_channels": 2, "num_labels": 5}
# Every way in which an image encoder differs from one of text, and some options of the stack.
ENCODERS = {
    "simple vit": {"rotary_positions": None},
    "learned positions": {"image_positions": "learned", "embedding_norm": True, "rotary_positions": None},
    "registers": {"num_register_tokens": 3, "image_positions": "learned"},
    "no positions": {"image_positions": None, "rotary_positions": None, "classifier_pooling": "first"},
    "t5, memory, registers": {**T5, "num_register_tokens": 2, "num_memory_tokens": 2, "num_memory_key_values": 2},
    "window, gates, shift": {"sliding_window": 3, "value_gate": "sigmoid", "shift_tokens": 1, "norm_type": "rms_norm"},
}
OF_IMAGES = {"image_encoder_overrides": {"num_hidden_layers": 1, "rotary_positions": None, "num_attention_heads": 2}}
WRITERS = {
    "captioner": {},
    "captioner, other width": {
        "image_encoder_overrides": {"hidden_size": 24, "num_attention_heads": 2, "num_register_tokens": 2},
        "cross_attention_hidden_size": 24,
    },
    "captioner, many options": {**T5, **OF_IMAGES, "num_memory_tokens": 2, "shift_tokens": 1, "value_gate": "silu"},
    "pali": {"image_fusion": "prepended"},
    "pali, many options": {
        **T5,
        **OF_IMAGES,
        "image_fusion": "prepended",
        "share_embeddings": True,
        "num_memory_tokens": 2,
        "image_positions": "learned",
        "tie_word_embeddings": True,
    },
}


def classifier(name):
    torch.manual_seed(0)
    config = XTransformerConfig(**SIZES, **IMAGES, **ENCODERS[name], initializer_range=0.3)
    return settled(XTransformerForImageClassification(config)).double().eval()


def writer(name):
    torch.manual_seed(0)
    options = {"is_encoder_decoder": True, "decoder_start_token_id": 1, **WRITERS[name]}
    return settled(decisive(XTransformerForImageTextToText(XTransformerConfig(**SIZES, **IMAGES, **options))))


def pixels(batch=2, height=8, width=12, seed=1):
    return torch.randn(batch, 2, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
