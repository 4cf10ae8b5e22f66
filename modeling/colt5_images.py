"""CoLT5 for images: the routed blocks of `CoLT5Encoder` over patches, after Simple ViT (arXiv 2205.01580)."""

from typing import Unpack

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ..configuration.colt5 import CoLT5Config
from .colt5_layers import attention_options, feed_forward_options
from .colt5_stacks import ENCODER_ONLY, ROUTER_RECORDER, CoLT5PreTrainedModel, RoutedModelOutput
from .heads import ImageClassificationHead
from .image_patches import PatchEmbedding, sincos_positions
from .routed_feed_forward import RoutedFeedForward
from .routed_image_attention import RoutedImageAttention


class CoLT5ImageLayer(GradientCheckpointingLayer):
    """`CoLT5EncoderLayer` over a map of patches, with the heavy attention over the whole map."""

    def __init__(self, config: CoLT5Config):
        super().__init__()
        self.self_attn = RoutedImageAttention(
            config.hidden_size,
            window_size=config.image_window_size,
            heavy_in_windows=config.heavy_attention_in_windows,
            **attention_options(config),
        )
        self.mlp = RoutedFeedForward(config.hidden_size, **feed_forward_options(config))
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, maps: Tensor) -> Tensor:
        """`[B, height, width, C]`."""
        maps = maps + self.dropout(self.self_attn(maps))
        return maps + self.dropout(self.mlp(maps.flatten(1, 2)).view(maps.shape))


class CoLT5ImageEncoder(CoLT5PreTrainedModel):
    """The encoder of images: patches with sine and cosine positions, conditional computation in every block."""

    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _can_record_outputs = {
        "hidden_states": CoLT5ImageLayer,
        "router_logits": ROUTER_RECORDER,
    }

    def __init__(self, config: CoLT5Config):
        super().__init__(config)
        self.embeddings = PatchEmbedding(config.patch_size, config.num_channels, config.hidden_size)
        self.dropout = nn.Dropout(config.dropout_rate)
        self.layers = nn.ModuleList([CoLT5ImageLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.LayerNorm(config.hidden_size)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.projection

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> RoutedModelOutput:
        """The states of the patches, `[B, height, width, hidden_size]`, without the last norm.

        Args:
            pixel_values: `[B, num_channels, height, width]`, of any size that patches and windows divide.
        """
        maps = self.embeddings(pixel_values.to(self.embeddings.projection.weight.dtype))
        height, width = maps.shape[1:3]
        positions = sincos_positions(height, width, maps.shape[-1], device=maps.device, dtype=maps.dtype)
        maps = self.dropout(maps + positions)
        for layer in self.layers:
            maps = layer(maps)
        return RoutedModelOutput(last_hidden_state=maps)


class CoLT5ForImageClassification(ImageClassificationHead, CoLT5PreTrainedModel):
    """One label for an image: routed blocks over its patches, the mean of their states, a norm and a linear layer."""

    body_class = CoLT5ImageEncoder

    @classmethod
    def head_config(cls, config: CoLT5Config) -> CoLT5Config:
        check_image_sizes(config)
        return config.part(**ENCODER_ONLY)

    def add_head(self, config: CoLT5Config) -> None:
        self.num_labels = config.num_labels
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)

    def classify(self, hidden_states: Tensor) -> Tensor:
        return self.classifier(self.dropout(self.model.norm(hidden_states.mean(dim=(1, 2)))))


def check_image_sizes(config: CoLT5Config) -> None:
    """Patches and windows divide the images.

    Raises:
        ValueError: otherwise.
    """
    size = config.patch_size * config.image_window_size
    if config.image_size % size:
        raise ValueError(
            f"image_size must be a multiple of patch_size · image_window_size ({size}), got {config.image_size}"
        )
