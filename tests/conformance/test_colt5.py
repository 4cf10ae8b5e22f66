"""transformers' own tests on CoLT5: encoder–decoder, encoder, causal decoder and image classifier."""

import unittest

import pytest
import torch

from hf_efficient import (
    CoLT5Config,
    CoLT5EncoderModel,
    CoLT5ForCausalLM,
    CoLT5ForConditionalGeneration,
    CoLT5ForImageClassification,
    CoLT5ForQuestionAnswering,
    CoLT5ForSequenceClassification,
    CoLT5Model,
)
from hf_efficient.modeling.colt5_stacks import CoLT5CausalDecoder

from .harness import CausalTests, CommonTests, EncoderDecoderTester, GenerativeTests, TextTester, run_distributed
from .parallel_ranks import check_rank


SIZES = {
    "head_dim": 8,
    "intermediate_size": 32,
    "light_attention_radius": 2,
    "num_routed_tokens": 0.5,
    "num_routed_queries": 0.5,
    "num_routed_keys": 0.5,
    "routing_window": 4,
    "dropout_rate": 0.0,
    "image_size": 16,
    "patch_size": 2,
    "image_window_size": 4,
}


class ConditionalGenerationTester(EncoderDecoderTester):
    config_class = CoLT5Config
    config_arguments = SIZES
    model_classes = (CoLT5Model, CoLT5ForConditionalGeneration)


class CoLT5EncoderDecoderTest(GenerativeTests, unittest.TestCase):
    tester = ConditionalGenerationTester
    has_attentions = False  # no branch ever forms the matrix of attention weights
    is_encoder_decoder = True


@pytest.mark.slow
def test_two_ranks_of_the_encoder_decoder_equal_one(tmp_path):
    """The mixins call causal models only; these are the parts of them that an encoder–decoder can go through."""
    torch.manual_seed(0)
    model = CoLT5ForConditionalGeneration(ConditionalGenerationTester().get_config())
    model.save_pretrained(tmp_path)
    run_distributed(world_size=2)(check_rank)(str(tmp_path), CoLT5ForConditionalGeneration, 1e-5)


class EncoderTester(TextTester):
    config_class = CoLT5Config
    config_arguments = {**SIZES, "is_encoder_decoder": False, "heavy_position_embedding_type": "relative_bias"}
    model_classes = (CoLT5ForSequenceClassification, CoLT5ForQuestionAnswering)
    base_model_class = CoLT5EncoderModel


class CoLT5EncoderTest(CommonTests, unittest.TestCase):
    tester = EncoderTester
    has_attentions = False


class BareEncoderTester(EncoderTester):
    model_classes = (CoLT5EncoderModel,)
    is_training = False  # no head, no loss


class CoLT5BareEncoderTest(CommonTests, unittest.TestCase):
    tester = BareEncoderTester
    has_attentions = False


class CausalTester(TextTester):
    config_class = CoLT5Config
    config_arguments = {**SIZES, "is_encoder_decoder": False, "is_decoder": True}
    model_classes = (CoLT5ForCausalLM,)
    base_model_class = CoLT5CausalDecoder
    causal_lm_class = CoLT5ForCausalLM


class CoLT5CausalTest(CausalTests, unittest.TestCase):
    tester = CausalTester
    has_attentions = False


class ImageTester(TextTester):
    config_class = CoLT5Config
    config_arguments = {**SIZES, "is_encoder_decoder": False}
    model_classes = (CoLT5ForImageClassification,)
    seq_length = 8  # patches to a side: what the tests find next to the channels

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.rand(self.batch_size, 3, 16, 16)}


class CoLT5ImageTest(CommonTests, unittest.TestCase):
    tester = ImageTester
    has_attentions = False
    test_resize_embeddings = False
