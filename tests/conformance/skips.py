"""THE table of the conformance tests that do not run, and why. docs/conformance.md is written from it.

Nothing here switches a test off: every test runs as far as it wants to. Those below raise a skip themselves, or assume
something that is not so for our models and fail (`fails=True`). conftest.py compares the two: a skip or failure that
no row explains is red, and so is a row whose test passed. Rows about the machine say with `unless` where the test is
expected to run after all.
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
    """Tests that skip themselves, or (`fails`) cannot pass. Patterns are regular expressions; names match in full."""

    tests: str
    raised: str  # stands somewhere in what the test says when it skips or fails
    reason: str  # for the reader of docs/conformance.md
    classes: str = ".*"
    # The machine on which the test runs after all; there the row explains a skip and demands none.
    unless: Machine | None = None
    # The test is run and has to fail, with `raised` in its message.
    fails: bool = False

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
        reason="needs a GPU (CUDA graphs); tests/test_performer_training.py trains under `torch.compile`",
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
    Skip(tests="test_vision_axial_rope", raised="axial RoPE|`base_model_class`", reason="rotary positions of images"),
    Skip(
        tests="test_(attn_implementation_composite_models|can_set_attention_dynamically_composite_model"
        "|internal_model_config_and_subconfig_are_same|sdpa_can_dispatch_composite_models)",
        raised="not (a )?composite|No subconfigs|does not support (attentions|SDPA)",
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
    Skip(
        tests="test_(keep_in_fp32_modules|keep_in_fp32_modules_exist)",
        raised="no _keep_in_fp32_modules",
        reason="no module has to stay in float32: the operations accumulate in it themselves",
    ),
    Skip(
        tests="test_resize_position_vector_embeddings",
        raised="does not have position embeddings",
        reason="about `resize_position_embeddings`, which our models do not have",
    ),
    Skip(
        tests="test_encoder_decoder_loss_no_double_shift",
        raised="No sequence-to-sequence language modeling head",
        reason="about encoder–decoders",
        classes="(?!.*EncoderDecoder).*",
    ),
    Skip(
        tests="test_causal_lm_loss_honors_shift_labels",
        raised="No decoder-only language modeling head|already aligned with the targets",
        reason="about causal language models",
        classes=".*(Encoder|EncoderDecoder|Image|Vector)Test",
    ),
    # --- Performer
    Skip(
        tests="test_(attention_outputs|eager_matches_sdpa_inference_.*|sdpa_can_dispatch_non_composite_models)",
        raised="does not (output|support) attentions",
        reason="linear attention never forms the matrix of attention weights; PerformerSoftmaxTest runs them",
        classes="Performer(Decoder|Local|Hybrid|Encoder|EncoderDecoder)Test",
    ),
    Skip(
        tests="test_sliding_window_mask",
        raised="sliding window mask|does not support output_attentions",
        reason="looks for the window in the attention weights of a `sliding_window` model; ours is in local heads, "
        "which do not give out their weights",
    ),
    Skip(
        tests="test_model_rope_(scaling_from_config_.*|scaling_frequencies|with_partial_rotation)",
        raised="RoPE|`base_model_class`",
        reason="Performer's rotary base is a number, `rotary_emb_base`: no `rope_parameters`, no scaling",
        classes="Performer.*",
    ),
    Skip(
        tests="test_can_capture_specific_layers_hidden_states",
        raised="does not propagate hidden states correctly",
        reason="an encoder–decoder has encoder_ and decoder_hidden_states; the test looks for hidden_states",
        classes=".*EncoderDecoderTest",
    ),
    # --- XTransformer
    Skip(
        tests="test_model_rope_scaling_frequencies",
        raised="no standardized RoPE module|`base_model_class`",
        reason="looks for a rotary module with a buffer `inv_freq`; ours keeps its frequencies in float32, whatever "
        "the model is cast to, in `table`",
        classes="XTransformer.*",
    ),
    Skip(
        tests="test_model_rope_scaling_from_config_1_dynamic",
        raised="rope_type must be one of",
        reason="dynamic scaling changes the angles of cached keys as the sequence grows, so it is refused",
        classes="XTransformer(Decoder|ManyOptions|Encoder)Test",
        fails=True,
    ),
    Skip(
        tests="test_model_rope_(scaling_from_config_.*|with_partial_rotation)",
        raised="`base_model_class`",
        reason="about a base model with one stack",
        classes="XTransformer(ImageText|Caption)?EncoderDecoderTest",
    ),
    Skip(
        tests="test_inputs_embeds|test_resize_tokens_embeddings|test_resize_embeddings_untied",
        raised="input_ids",
        reason="gives token ids to an encoder that reads images alone",
        classes="XTransformerCaptionEncoderDecoderTest",
        fails=True,
    ),
    Skip(
        tests="test_model_rope_(scaling_from_config_.*|with_partial_rotation)",
        raised="`base_model_class`",
        reason="about a model of text",
        classes="XTransformerVectorTest",
    ),
    Skip(
        tests="test_model_rope_scaling_from_config_.*",
        raised="pixel_values must be floating point",
        reason="gives token ids to a model of images",
        classes="XTransformerImageTest",
        fails=True,
    ),
    Skip(
        tests="test_inputs_embeds_matches_input_ids",
        raised="doesn't use `inputs_embeds`",
        reason="images have no `inputs_embeds`",
        classes="XTransformerImageTest",
    ),
    # --- PerceiverFlash
    Skip(
        tests="test_model_rope_(scaling_from_config_.*|scaling_frequencies|with_partial_rotation)",
        raised="RoPE|`base_model_class`",
        reason="PerceiverFlash's rotary base is a number, `rotary_emb_base`: no `rope_parameters`, no scaling",
        classes="PerceiverFlash.*",
    ),
    Skip(
        tests="test_inputs_embeds",
        raised="doesn't use `inputs_embeds`",
        reason="images and vectors have no `inputs_embeds`",
        classes=".*(Image|Vector)Test",
    ),
    Skip(
        tests="test_(resize_embeddings_untied|resize_embeddings_untied_no_reinit_on_post_init"
        "|resize_tokens_embeddings)",
        raised="test_resize_embeddings is set to `False`",
        reason="about token embeddings, which a model of images or vectors has not",
        classes=".*(Image|Vector)Test",
    ),
    Skip(
        tests="test_model_get_set_embeddings",
        raised="is not an instance of",
        reason="about token embeddings, which a model of images or vectors has not: it looks for an `nn.Embedding`",
        classes=".*(Image|Vector)Test",
        fails=True,
    ),
    Skip(
        tests="test_enable_input_require_grads_with_gradient_checkpointing",
        raised="No model with a differentiable loss",
        reason="finds no model to try: it hooks the token embeddings",
        classes="(PerceiverFlash|XTransformer)(Image|Vector)Test",
    ),
    # --- CoLT5
    Skip(
        tests="test_(attention_outputs|eager_matches_sdpa_inference_.*|sdpa_can_dispatch_non_composite_models"
        "|can_set_attention_dynamically)",
        raised="does not (output|support) attentions|don't support sdpa|does not support SDPA",
        reason="attention goes through our own operation, which never forms the matrix of weights: there is no "
        "implementation to choose",
        classes="CoLT5.*",
    ),
    Skip(
        tests="test_model_rope_(scaling_from_config_.*|scaling_frequencies|with_partial_rotation)",
        raised="RoPE|`base_model_class`",
        reason="the rotary base of CoLT5's heavy branch is a number, `rotary_emb_base`: no `rope_parameters`",
        classes="CoLT5.*",
    ),
    Skip(
        tests="test_(training|training_gradient_checkpointing.*|enable_input_require_grads_with_gradient_checkpointing)",
        raised="not configured to run training tests|is_training",
        reason="about models with a loss",
        classes="CoLT5BareEncoderTest",
    ),
    Skip(
        tests="test_load_with_mismatched_shapes",
        raised="exactly one of decoder_input_ids",
        reason="loads the checkpoint with AutoModel as well, which is the encoder–decoder and wants decoder inputs",
        classes="CoLT5EncoderTest",
        fails=True,
    ),
)


def entries_for(class_name: str, test: str) -> list[Skip]:
    """The rows about this test."""
    return [skip for skip in SKIPS if skip.covers(class_name, test)]
