"""THE table of the conformance tests that do not run, and why. docs/conformance.md is written from it.

Nothing here switches a test off: every test runs as far as it wants to, and the ones below raise a skip themselves.
conftest.py compares the two: a skip that no row explains is a failure, and so is a row whose test ran. Rows about the
machine say with `unless` where the test is expected to run after all.
"""

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Machine:
    """A property of the machine: in words, and whether it holds here."""

    words: str
    holds: Callable[[], bool]


def package(name: str) -> Machine:
    return Machine(f"{name} is installed", lambda: importlib.util.find_spec(name) is not None)


GPU = Machine("there is a GPU", torch.cuda.is_available)
MPS = Machine("the GPU is Apple's", torch.backends.mps.is_available)


@dataclass(frozen=True)
class Skip:
    """Tests that skip themselves. All three patterns are regular expressions; the names must match in full."""

    tests: str
    raised: str  # stands somewhere in what the test says when it skips
    reason: str  # for the reader of docs/conformance.md
    classes: str = ".*"
    # The machine on which the test runs after all; there the row explains a skip and demands none.
    unless: Machine | None = None

    def covers(self, class_name: str, test: str) -> bool:
        return bool(re.fullmatch(self.classes, class_name) and re.fullmatch(self.tests, test))

    def demanded(self) -> bool:
        """Whether the test has to skip itself on this machine."""
        return self.unless is None or not self.unless.holds()

    def explains(self, message: str) -> bool:
        return re.search(self.raised, message) is not None


# One row per reason.
SKIPS = (
    # --- the machine
    Skip(
        tests="test_(cpu_offload|disk_offload_bin|disk_offload_safetensors|can_load_with_device_context_manager"
        "|can_load_with_global_device_set|flex_attention_with_grads|sdpa_can_dispatch_on_flash"
        "|sdpa_can_compile_dynamic)",
        raised="test requires (an )?accelerator|does not support (attentions|SDPA)",
        reason="needs a GPU, CI has none",
        unless=GPU,
    ),
    Skip(
        tests="test_model_parallelism",
        raised="test requires multiple accelerators",
        reason="needs two GPUs",
        unless=GPU,
    ),
    Skip(
        tests="test_torch_compile_for_training",
        raised="test is slow|_torch_compile_train_cls",
        reason="needs a GPU (CUDA graphs); tests/test_training.py trains under `torch.compile` on the CPU",
    ),
    Skip(
        tests="test_flash_attn_[234]_.*",
        raised="test requires Flash Attention",
        reason="needs a GPU and the flash-attn package",
        unless=package("flash_attn"),
    ),
    Skip(
        tests="test_flash_attn_kernels_mps_inference_equivalence",
        raised="test requires MPS",
        reason="needs Apple's GPU",
        unless=MPS,
    ),
    Skip(
        tests="test_(flash_attn_kernels_inference_equivalence|kernels_can_load_without_crashing)",
        raised="test requires the kernels library|test requires accelerator",
        reason="needs a GPU, the `kernels` package and the Hub",
        unless=package("kernels"),
    ),
    Skip(
        tests="test_resize_(tokens_embeddings|embeddings_untied)_with_deepspeed(_multi_gpu)?",
        raised="test requires deepspeed",
        reason="needs deepspeed",
        unless=package("deepspeed"),
    ),
    Skip(
        tests="test_tp_generation_quantized",
        raised="Test requires torchao",
        reason="needs torchao (float8 weights)",
        unless=package("torchao"),
    ),
    # --- what a text model without experts has no use for
    Skip(tests="test_vision_axial_rope", raised="axial RoPE", reason="rotary positions of images"),
    Skip(
        tests="test_(attn_implementation_composite_models|can_set_attention_dynamically_composite_model"
        "|internal_model_config_and_subconfig_are_same)",
        raised="not (a )?composite|No subconfigs|setting its attention dynamically",
        reason="about configs made of other configs",
    ),
    Skip(
        tests="test_(moe_models_record_router_logits|output_router_logits_from_config|moe_parallel_plans_shard_experts"
        "|eager_matches_batched_and_grouped_inference_.*|fsdp2_expert_parallel_.*|.*_expert_parallel)",
        raised="sparse experts|output_router_logits|MoE|grouped_mm|expert parallel plan",
        reason="about mixtures of experts",
    ),
    Skip(
        tests="test_(reverse_loading_mapping|can_load_from_already_mapped_keys)",
        raised="No conversion found",
        reason="about models whose checkpoints are converted while they are loaded; ours are stored as they are used",
    ),
)


def entries_for(class_name: str, test: str) -> list[Skip]:
    """The rows about this test."""
    return [skip for skip in SKIPS if skip.covers(class_name, test)]
