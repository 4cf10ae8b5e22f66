"""The heavy branch of routed attention: softmax attention of the routed queries over the routed keys."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..kernels.flash_attention import flash_attention
from .few_rows import project
from .norms import make_norm
from .rotary import apply_rotary, rotary_tables
from .token_router import (
    DEFAULT_OPTIONS,
    RouterOptions,
    Routing,
    TokenRouter,
    add_tokens,
    check_num_tokens,
    gather_tokens,
)


class HeavyAttention(nn.Module):
    """Adds `s_q · A(X_q, s_kv X_kv)` to the output of a light branch (CoLT5, arXiv 2303.09752, section 3.2).

    Queries and keys are routed independently, and the scores of the keys multiply the tokens that keys and values are
    made of, as in the paper. With q queries and v keys: O(q v) time for the attention, O(N C) for the routing; of the
    tensors in between only the logits have the length of the sequence.

    Args:
        hidden_size: C.
        num_heads: heads, a multiple of `num_key_value_sets`.
        head_dim: size of a head.
        num_routed_queries, num_routed_keys: an int is a number of tokens, a float a fraction of the sequence.
        num_key_value_sets: sets of keys and values, chosen by a routing vector each; every group of heads reads its
            own.
        rotary_base: base of rotary positions (arXiv 2104.09864) at the tokens' places in the sequence; None for none.
        multiply_keys_by_score: whether the score of a key multiplies the key as well as the value.
        multiply_queries_by_score: whether the score of a query multiplies the query as well as the output.
        null_query_token: a learned vector in the place of the heavy output where a token is not routed.
        null_key_value: a learned key and value per head that every query sees.
        norm_eps: epsilon of the norm in front, which queries and keys share.
        dropout: probability of dropping an attention weight.
        router_options: see `RouterOptions`.
        router_class: what makes the routers, with the arguments of `TokenRouter`.

    `multiply_keys_by_score=False`, `multiply_queries_by_score` and the null token, key and value are those of
    CoLT5-attention; the paper does not have them.

    Raises:
        ValueError: numbers that do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int = 8,
        head_dim: int = 64,
        num_routed_queries: int | float = 1 / 16,
        num_routed_keys: int | float = 1 / 8,
        num_key_value_sets: int = 1,
        rotary_base: float | None = 10000.0,
        multiply_keys_by_score: bool = True,
        multiply_queries_by_score: bool = False,
        null_query_token: bool = False,
        null_key_value: bool = False,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        router_options: RouterOptions = DEFAULT_OPTIONS,
        router_class: Callable[..., TokenRouter] = TokenRouter,
    ):
        super().__init__()
        check_num_tokens("num_routed_queries", num_routed_queries)
        check_num_tokens("num_routed_keys", num_routed_keys)
        if num_key_value_sets < 1 or num_heads % num_key_value_sets:
            raise ValueError(f"num_key_value_sets must divide num_heads ({num_heads}), got {num_key_value_sets}")
        self.num_heads, self.head_dim, self.num_sets = num_heads, head_dim, num_key_value_sets
        self.num_routed_queries, self.num_routed_keys = num_routed_queries, num_routed_keys
        self.rotary_base = rotary_base
        self.multiply_keys_by_score = multiply_keys_by_score
        self.multiply_queries_by_score = multiply_queries_by_score
        self.dropout = dropout
        self.q_router = router_class(hidden_size, 1, router_options)
        self.key_value_router = router_class(hidden_size, num_key_value_sets, router_options)
        self.norm = make_norm("rms_norm", hidden_size, norm_eps)
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)
        self.null_query_token = nn.Parameter(torch.randn(hidden_size)) if null_query_token else None
        self.null_key = nn.Parameter(torch.randn(num_heads, head_dim)) if null_key_value else None
        self.null_value = nn.Parameter(torch.randn(num_heads, head_dim)) if null_key_value else None

    def forward(
        self,
        output: Tensor,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        *,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        distance_bias: Tensor | None = None,
        num_routed_queries: int | float | None = None,
        num_routed_keys: int | float | None = None,
    ) -> Tensor:
        """`output` `[B, N, C]` with the heavy branch added in place.

        Args:
            hidden_states: `[B, N, C]`, what queries come from.
            mask: `[B, N]`, bool, True at real tokens.
            context, context_mask: `[B, M, C]` and `[B, M]`, what keys come from; the same as the queries if not given.
            distance_bias: `[H, 2R + 1]`, as in `flash_attention`, for the tokens' places in the sequence.
            num_routed_queries, num_routed_keys: instead of the module's own.
        """
        if context is None:
            context, context_mask = hidden_states, mask
        queries = self.q_router(hidden_states, num_routed_queries or self.num_routed_queries, mask)
        keys = self.key_value_router(context, num_routed_keys or self.num_routed_keys, context_mask)
        query = self.project_queries(hidden_states, queries)
        key, value = self.project_keys(context, keys)
        if distance_bias is None:
            memory_key, memory_value = self._null_key_value(len(output), key.dtype)
            attended = flash_attention(
                query,
                key,
                value,
                key_mask=None if keys.mask is None else keys.mask.flatten(0, 1),
                memory_key=memory_key,
                memory_value=memory_value,
                dropout_p=self.dropout if self.training else 0.0,
            )
        else:
            visible = None if keys.mask is None else keys.mask[:, :, None]
            bias = self.bias_of(distance_bias, queries.indices, keys.indices)
            attended = self.attend_to_pairs(query, key, value, visible, bias)
        return self.add_output(output, attended, queries)

    def project_queries(self, hidden_states: Tensor, routing: Routing, positions: Tensor | None = None) -> Tensor:
        """`[B · R, H / R, Q, D]` for the routed ones of `[B, N, C]`, rotation applied.

        `positions` `[B, 1, Q]` are the tokens' places in the sequence, their indices if not given.
        """
        query = project(self.q_proj, self.norm(gather_tokens(hidden_states, routing.indices[:, 0])))
        query = query.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        if self.multiply_queries_by_score:
            query = (query * routing.scores[..., None]).to(query.dtype)
        query = self._rotated(query, routing.indices if positions is None else positions)
        return query.unflatten(1, (self.num_sets, -1)).flatten(0, 1)

    def project_keys(
        self, context: Tensor, routing: Routing, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Keys and values `[B · R, H / R, K, D]` of the routed ones of `[B, M, C]`, scores and rotation applied.

        `positions` `[B, R, K]` are the tokens' places in the sequence, their indices if not given.
        """
        batch, sets, count = routing.indices.shape
        tokens = self.norm(gather_tokens(context, routing.indices.flatten(1)))
        scores = routing.scores.flatten(0, 1)[:, None, :, None]
        if sets == 1:
            key, value = project(self.k_proj, tokens), project(self.v_proj, tokens)
        else:
            tokens = tokens.view(batch, sets, count, -1)
            key, value = (
                torch.einsum("brkc,roc->brko", tokens, projection.weight.unflatten(0, (sets, -1)))
                for projection in (self.k_proj, self.v_proj)
            )
        key, value = (t.reshape(batch * sets, count, -1, self.head_dim).transpose(1, 2) for t in (key, value))
        if self.multiply_keys_by_score:
            key = (key * scores).to(key.dtype)
        value = (value * scores).to(value.dtype)
        positions = routing.indices if positions is None else positions
        return self._rotated(key, positions.flatten(0, 1)[:, None]), value

    def attend_to_pairs(
        self, query: Tensor, key: Tensor, value: Tensor, visible: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Attention where each pair of query and key has its own say: routed tokens stand at irregular distances.

        `visible` is `[B, R, Q or 1, K]`, bool, or None for all; `bias` `[B · R, H / R, Q, K]` or None.
        """
        null_key, null_value = self._null_key_value(len(query) // self.num_sets, key.dtype)
        if null_key is not None:
            key, value = torch.cat([null_key, key], dim=2), torch.cat([null_value, value], dim=2)
            bias = None if bias is None else nn.functional.pad(bias, (1, 0))
            visible = None if visible is None else nn.functional.pad(visible, (1, 0), value=True)
        if visible is not None:
            # A query that sees nothing is in no place that counts: it gets numbers, which are then dropped.
            visible = (visible | ~visible.any(dim=-1, keepdim=True)).flatten(0, 1)[:, None]
        if bias is None:
            mask = visible
        else:
            mask = bias.to(query.dtype)
            mask = mask if visible is None else mask.masked_fill(~visible, -torch.inf)
        dropout = self.dropout if self.training else 0.0
        return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)

    def add_output(self, output: Tensor, attended: Tensor, routing: Routing) -> Tensor:
        """`output` `[B, N, C]` with the projection of `attended` `[B · R, H / R, Q, D]` added in place."""
        attended = attended.unflatten(0, (-1, self.num_sets)).flatten(1, 2)
        heavy = project(self.o_proj, attended.transpose(1, 2).flatten(2))
        heavy = heavy * routing.scores[:, 0, :, None]
        if self.null_query_token is not None:
            output = output + self.null_query_token.to(output.dtype)
            heavy = heavy - self.null_query_token
        return add_tokens(output, heavy, routing)

    def _null_key_value(self, batch: int, dtype) -> tuple[Tensor | None, Tensor | None]:
        """Both `[B · R, H / R, 1, D]`, or None."""
        if self.null_key is None:
            return None, None
        key, value = (
            null.to(dtype).view(self.num_sets, -1, 1, self.head_dim).repeat(batch, 1, 1, 1)
            for null in (self.null_key, self.null_value)
        )
        return key, value

    def _rotated(self, states: Tensor, positions: Tensor) -> Tensor:
        """`states` `[B, H, N, D]` turned by `positions` `[B, 1, N]`."""
        if self.rotary_base is None:
            return states
        return apply_rotary(states, rotary_tables(positions[:, 0], self.head_dim, self.rotary_base))

    def bias_of(self, distance_bias: Tensor, query_places: Tensor, key_places: Tensor) -> Tensor:
        """`[B · R, H / R, Q, K]`: the entries of `distance_bias` `[H, 2r + 1]` for `[B, 1, Q]` and `[B, R, K]`."""
        reach = distance_bias.shape[-1] // 2
        distance = key_places[:, :, None, :] - query_places[:, :, :, None]
        index = distance.clamp(-reach, reach) + reach
        tables = distance_bias.unflatten(0, (self.num_sets, -1))
        bias = torch.stack([table.T[index[:, i]] for i, table in enumerate(tables)], dim=1)  # [B, R, Q, K, H / R]
        return bias.movedim(-1, 2).flatten(0, 1)
