"""transformers' own tests on PerceiverFlash: Perceiver and Perceiver IO on text and images, and Perceiver AR."""

import unittest

import torch

from hf_efficient import (
    PerceiverFlashConfig,
    PerceiverFlashForCausalLM,
    PerceiverFlashForImageClassification,
    PerceiverFlashForMaskedLM,
    PerceiverFlashForSequenceClassification,
    PerceiverFlashIOModel,
    PerceiverFlashModel,
)

from .harness import CausalTests, CommonTests, TextTester


class PerceiverTester(TextTester):
    """As many latents and queries as inputs: the tests know one length only."""

    config_class = PerceiverFlashConfig
    base_model_class = PerceiverFlashModel
    common_properties = ["hidden_size", "num_attention_heads"]

    def config_values(self) -> dict:
        values = super().config_values() | {
            "num_cross_attention_heads": self.num_attention_heads,
            "num_query_attention_heads": self.num_attention_heads,
            "num_latents": self.seq_length,
            "num_queries": self.seq_length,
            "num_self_attention_layers": 1,
            "max_position_embeddings": 64,
        }
        del values["num_hidden_layers"]  # follows from the number of cross- and self-attentions
        return values


class EncoderTester(PerceiverTester):
    model_classes = (
        PerceiverFlashModel,
        PerceiverFlashIOModel,
        PerceiverFlashForMaskedLM,
        PerceiverFlashForSequenceClassification,
    )


class PerceiverFlashEncoderTest(CommonTests, unittest.TestCase):
    tester = EncoderTester


class ImageTester(PerceiverTester):
    """Nine inputs of an image of 6×6 pixels, read by seven latents."""

    base_model_class = None
    model_classes = (PerceiverFlashForImageClassification,)
    key_length = 9
    config_arguments = {
        "modality": "image",
        "image_size": [6, 6],
        "patch_size": 2,
        "num_channels": 3,
        "num_frequency_bands": 3,
        "gated_feed_forward": True,
        "image_position_encoding": "learned",
    }

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.randn(self.batch_size, 3, 6, 6)}


class PerceiverFlashImageTest(CommonTests, unittest.TestCase):
    tester = ImageTester
    test_resize_embeddings = False  # there are none


class DecoderTester(PerceiverTester):
    model_classes = (PerceiverFlashModel, PerceiverFlashForCausalLM)
    causal_lm_class = PerceiverFlashForCausalLM
    # What the parallel tests set in a finished configuration, whose input_size has followed from it.
    hidden_size = 64
    # More latents than any test has tokens; tests/test_perceiver_flash_generation.py is about fewer.
    config_arguments = {"is_decoder": True, "num_latents": 80, "max_position_embeddings": 128}

    def config_values(self) -> dict:
        return super().config_values() | self.config_arguments


class PerceiverFlashDecoderTest(CausalTests, unittest.TestCase):
    tester = DecoderTester
