"""transformers' own tests on XTransformers that read images, images and text, or vectors."""

import unittest

import torch

from hf_efficient import (
    XTransformerConfig,
    XTransformerForContinuousPrediction,
    XTransformerForImageClassification,
    XTransformerForImageTextToText,
    XTransformerImageEncoder,
)

from .harness import CommonTests, EncoderDecoderTester, GenerativeTests, TextTester


IMAGES = {"image_size": 6, "patch_size": 2, "num_channels": 3}


class ImageTester(TextTester):
    """Images of 6×6 pixels, which are nine patches."""

    config_class = XTransformerConfig
    config_arguments = {**IMAGES, "image_positions": "learned"}
    model_classes = (XTransformerImageEncoder, XTransformerForImageClassification)
    seq_length = 9

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {"pixel_values": torch.randn(self.batch_size, 3, 6, 6)}


class XTransformerImageTest(CommonTests, unittest.TestCase):
    tester = ImageTester
    test_resize_embeddings = False  # there are none


class PrependingTester(EncoderDecoderTester):
    """Nine patches in front of seven tokens, which the decoder reads."""

    config_class = XTransformerConfig
    config_arguments = {
        **IMAGES,
        "is_encoder_decoder": True,
        "decoder_start_token_id": 1,
        "image_fusion": "prepended",
    }
    model_classes = (XTransformerForImageTextToText,)
    encoder_seq_length = 16

    def prepare_config_and_inputs_for_common(self):
        mask = torch.ones(self.batch_size, 7, dtype=torch.long)
        mask[1:, -2:] = 0
        return self.get_config(), {
            "pixel_values": torch.randn(self.batch_size, 3, 6, 6),
            "input_ids": self.token_ids(7),
            "attention_mask": mask,
            "decoder_input_ids": self.token_ids(self.decoder_seq_length),
        }


class XTransformerImageTextEncoderDecoderTest(GenerativeTests, unittest.TestCase):
    tester = PrependingTester
    is_encoder_decoder = True


class CaptionTester(EncoderDecoderTester):
    """Nine patches, read by the decoder."""

    config_class = XTransformerConfig
    config_arguments = {**IMAGES, "is_encoder_decoder": True, "decoder_start_token_id": 1}
    model_classes = (XTransformerForImageTextToText,)
    encoder_seq_length = 9

    def prepare_config_and_inputs_for_common(self):
        return self.get_config(), {
            "pixel_values": torch.randn(self.batch_size, 3, 6, 6),
            "decoder_input_ids": self.token_ids(self.decoder_seq_length),
        }


class XTransformerCaptionEncoderDecoderTest(GenerativeTests, unittest.TestCase):
    tester = CaptionTester
    is_encoder_decoder = True


class VectorTester(TextTester):
    config_class = XTransformerConfig
    config_arguments = {"input_feature_size": 5, "output_feature_size": 5, "is_decoder": True}
    model_classes = (XTransformerForContinuousPrediction,)

    def prepare_config_and_inputs_for_common(self):
        vectors = torch.randn(self.batch_size, self.seq_length, 5)
        mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.long)
        mask[1:, -2:] = 0
        return self.get_config(), {"input_features": vectors, "attention_mask": mask, "labels": vectors}


class XTransformerVectorTest(CommonTests, unittest.TestCase):
    tester = VectorTester
    test_resize_embeddings = False  # there are none
