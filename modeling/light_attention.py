"""The light branch of routed attention: every token looks at its neighbours."""

from torch import Tensor, nn

from ..kernels.flash_attention import flash_attention
from .few_rows import project
from .norms import make_norm


class LightAttention(nn.Module):
    """Softmax attention of few heads over a sliding window, as LongT5's local attention (arXiv 2112.07916).

    O(N · radius) time, and no N×N tensor.

    Args:
        hidden_size: C.
        num_heads, head_dim: the heads, and the size of one.
        radius: how many tokens to either side a token sees (to the left, if causal), None for all of them. 127 is the
            paper's window of 255.
        causal: whether tokens see no later ones.
        norm_type, norm_eps: the norm in front.
        dropout: probability of dropping an attention weight.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        head_dim: int = 64,
        radius: int | None = 127,
        causal: bool = False,
        norm_type: str = "rms_norm",
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.head_dim, self.radius, self.causal, self.dropout = head_dim, radius, causal, dropout
        self.norm = make_norm(norm_type, hidden_size, norm_eps)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        *,
        distance_bias: Tensor | None = None,
        past=None,
    ) -> Tensor:
        """`[B, N, C]` for `hidden_states` `[B, N, C]`.

        Args:
            mask: `[B, everything seen]`, True at real tokens.
            distance_bias: `[H, 2R + 1]`, as in `flash_attention`.
            past: a cache layer with `update_window`, causal only.
        """
        query, key, value = self.project(hidden_states)
        if past is not None:
            key, value = past.add_to_window(key, value, self.radius)
        output = flash_attention(
            query,
            key,
            value,
            causal=self.causal,
            window=self.radius,
            key_mask=None if mask is None else mask[:, -key.shape[2] :],
            distance_bias=distance_bias,
            dropout_p=self.dropout if self.training else 0.0,
        )
        return project(self.o_proj, output.transpose(1, 2).flatten(2))

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, H, N, D]`."""
        normed = self.norm(hidden_states)
        query, key, value = (
            project(projection, normed).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return query, key, value
