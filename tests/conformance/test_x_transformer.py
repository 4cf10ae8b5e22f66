"""transformers' own tests on XTransformer: decoder, encoder, encoder–decoder, and a decoder with the rarer options."""

import unittest

from hf_efficient import (
    XTransformerConfig,
    XTransformerForCausalLM,
    XTransformerForConditionalGeneration,
    XTransformerForMaskedLM,
    XTransformerForSequenceClassification,
    XTransformerForTokenClassification,
    XTransformerModel,
)

from .harness import CausalTests, CommonTests, EncoderDecoderTester, GenerativeTests, TextTester


# The tests of scaled rotary embeddings read half as much again.
LENGTH = {"max_position_embeddings": 128}


class DecoderTester(TextTester):
    config_class = XTransformerConfig
    config_arguments = {**LENGTH, "is_decoder": True}
    model_classes = (XTransformerModel, XTransformerForCausalLM)
    base_model_class = XTransformerModel
    causal_lm_class = XTransformerForCausalLM


class XTransformerDecoderTest(CausalTests, unittest.TestCase):
    tester = DecoderTester


class ManyOptionsTester(DecoderTester):
    """One of each kind of option, tied to the head. (Memory tokens are in hidden states; the tests count those.)"""

    config_arguments = {
        **LENGTH,
        "is_decoder": True,
        "tie_word_embeddings": True,
        "position_bias": "t5",
        "num_key_value_heads": 2,
        "num_memory_key_values": 2,
        "learned_attention_sinks": True,
        "qk_norm": "l2_learned",
        "attn_logit_softcapping": 20.0,
        "value_residual": "learned",
        "value_gate": "sigmoid",
        "norm_type": "rms_norm",
        "norm_position": "sandwich",
        "residual_type": "gru",
        "layer_scale_init_value": 0.5,
        "gated_feed_forward": True,
        "shift_tokens": 1,
    }


class XTransformerManyOptionsTest(GenerativeTests, unittest.TestCase):
    tester = ManyOptionsTester


class EncoderTester(TextTester):
    config_class = XTransformerConfig
    config_arguments = LENGTH
    model_classes = (
        XTransformerModel,
        XTransformerForMaskedLM,
        XTransformerForSequenceClassification,
        XTransformerForTokenClassification,
    )
    base_model_class = XTransformerModel


class XTransformerEncoderTest(CommonTests, unittest.TestCase):
    tester = EncoderTester


class ConditionalGenerationTester(EncoderDecoderTester):
    encoder_seq_length = 7  # the comparison of attention implementations gives both halves one mask
    config_class = XTransformerConfig
    config_arguments = {"is_encoder_decoder": True, "decoder_start_token_id": 1}
    model_classes = (XTransformerForConditionalGeneration,)


class XTransformerEncoderDecoderTest(GenerativeTests, unittest.TestCase):
    tester = ConditionalGenerationTester
    is_encoder_decoder = True
