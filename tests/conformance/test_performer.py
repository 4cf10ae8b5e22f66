"""transformers' own tests on Performer: decoder, encoder, encoder–decoder; and decoders with other attention."""

import unittest

from hf_efficient import (
    PerformerConfig,
    PerformerForCausalLM,
    PerformerForConditionalGeneration,
    PerformerForMaskedLM,
    PerformerForQuestionAnswering,
    PerformerForSequenceClassification,
    PerformerForTokenClassification,
    PerformerModel,
)

from .harness import CausalTests, CommonTests, EncoderDecoderTester, GenerativeTests, TextTester


class DecoderTester(TextTester):
    config_class = PerformerConfig
    config_arguments = {"is_decoder": True}
    model_classes = (PerformerModel, PerformerForCausalLM, PerformerForSequenceClassification)
    base_model_class = PerformerModel
    causal_lm_class = PerformerForCausalLM


class PerformerDecoderTest(CausalTests, unittest.TestCase):
    tester = DecoderTester
    has_attentions = False  # random features: the matrix of attention weights never exists


class LocalTester(DecoderTester):
    """Heads with a window beside the linear ones, and the rarer options."""

    config_arguments = {
        "is_decoder": True,
        "num_local_attention_heads": [0, 2],
        "local_window_size": 4,
        "position_embedding_type": "learned",
        "max_position_embeddings": 128,
        "feature_map": "optimal_positive",
        "norm_type": "rms_norm",
        "gated_feed_forward": True,
        "shift_tokens": True,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "attention_out_bias": True,
        "lm_head_bias": True,
    }


class PerformerLocalTest(GenerativeTests, unittest.TestCase):
    tester = LocalTester
    has_attentions = False


class HybridTester(DecoderTester):
    config_arguments = {
        "is_decoder": True,
        "layer_types": ["full_attention", "linear_attention"],
        "feature_map": "relu",
    }


class PerformerHybridTest(GenerativeTests, unittest.TestCase):
    tester = HybridTester
    has_attentions = False  # one of its two blocks has attention weights, the tests ask for all


class SoftmaxTester(DecoderTester):
    """What a converted checkpoint may begin as: softmax attention in every block."""

    config_arguments = {"is_decoder": True, "layer_types": ["full_attention"] * 2, "num_key_value_heads": 2}


class PerformerSoftmaxTest(GenerativeTests, unittest.TestCase):
    tester = SoftmaxTester


class EncoderTester(TextTester):
    config_class = PerformerConfig
    model_classes = (
        PerformerModel,
        PerformerForMaskedLM,
        PerformerForSequenceClassification,
        PerformerForTokenClassification,
        PerformerForQuestionAnswering,
    )
    base_model_class = PerformerModel


class PerformerEncoderTest(CommonTests, unittest.TestCase):
    tester = EncoderTester
    has_attentions = False


class ConditionalGenerationTester(EncoderDecoderTester):
    config_class = PerformerConfig
    config_arguments = {"is_encoder_decoder": True, "decoder_start_token_id": 1}
    model_classes = (PerformerForConditionalGeneration,)


class PerformerEncoderDecoderTest(GenerativeTests, unittest.TestCase):
    tester = ConditionalGenerationTester
    has_attentions = False
    is_encoder_decoder = True
