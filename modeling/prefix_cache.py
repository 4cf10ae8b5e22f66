"""The cache layer of a block whose sequence begins with memory tokens, or whose inputs are shifted.

Memory tokens are cached like any others, but the caller does not know of them: lengths are counted without them.
"""

from .cache_layers import also_static
from .token_shift_cache import FullAttentionShiftLayer


@also_static
class PrefixLayer(FullAttentionShiftLayer):
    """Growing keys and values, of which the first `prefix_length` belong to memory tokens.

    `first_length` is the number of tokens that came with the first call, behind whose left padding the prefix stands.
    """

    _layer_type = "full_attention_with_prefix"

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.prefix_length = self.first_length = 0

    def get_seq_length(self) -> int:
        length = super().get_seq_length()
        return length - self.prefix_length if length else 0

    def reset(self) -> None:
        super().reset()
        self.prefix_length = self.first_length = 0
