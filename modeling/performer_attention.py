"""Performer's attention: linear heads (FAVOR+) with local softmax heads beside them, and full softmax attention."""

import math

import torch
from torch import nn
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.linear_attention import FeatureMap, LinearAttentionState, linear_attention, plain_step
from .few_rows import project
from .joint_projection import JointProjection
from .local_attention import local_attention, past_reach
from .random_features import draw_projection, optimal_positive_constants
from .recurrent_cache import RecurrentStateLayer
from .rotary import RotaryTables, apply_rotary, rotary_tables
from .sequence_features import sequence_stabilized_features


def repeat_kv(states: torch.Tensor, groups: int) -> torch.Tensor:
    """`[B, KV, N, D]` to `[B, KV * groups, N, D]`, each head `groups` times."""
    return states if groups == 1 else states.repeat_interleave(groups, dim=1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Softmax attention written out, with its weights: `[B, N, H, D]` and `[B, H, N, K]`."""
    key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
    scores = (query @ key.mT) * scaling
    if attention_mask is not None:
        if attention_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
        else:
            scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class _PerformerAttentionBase(nn.Module):
    """The projections that both kinds of attention share, and where cross-attention's keys come from."""

    def __init__(self, config, layer_idx: int, is_cross_attention: bool):
        super().__init__()
        self.config, self.layer_idx, self.is_cross_attention = config, layer_idx, is_cross_attention
        self.is_causal = config.is_decoder and not is_cross_attention
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        inner, key_value = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
        self.q_proj = nn.Linear(config.hidden_size, inner, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value, bias=config.attention_bias)
        self.o_proj = nn.Linear(inner, config.hidden_size, bias=config.attention_out_bias)
        self.output_dropout = config.attention_output_dropout

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        """`[B, N, H * D]` to `[B, H, N, D]`; tensor parallelism may have left fewer heads than the config says."""
        return states.view(*states.shape[:2], -1, self.head_dim).transpose(1, 2)

    def project_out(self, attended: torch.Tensor) -> torch.Tensor:
        """`[B, H, N, D]` to `[B, N, C]`."""
        return self.drop(project(self.o_proj, attended.transpose(1, 2).flatten(2)))

    def drop(self, output: torch.Tensor) -> torch.Tensor:
        """The dropout behind the output projection, in training."""
        return nn.functional.dropout(output, self.output_dropout) if self.training and self.output_dropout else output


class PerformerAttention(_PerformerAttentionBase):
    """Linear attention through random features in the first heads, windowed softmax attention in the last ones."""

    def __init__(self, config, layer_idx: int, is_cross_attention: bool = False):
        super().__init__(config, layer_idx, is_cross_attention)
        # Read once: every attribute of a configuration costs microseconds, and a decoding step asks many.
        self.feature_map, self.feature_epsilon = config.feature_map, float(config.feature_epsilon)
        self.feature_scale = config.head_dim**-0.25
        self.has_legacy_features = config.feature_stabilizer == "sequence"
        self.masked_keys_in_normalizer = config.masked_keys_in_normalizer
        self.causal_normalizer_epsilon = config.causal_normalizer_epsilon
        self.kernel_backend = config.kernel_backend
        self.num_heads = config.num_attention_heads
        self.projection_index = 2 * layer_idx + int(is_cross_attention)
        self.num_local_heads = 0 if is_cross_attention else config.local_heads(layer_idx)
        self.has_global_heads = self.num_local_heads < config.num_attention_heads
        self.may_be_plain = self.is_causal and not (self.num_local_heads or self.has_legacy_features)
        self.may_be_plain &= self.num_key_value_groups == 1 and not self.masked_keys_in_normalizer
        self.may_be_plain &= self.feature_map in ("softmax", "hyperbolic") and self.feature_epsilon > 0
        rows = self.num_projection_rows(config) if self.has_global_heads else 0
        # Persistent: the weights were trained with these features and mean nothing without them.
        self.register_buffer("projection_matrix", torch.empty(rows, config.head_dim) if rows else None)
        if rows and not self.projection_matrix.is_meta:
            self.projection_matrix.copy_(self.initial_projection())
        self.joint_projection = JointProjection()
        optimal = config.feature_map == "optimal_positive" and self.has_global_heads
        self.register_buffer("pair_norm", torch.tensor(float(config.expected_pair_norm)) if optimal else None)

    def _apply(self, fn, recurse=True):
        self.joint_projection.clear()  # the weights go to another device or dtype
        return super()._apply(fn, recurse)

    @staticmethod
    def num_projection_rows(config) -> int:
        """How many rows are drawn: half of the features if both signs are used, none without a projection."""
        if config.feature_map in ("elu", "no_projection"):
            return 0
        return config.num_random_features // (2 if config.feature_map == "hyperbolic" else 1)

    def initial_projection(self) -> torch.Tensor:
        """The first draw of this layer's projection, `[rows, head_dim]`."""
        return draw_projection(
            *self.projection_matrix.shape,
            seed=self.config.feature_seed,
            layer_idx=self.projection_index,
            draw=0,
            orthogonal=self.config.orthogonal_features,
            scaling=self.config.feature_scaling,
        )

    def make_feature_map(self, projection: torch.Tensor | None) -> FeatureMap:
        """The feature map of this layer for the drawn `projection` `[M, D]` (None for maps without one)."""
        kind, epsilon, scale = self.feature_map, self.feature_epsilon, self.feature_scale
        if kind == "softmax":
            return FeatureMap("exponential", projection, None, scale, epsilon)
        if kind == "hyperbolic":
            return FeatureMap("exponential", torch.cat([projection, -projection]), None, scale, epsilon)
        if kind == "optimal_positive":
            a, b = optimal_positive_constants(self.head_dim, self.pair_norm.float())
            rows = projection.float()
            return FeatureMap("exponential", b * rows, a * rows.square().sum(dim=-1), scale, epsilon)
        if kind == "no_projection":
            return FeatureMap("exponential", None, None, 1.0, epsilon, subtract_norm=False)
        if kind == "elu":
            return FeatureMap("elu_plus_one", None, None, 1.0, epsilon)
        return FeatureMap(kind, projection, None, scale, epsilon)

    def forward(
        self,
        hidden_states: torch.Tensor,
        padding_mask: torch.Tensor | None = None,
        window_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        rotary: RotaryTables | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        projection: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        """Attend from `hidden_states` `[B, N, C]` to itself, or to `encoder_hidden_states` `[B, K, C]`.

        Args:
            padding_mask: `[B, N]` (`[B, K]` for cross-attention), nonzero at real tokens, or None.
            window_mask: `[B, everything seen]`, the same for the local heads, which also see cached keys.
            position_ids: `[B or 1, N]`.
            rotary: tables for the global heads, or None.
            past_key_values: the cache, whose layer `layer_idx` holds this layer's state.
            projection: the projection to use instead of the buffer (a training forward captures it).
        """
        if self.is_cross_attention:
            attended = self._cross_attend(
                hidden_states, encoder_hidden_states, padding_mask, past_key_values, projection
            )
            return self.project_out(attended), None
        layer = self._cache_layer(past_key_values)
        plain = padding_mask is None and self._may_be_plain_step(hidden_states, layer)
        if plain:
            # Of rows in two dimensions a projection is one operator; in three, `matmul` and its views stand around it.
            query_and_key, value = self._project_token(hidden_states.squeeze(1), layer)
            attended = self._plain_step(query_and_key, value, rotary, layer, projection)
            if attended is not None:
                layer.count(hidden_states)
                return self.drop(project(self.o_proj, attended.flatten(1))).unsqueeze(1), None
            query, key, value = (states.unsqueeze(1) for states in (*query_and_key.chunk(2, dim=-1), value))
        else:
            query, key, value = (project(proj, hidden_states) for proj in (self.q_proj, self.k_proj, self.v_proj))
        query = self.split_heads(query)
        key, value = (repeat_kv(self.split_heads(states), self.num_key_value_groups) for states in (key, value))
        if not self.num_local_heads:
            attended = self._global_heads(query, key, value, padding_mask, rotary, layer, projection)
        else:
            attended = self._both_kinds(
                query, key, value, padding_mask, window_mask, position_ids, rotary, layer, projection
            )
        if layer is not None:
            layer.count(hidden_states)
        return self.project_out(attended), None

    def _may_be_plain_step(self, hidden_states: torch.Tensor, layer: RecurrentStateLayer | None) -> bool:
        """Whether this is one token of decoding that `_plain_step` may take. Projections see it as `[B, C]` then."""
        return (
            self.may_be_plain
            and layer is not None
            and hidden_states.shape[1] == 1
            and hidden_states.is_cpu
            and not torch.is_grad_enabled()
            and layer.owns_state
            and hasattr(layer, "step_offsets")  # not of an older copy of this code
        )

    def _project_token(self, rows: torch.Tensor, layer: RecurrentStateLayer) -> tuple[torch.Tensor, torch.Tensor]:
        """Of `[B, C]`, queries and keys `[B, 2 H * D]` and values `[B, H * D]`."""
        layers = self.q_proj, self.k_proj, self.v_proj
        together = self.joint_projection(layers, rows, layer)
        if together is not None:
            return together.tensor_split((2 * self.q_proj.out_features,), dim=-1)
        query, key, value = (project(proj, rows) for proj in layers)
        return torch.cat([query, key], dim=-1), value

    def _plain_step(self, query_and_key, value, rotary, layer, projection) -> torch.Tensor | None:
        """One token of decoding, behind fewer checks than `_global_heads`; None where that has to do it.

        Args:
            query_and_key, value: `[B, 2 H * D]` and `[B, H * D]`, whose heads need no transposition.
        """
        if value.dtype != layer.keys.dtype:
            return None
        batch = value.shape[0]
        both = query_and_key.view(batch, -1, 1, self.head_dim)
        if rotary is not None:
            both = apply_rotary(both, rotary)
        feature_map = self._step_feature_map(self.projection_matrix if projection is None else projection, layer)
        value = value.view(batch, -1, 1, self.head_dim)
        return plain_step(both, value, feature_map, layer.state, layer.step_offsets, self.kernel_backend)

    def _step_feature_map(self, projection: torch.Tensor, layer: RecurrentStateLayer) -> FeatureMap:
        """The feature map, its projection stored column by column: the few rows of a step are multiplied faster.

        It is kept with the state, which is made of these features.
        """
        known = getattr(layer, "step_feature_map", None)
        if known is None or known[0] is not projection:
            feature_map = self.make_feature_map(projection)
            columns = feature_map.projection.t().contiguous()
            known = layer.step_feature_map = projection, feature_map._replace(projection=columns.t())
        return known[1]

    def _both_kinds(self, query, key, value, padding_mask, window_mask, position_ids, rotary, layer, projection):
        """Linear attention in the first heads, local attention in the last ones."""
        if query.shape[1] != self.num_heads:
            raise ValueError(
                f"a layer with local heads needs all {self.num_heads} heads in one place, got {query.shape[1]}: "
                "tensor parallelism cannot split two kinds of heads"
            )
        split = self.num_heads - self.num_local_heads
        parts = [states[:, split:] for states in (query, key, value)]
        local = self._local_heads(*parts, window_mask, position_ids, layer)
        if not split:
            return local
        parts = [states[:, :split] for states in (query, key, value)]
        linear = self._global_heads(*parts, padding_mask, rotary, layer, projection)
        return torch.cat([linear, local], dim=1)

    def measure_pair_norm(self, module, args, kwargs) -> None:
        """A forward pre-hook that sets `pair_norm` to the mean of `|q + k|²` over pairs of real tokens and heads."""
        hidden_states, mask = args[0], kwargs.get("padding_mask")
        keep = torch.ones_like(hidden_states[..., 0]) if mask is None else mask.to(hidden_states.dtype)
        weights = (keep / keep.sum())[:, None, :, None]
        query, key = (self.split_heads(proj(hidden_states)) for proj in (self.q_proj, self.k_proj))
        key = repeat_kv(key, self.num_key_value_groups)
        squares = sum((states.square() * weights).sum(dim=(0, 2, 3)) for states in (query, key))
        means = [(states * weights).sum(dim=(0, 2)) for states in (query, key)]
        pair_norm = squares + 2 * (means[0] * means[1]).sum(dim=-1)
        self.pair_norm.fill_(pair_norm.mean() * self.head_dim**-0.5)

    def _cache_layer(self, past_key_values: Cache | None) -> RecurrentStateLayer | None:
        if past_key_values is None:
            return None
        if isinstance(past_key_values, EncoderDecoderCache):
            own = (
                past_key_values.cross_attention_cache
                if self.is_cross_attention
                else past_key_values.self_attention_cache
            )
        else:
            own = past_key_values
        layer = own.layers[self.layer_idx] if self.layer_idx < len(own.layers) else None
        # By name: the cache may have been made by another copy of this code.
        if getattr(layer, "_layer_type", None) != RecurrentStateLayer._layer_type:
            raise ValueError(
                f"past_key_values must hold a {RecurrentStateLayer.__name__} at layer {self.layer_idx}, got "
                f"{type(layer).__name__}: create it with DynamicCache(config=model.config)"
            )
        return layer

    def _global_heads(self, query, key, value, mask, rotary, layer, projection):
        if rotary is not None:
            query, key = apply_rotary(torch.cat([query, key], dim=1), rotary).chunk(2, dim=1)
        feature_map = self.make_feature_map(self.projection_matrix if projection is None else projection)
        backend = self.kernel_backend
        state = None if layer is None else layer.state
        if self.has_legacy_features:
            query, key, feature_map = self._legacy_inputs(query, key, feature_map)
        first_state = self._first_state(query, value, feature_map)
        state = first_state if state is None else state
        value, sums_mask = self._mask_keys(value, mask)
        if self.feature_map == "no_projection" and not self.is_causal:
            key = _softmax_over_sequence(key, sums_mask)
        # The cache owns its state, so a decoding step may overwrite it; not what a crop has to come back to.
        in_place = layer is not None and layer.owns_state and query.shape[2] == 1 and not torch.is_grad_enabled()
        output, new_state = linear_attention(
            query,
            key,
            value,
            feature_map,
            causal=self.is_causal,
            mask=sums_mask,
            state=state,
            update_state_in_place=in_place,
            backend=backend,
        )
        if layer is not None:

            def advance(state: LinearAttentionState | None, key, value, mask) -> LinearAttentionState:
                # The queries do not matter for the state; the keys stand in for them.
                state = first_state if state is None else state
                return linear_attention(
                    key, key, value, feature_map, causal=True, mask=mask, state=state, backend=backend
                ).state

            layer.update_state(new_state, key, value, sums_mask, advance)
        return output.to(query.dtype)

    def _mask_keys(self, value, mask):
        """The values, and the mask of the keys: the original's padding removes values only."""
        if mask is None or not self.masked_keys_in_normalizer:
            return value, mask
        return value * mask[:, None, :, None].to(value.dtype), None

    def _legacy_inputs(self, query, key, feature_map):
        """Given features instead of inputs."""
        epsilon, projection = feature_map.epsilon, feature_map.projection
        dtype = torch.promote_types(query.dtype, torch.float32)
        features = sequence_stabilized_features(query.to(dtype), key.to(dtype), projection.to(dtype), epsilon)
        return *(states.to(query.dtype) for states in features), FeatureMap("identity")

    def _first_state(self, query, value, feature_map) -> LinearAttentionState | None:
        """The original's epsilon as what a causal normaliser has "seen" before the first key; None without one."""
        epsilon = self.causal_normalizer_epsilon
        if not self.is_causal or not epsilon:
            return None
        dtype = torch.promote_types(query.dtype, torch.float32)
        features = feature_map.num_features(query.shape[-1])
        state = LinearAttentionState.empty(
            *query.shape[:2], features, value.shape[-1], dtype=dtype, device=query.device
        )
        return state._replace(
            key_sum=torch.full_like(state.key_sum, epsilon), log_scale=torch.zeros_like(state.log_scale)
        )

    def _local_heads(self, query, key, value, mask, position_ids, layer):
        config = self.config
        bucketed = config.local_attention_type == "bucketed"
        if config.local_rotary:
            shift = config.local_window_size if config.shifted_local_rotary else 0
            query = apply_rotary(query, rotary_tables(position_ids + shift, self.head_dim, config.rotary_emb_base))
            key = apply_rotary(key, rotary_tables(position_ids, self.head_dim, config.rotary_emb_base))
        if layer is not None:
            key, value = layer.update(key, value, reach=past_reach(config.local_window_size, bucketed))
        if mask is not None:
            mask = mask[:, -key.shape[2] :]
        return local_attention(
            query,
            key,
            value,
            window=config.local_window_size,
            causal=self.is_causal,
            bucketed=bucketed,
            position_ids=position_ids,
            mask=mask,
            scaling=self.scaling,
            dropout=config.attention_dropout if self.training else 0.0,
            blind_rows="mean" if bucketed and config.masked_keys_in_normalizer else "zero",
        )

    def _cross_attend(self, hidden_states, encoder_hidden_states, mask, past_key_values, projection):
        query = self.split_heads(project(self.q_proj, hidden_states))
        feature_map = self.make_feature_map(self.projection_matrix if projection is None else projection)
        layer, backend = self._cache_layer(past_key_values), self.kernel_backend
        if layer is not None and past_key_values.is_updated.get(self.layer_idx):
            return linear_attention(query, None, None, feature_map, state=layer.state, backend=backend).output
        key, value = (self.split_heads(proj(encoder_hidden_states)) for proj in (self.k_proj, self.v_proj))
        key, value = (repeat_kv(states, self.num_key_value_groups) for states in (key, value))
        if self.has_legacy_features:
            query, key, feature_map = self._legacy_inputs(query, key, feature_map)
        value, mask = self._mask_keys(value, mask)
        if self.feature_map == "no_projection":
            key = _softmax_over_sequence(key, mask)
        output, state = linear_attention(query, key, value, feature_map, mask=mask, backend=backend)
        if layer is not None:
            layer.state = state
            layer.count(encoder_hidden_states)
            past_key_values.is_updated[self.layer_idx] = True
        return output


def _softmax_over_sequence(key: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Keys `[B, H, K, D]` whose `exp` sums to 1 over the unmasked positions, feature by feature."""
    logits = key.to(torch.promote_types(key.dtype, torch.float32))
    visible = logits if mask is None else logits.masked_fill(mask[:, None, :, None] == 0, -math.inf)
    return (logits - visible.logsumexp(dim=2, keepdim=True).clamp(min=-1e30)).to(key.dtype)


class PerformerSoftmaxAttention(_PerformerAttentionBase):
    """Softmax attention through transformers' attention interface: the `"full_attention"` layers of a hybrid."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        rotary: RotaryTables | None = None,
        encoder_hidden_states: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `PerformerAttention.forward`; `attention_mask` is what transformers' mask functions make, or None."""
        query = self.split_heads(project(self.q_proj, hidden_states))
        cross = self.is_cross_attention
        cache, known = past_key_values, False
        if isinstance(past_key_values, EncoderDecoderCache):
            known = cross and past_key_values.is_updated.get(self.layer_idx)
            cache = past_key_values.cross_attention_cache if cross else past_key_values.self_attention_cache
        if known:
            key, value = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
        else:
            source = encoder_hidden_states if cross else hidden_states
            key, value = (self.split_heads(project(proj, source)) for proj in (self.k_proj, self.v_proj))
            if rotary is not None and not cross:
                query, key = apply_rotary(query, rotary), apply_rotary(key, rotary)
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx)
                if cross:
                    past_key_values.is_updated[self.layer_idx] = True
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=self.is_causal,
            **kwargs,
        )
        return self.drop(project(self.o_proj, attended.flatten(2))), weights
