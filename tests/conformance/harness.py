"""What an architecture's test file needs: transformers' mixins put together, and a tester object for text models.

transformers' common tests ask two things of their surroundings: the *names* of the classes stand in the tables
`MODEL_…_MAPPING_NAMES`, by which the tests decide what labels a head takes (done here for the whole registry), and
`self.model_tester` makes a tiny config and its inputs.
"""

import copy
import sys
from typing import ClassVar

import torch
import transformers
from transformers import PreTrainedModel

from hf_efficient.registry import ARCHITECTURES

from .fetch import ensure_upstream
from .quiet_subtests import QuietSubTests


sys.path.insert(0, str(ensure_upstream()))

from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin  # noqa: E402

# For tests of ours: from where the mixins have it, so that there is one set of ranks.
from transformers_tests.distributed_testing_utils import run_distributed  # noqa: E402, F401
from transformers_tests.generation.test_utils import GenerationTesterMixin  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402
from transformers_tests.test_fsdp_mixin import FSDPTesterMixin  # noqa: E402
from transformers_tests.test_modeling_common import ModelTesterMixin  # noqa: E402
from transformers_tests.test_monkey_patching import MonkeyPatchTest  # noqa: E402, F401
from transformers_tests.test_tensor_parallel_mixin import TensorParallelTesterMixin  # noqa: E402
from transformers_tests.test_training_mixin import TrainingTesterMixin  # noqa: E402


def _open_to_our_models() -> None:
    for model_type, architecture in ARCHITECTURES.items():
        for auto_class, model_class in architecture.model_classes().items():
            # The very dict that the tests import under a name such as MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.
            names = getattr(transformers, auto_class)._model_mapping._model_mapping
            names[model_type] = model_class.__name__
        if architecture.others:
            # Models without a head, to the tests.
            others = [reference.rpartition(":")[2] for reference in architecture.others]
            names = transformers.AutoModel._model_mapping._model_mapping
            names[model_type] = (names[model_type], *others)
    # Both mixins run on a short list of transformers' own model types unless told otherwise.
    test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
    test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None
    # A rank is a process here (distributed_testing_utils.py), so the tests with four ranks run on two cores as well.
    test_fsdp_mixin._get_available_fsdp_workers = lambda: 4


_open_to_our_models()


class TextTester:
    """The object that transformers' mixins know as `model_tester`; a subclass says which classes and what config."""

    config_class: ClassVar[type]
    model_classes: ClassVar[tuple[type[PreTrainedModel], ...]]
    config_arguments: ClassVar[dict] = {}
    # The mixins read these three by name.
    base_model_class: ClassVar[type | None] = None
    causal_lm_class: ClassVar[type | None] = None
    # Fields that ConfigTester sets one after the other; None for its own choice.
    common_properties: ClassVar[list[str] | None] = None
    is_training = True

    batch_size = 3
    seq_length = 7
    hidden_size = 32
    num_hidden_layers = 2
    num_attention_heads = 4
    vocab_size = 99
    num_labels = 3

    def config_values(self) -> dict:
        sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        return {name: getattr(self, name) for name in sizes} | special | copy.deepcopy(self.config_arguments)

    def get_config(self):
        return self.config_class(**self.config_values(), num_labels=self.num_labels)

    def token_ids(self, length: int) -> torch.Tensor:
        # No special tokens: generation in these tests must not stop by accident, and no row ends in the middle.
        return torch.randint(3, self.vocab_size, (self.batch_size, length))

    def prepare_config_and_inputs_for_common(self):
        # Rows of different lengths, so that every test of the mixin meets padding.
        mask = torch.ones(self.batch_size, self.seq_length, dtype=torch.long)
        for row in range(1, self.batch_size):
            mask[row, self.seq_length - row :] = 0
        return self.get_config(), {"input_ids": self.token_ids(self.seq_length), "attention_mask": mask}


class EncoderDecoderTester(TextTester):
    """Encoder and decoder inputs of different lengths."""

    is_encoder_decoder = True
    # The mixins read the lengths to check the shapes of hidden states with; labels have the length `seq_length`.
    decoder_seq_length = 7
    encoder_seq_length = 9

    def prepare_config_and_inputs_for_common(self):
        mask = torch.ones(self.batch_size, self.encoder_seq_length, dtype=torch.long)
        mask[1:, -2:] = 0
        return self.get_config(), {
            "input_ids": self.token_ids(self.encoder_seq_length),
            "attention_mask": mask,
            "decoder_input_ids": self.token_ids(self.decoder_seq_length),
        }


class CommonTests(QuietSubTests, ModelTesterMixin):
    """ModelTesterMixin and ConfigTester around one tester object. Subclasses add `unittest.TestCase`."""

    tester: ClassVar[type[TextTester]]
    # Set for each test; named here because the other mixins declare it as an abstract property.
    model_tester = None
    # Otherwise the test asks for a "# Copyright 2026" line at the top of the file of the config.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        super().setUp()
        torch.manual_seed(0)
        self.model_tester = self.tester()
        self.all_model_classes = self.tester.model_classes
        self.config_tester = ConfigTester(
            self,
            config_class=self.tester.config_class,
            common_properties=self.tester.common_properties,
            **self.model_tester.config_values(),
        )

    def test_config(self):
        self.config_tester.run_common_tests()


class GenerativeTests(GenerationTesterMixin, CommonTests):
    """For classes that can generate. The sdist lacks generation tests: tests/test_generation_contract.py is ours."""


class CausalTests(TrainingTesterMixin, TensorParallelTesterMixin, FSDPTesterMixin, GenerativeTests):
    """For causal language models, the one kind that transformers' parallel and training mixins are written for."""

    # Repeated because the mixins come before CommonTests and declare an abstract property of this name.
    model_tester = None
    # Ten times the rate gets as far in a fifth of the steps.
    training_overfit_learning_rate = 1e-2
    training_overfit_steps = 60
