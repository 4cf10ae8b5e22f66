"""Linear attention chunk by chunk: the fast form for machines without a Triton path.

Only one chunk's rows of features exist at a time, so the working set stays in the processor's cache and nothing of
size length × features is ever stored; the backward pass computes the features again. Inside a chunk the weights are
the small matrix `A = (Q̂ K̂ᵀ) ∘ D` with `D_ij = exp(s_j - m_i)` for `j ≤ i`, where `s_j` is the key's scale and `m_i`
the running maximum of the scales; the keys before the chunk are in the state `S`:

    N = A V̄ + exp(m₀ - m) ∘ (Q̂ S̄),      S̄ ← exp(m₀ - m_C) S̄ + K̂ᵀ (exp(s - m_C) ∘ V̄),      V̄ = [V, 1]

The column of ones makes the denominators. The forward pass computes them apart, as sums: a product with 65 columns
takes a fifth longer than one with 64. `D` and all the exponentials are at most 1, and row i uses nothing of a later
row. Tensors here are flat over batch and heads (B·H first), in the computation's dtype.
"""

from typing import NamedTuple

import torch

from .feature_maps import EXPONENTIAL, POINTWISE_FUNCTIONS, FeatureMap, project
from .state import EMPTY_LOG_SCALE, LinearAttentionState


# Rows at a time. Measured on two cores (m = 266, d = 64): the causal form takes an EPYC the same time with 32 to 128,
# a Xeon 10 to 20 % less with 128 than with 64 or 256, and in the other form 5 % less with 256 than with 128.
CAUSAL_CHUNK = 128
BIDIRECTIONAL_CHUNK = 256


class _Features(NamedTuple):
    """Features of a chunk `[BH, C, M]`, the logits where the derivative needs them, the keys' scales `[BH, C]`."""

    values: torch.Tensor
    logits: torch.Tensor | None
    log_scale: torch.Tensor | None


def chunk_features(
    rows: torch.Tensor, feature_map: FeatureMap, *, is_key: bool, for_backward: bool = False
) -> _Features:
    """`feature_maps.query_features` and `key_features`, in place wherever nothing else needs the tensor."""
    logits = project(rows, feature_map)
    if feature_map.function != EXPONENTIAL:
        values = POINTWISE_FUNCTIONS[feature_map.function].value(logits)
        values = values.add_(feature_map.epsilon) if feature_map.epsilon else values
        log_scale = logits.new_zeros(logits.shape[:-1]) if is_key else None
        return _Features(values, logits if for_backward else None, log_scale)
    values = torch.softmax(logits, dim=-1)
    log_scale = None
    if is_key:
        # The largest probability is exp(largest logit - logsumexp), and with M features never below 1 / M.
        log_scale = logits.amax(dim=-1).sub_(values.amax(dim=-1).log_())
        if feature_map.subtract_norm:
            log_scale.sub_(rows.square().sum(dim=-1), alpha=0.5 * feature_map.scale**2)
    return _Features(values.add_(feature_map.epsilon) if feature_map.epsilon else values, None, log_scale)


def _features_backward(features: _Features, grad: torch.Tensor, rows: torch.Tensor, feature_map: FeatureMap, is_key):
    """Gradient with respect to `rows` and to the logits, given `grad` with respect to the features (overwritten).

    A query's features are free up to a factor per row, so `Σ_f φ_f ∂φ_f = 0` for them; a key's scale has the gradient
    `Σ_f φ_f ∂φ_f`. In both cases the gradient of the softmax inside collapses to the line below.
    """
    if feature_map.function != EXPONENTIAL:
        grad_logits = grad.mul_(POINTWISE_FUNCTIONS[feature_map.function].derivative(features.logits))
    elif feature_map.epsilon:
        floor = grad.sum(dim=-1, keepdim=True).mul_(feature_map.epsilon)
        grad_logits = grad.add_(floor).mul_(features.values - feature_map.epsilon)
    else:
        grad_logits = grad.mul_(features.values)
    if feature_map.projection is None:
        grad_rows = grad_logits * feature_map.scale
    else:
        grad_rows = grad_logits @ (feature_map.projection * feature_map.scale)
    if is_key and feature_map.function == EXPONENTIAL and feature_map.subtract_norm:
        grad_rows = grad_rows.addcmul_(grad_logits.sum(dim=-1, keepdim=True), rows, value=-(feature_map.scale**2))
    return grad_rows, grad_logits


class _Inputs(NamedTuple):
    """Hands out chunks of the inputs, flat over batch and heads and in the computation's dtype."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    keep: torch.Tensor | None  # [BH, N], True where the key counts
    dtype: torch.dtype

    @classmethod
    def of(cls, query, key, value, mask, dtype):
        keep = None if mask is None else mask.to(torch.bool).repeat_interleave(query.shape[1], dim=0)
        return cls(query, key, value, keep, dtype)

    def rows(self, name: str, here: slice) -> torch.Tensor:
        return getattr(self, name)[:, :, here].flatten(0, 1).to(self.dtype)

    def values(self, here: slice) -> torch.Tensor:
        values = self.rows("value", here)
        # `where`, not a product: what stands at a padded position may be infinite.
        return values if self.keep is None else torch.where(self.keep[:, here, None], values, 0)

    def values_with_ones(self, here: slice) -> torch.Tensor:
        values = self.rows("value", here)
        values = torch.cat([values, values.new_ones(*values.shape[:-1], 1)], dim=-1)
        return values if self.keep is None else torch.where(self.keep[:, here, None], values, 0)

    def keys(self, here: slice, feature_map: FeatureMap, for_backward: bool = False):
        rows = self.rows("key", here)
        if self.keep is not None:
            rows = torch.where(self.keep[:, here, None], rows, 0)
        features = chunk_features(rows, feature_map, is_key=True, for_backward=for_backward)
        if self.keep is not None:
            # Zero, not only of the smallest scale: beside no other key, that scale would be the largest too.
            features = features._replace(
                values=torch.where(self.keep[:, here, None], features.values, 0),
                log_scale=torch.where(self.keep[:, here], features.log_scale, EMPTY_LOG_SCALE),
            )
        return rows, features


def _chunks(length: int, size: int):
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _joint_sums(key_value: torch.Tensor, key_sum: torch.Tensor) -> torch.Tensor:
    """Both sums of a state (or their gradients) side by side: `[BH, M, V+1]`."""
    return torch.cat([key_value, key_sum[..., None]], dim=-1).flatten(0, 1)


class _Memory:
    """A state to be advanced in place, flat over batch and heads: `values` `[BH, M, V]`, `sums` `[BH, M]`, `scale`."""

    def __init__(self, state: LinearAttentionState):
        self.values, self.sums, self.scale = (
            t.flatten(0, 1).clone(memory_format=torch.contiguous_format) for t in state
        )

    def add(self, features: torch.Tensor, log_scale: torch.Tensor, values: torch.Tensor, end: torch.Tensor) -> None:
        """Add the keys of a chunk; `end` is the scale behind them."""
        weights, decay = torch.exp(log_scale - end[:, None]), torch.exp(self.scale - end)
        # The product is a sum of its own: added row by row, it would lose digits.
        product = torch.bmm(features.mT, values * weights[..., None])
        torch.addcmul(product, self.values, decay[:, None, None], out=self.values)
        product = torch.bmm(weights[:, None], features).squeeze(1)
        torch.addcmul(product, self.sums, decay[:, None], out=self.sums)
        self.scale = end

    def state(self, batch_and_heads) -> LinearAttentionState:
        tensors = (self.values, self.sums, self.scale.clone())
        return LinearAttentionState(*(t.unflatten(0, batch_and_heads) for t in tensors))


def _store_quotient(output, denominators, here: slice, numerator: torch.Tensor, denominator: torch.Tensor) -> None:
    """Store rows `N / den` and `den`, with 1 where no key was there (the numerator is 0 there)."""
    denominator = denominator.masked_fill_(denominator == 0, 1)
    denominators[:, here] = denominator
    torch.div(numerator, denominator[..., None], out=output[:, here])


def _decay_matrix(log_scale: torch.Tensor, running: torch.Tensor) -> torch.Tensor:
    """`exp(s_j - m_i)` `[BH, C, C]`. Entries above the diagonal are meaningless and may be infinite: use `tril_`."""
    return (log_scale[:, None, :] - running[:, :, None]).exp_()


def causal_forward(query, key, value, feature_map, mask, state, save_states: bool):
    """Output (not rounded yet), final state, denominators `[BH, N]`, and the states before each chunk.

    The last two, `[chunks, BH, M, V+1]` and `[chunks, BH]`, are empty unless `save_states`.
    """
    inputs = _Inputs.of(query, key, value, mask, state.key_value.dtype)
    memory = _Memory(state)
    heads, features, size = memory.values.shape
    output = memory.values.new_empty(value.shape)
    flat_output = output.flatten(0, 1)
    denominators = output.new_empty(heads, value.shape[2])
    chunks = _chunks(value.shape[2], CAUSAL_CHUNK)
    saved = len(chunks) if save_states else 0
    memories, maxima = output.new_empty(saved, heads, features, size + 1), output.new_empty(saved, heads)

    for index, here in enumerate(chunks):
        if save_states:
            memories[index, :, :, :-1], memories[index, :, :, -1] = memory.values, memory.sums
            maxima[index] = memory.scale
        q = chunk_features(inputs.rows("query", here), feature_map, is_key=False).values
        _, (k, _, log_scale) = inputs.keys(here, feature_map)
        v = inputs.values(here)
        running = torch.maximum(torch.cummax(log_scale, dim=-1).values, memory.scale[:, None])
        carried = torch.exp(memory.scale[:, None] - running)
        weights = torch.bmm(q, k.mT).mul_(_decay_matrix(log_scale, running)).tril_()
        numerator = torch.bmm(q, memory.values).mul_(carried[..., None]).baddbmm_(weights, v)
        denominator = (q * memory.sums[:, None]).sum(dim=-1).mul_(carried).add_(weights.sum(dim=-1))
        _store_quotient(flat_output, denominators, here, numerator, denominator)
        memory.add(k, log_scale, v, running[:, -1])
    return output, memory.state(query.shape[:2]), denominators, memories, maxima


def causal_backward(
    grad_output,
    grad_state,
    query,
    key,
    value,
    feature_map,
    wanted,
    mask,
    output,
    denominators,
    memories,
    maxima,
    final_log_scale,
):
    """Gradients of query, key, value, of the two initial sums, of the projection and of the bias.

    `wanted` says which of the last two to compute; the others are None.
    """
    dtype = denominators.dtype
    inputs = _Inputs.of(query, key, value, mask, dtype)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    flat_grads = [g.flatten(0, 1) for g in grads]
    parameters = _ParameterGrads(feature_map, wanted)
    grad_memory = _joint_sums(*grad_state).to(dtype)
    end = final_log_scale.flatten()

    for index, here in reversed(list(enumerate(_chunks(value.shape[2], CAUSAL_CHUNK)))):
        memory, maximum = memories[index], maxima[index]
        q_rows = inputs.rows("query", here)
        q_features = chunk_features(q_rows, feature_map, is_key=False, for_backward=True)
        k_rows, k_features = inputs.keys(here, feature_map, for_backward=True)
        q, k, log_scale = q_features.values, k_features.values, k_features.log_scale
        v = inputs.values_with_ones(here)
        running = torch.maximum(torch.cummax(log_scale, dim=-1).values, maximum[:, None])
        decay = _decay_matrix(log_scale, running)
        carried = torch.exp(maximum[:, None] - running)[..., None]
        to_end = torch.exp(log_scale - end[:, None])[..., None]
        grad_numerator = _grad_numerator(grad_output, output, denominators, here, dtype)

        weights = torch.bmm(q, k.mT).mul_(decay).tril_()
        grad_weights = torch.bmm(grad_numerator, v.mT).mul_(decay).tril_()
        grad_v = torch.bmm(k, grad_memory).mul_(to_end).baddbmm_(weights.mT, grad_numerator)
        grad_k = torch.bmm(v.mul_(to_end), grad_memory.mT).baddbmm_(grad_weights.mT, q)
        carried_grad = grad_numerator.mul_(carried)
        grad_q = torch.bmm(carried_grad, memory.mT).baddbmm_(grad_weights, k)
        grad_memory = torch.addcmul(
            torch.bmm(q.mT, carried_grad), grad_memory, torch.exp(maximum - end)[:, None, None]
        )
        end = maximum

        _store_query(flat_grads, parameters, here, q_features, grad_q, q_rows, feature_map)
        _store_key_value(flat_grads, parameters, inputs, here, k_features, grad_k, k_rows, grad_v, feature_map)
    grad_memory = grad_memory.unflatten(0, query.shape[:2])
    return (*grads, grad_memory[..., :-1], grad_memory[..., -1], parameters.projection, parameters.bias)


def bidirectional_forward(query, key, value, feature_map, mask, state):
    """Output, final state and denominators; the keys may be of another length than the queries."""
    inputs = _Inputs.of(query, key, value, mask, state.key_value.dtype)
    memory = _Memory(state)
    for here in _chunks(key.shape[2], BIDIRECTIONAL_CHUNK):
        _, (k, _, log_scale) = inputs.keys(here, feature_map)
        memory.add(k, log_scale, inputs.values(here), torch.maximum(log_scale.amax(dim=-1), memory.scale))
    new_state = memory.state(query.shape[:2])
    output, denominators = read_state(query, feature_map, new_state)
    return output, new_state, denominators


def read_state(query, feature_map, state):
    """What queries `[B, H, N, D]` see of a finished state: output `[B, H, N, V]` and denominators `[BH, N]`."""
    memory, sums = state.key_value.flatten(0, 1), state.key_sum.flatten(0, 1)
    output = memory.new_empty(*query.shape[:3], memory.shape[-1])
    flat_output = output.flatten(0, 1)
    denominators = memory.new_empty(memory.shape[0], query.shape[2])
    for here in _chunks(query.shape[2], BIDIRECTIONAL_CHUNK):
        rows = query[:, :, here].flatten(0, 1).to(memory.dtype)
        q = chunk_features(rows, feature_map, is_key=False).values
        denominator = (q * sums[:, None]).sum(dim=-1)
        _store_quotient(flat_output, denominators, here, torch.bmm(q, memory), denominator)
    return output, denominators


def bidirectional_backward(
    grad_output,
    grad_state,
    query,
    key,
    value,
    feature_map,
    wanted,
    mask,
    output,
    denominators,
    state,
    initial_log_scale,
):
    """As `causal_backward`, for `bidirectional_forward`."""
    dtype = denominators.dtype
    inputs = _Inputs.of(query, key, value, mask, dtype)
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    flat_grads = [g.flatten(0, 1) for g in grads]
    parameters = _ParameterGrads(feature_map, wanted)
    memory, maximum = _joint_sums(*state[:2]), state.log_scale.flatten()
    grad_memory = _joint_sums(*grad_state).to(dtype)
    for here in _chunks(query.shape[2], BIDIRECTIONAL_CHUNK):
        rows = inputs.rows("query", here)
        features = chunk_features(rows, feature_map, is_key=False, for_backward=True)
        grad_numerator = _grad_numerator(grad_output, output, denominators, here, dtype)
        grad_memory = grad_memory + torch.bmm(features.values.mT, grad_numerator)
        grad_q = torch.bmm(grad_numerator, memory.mT)
        _store_query(flat_grads, parameters, here, features, grad_q, rows, feature_map)
    for here in _chunks(key.shape[2], BIDIRECTIONAL_CHUNK):
        rows, features = inputs.keys(here, feature_map, for_backward=True)
        to_end = torch.exp(features.log_scale - maximum[:, None])[..., None]
        grad_v = torch.bmm(features.values, grad_memory).mul_(to_end)
        grad_k = torch.bmm(inputs.values_with_ones(here).mul_(to_end), grad_memory.mT)
        _store_key_value(flat_grads, parameters, inputs, here, features, grad_k, rows, grad_v, feature_map)
    shrink = torch.exp(initial_log_scale.flatten() - maximum)[:, None, None]
    grad_memory = (grad_memory * shrink).unflatten(0, query.shape[:2])
    return (*grads, grad_memory[..., :-1], grad_memory[..., -1], parameters.projection, parameters.bias)


class _ParameterGrads:
    """Accumulates the gradients of the projection and the bias over the chunks, where somebody wants them."""

    def __init__(self, feature_map: FeatureMap, wanted: tuple[bool, bool]):
        self.scale = feature_map.scale
        self.projection = torch.zeros_like(feature_map.projection) if wanted[0] else None
        self.bias = torch.zeros_like(feature_map.bias) if wanted[1] else None

    def add(self, rows, grad_logits):
        if self.projection is not None:
            self.projection.add_(grad_logits.flatten(0, 1).mT @ rows.flatten(0, 1), alpha=self.scale)
        if self.bias is not None:
            self.bias.add_(grad_logits.sum(dim=(0, 1)))


def _grad_numerator(grad_output, output, denominators, here, dtype):
    """Gradient of the rows `[N, den]` from that of `N / den`: `[g, -g·out] / den`."""
    grad = grad_output[:, :, here].flatten(0, 1).to(dtype)
    out = output[:, :, here].flatten(0, 1)
    grad = torch.cat([grad, (grad * out).sum(dim=-1, keepdim=True).neg_()], dim=-1)
    return grad.div_(denominators[:, here, None])


def _store_query(flat_grads, parameters, here, features, grad_features, rows, feature_map):
    flat_grads[0][:, here], grad_logits = _features_backward(features, grad_features, rows, feature_map, is_key=False)
    parameters.add(rows, grad_logits)


def _store_key_value(flat_grads, parameters, inputs, here, features, grad_features, rows, grad_value, feature_map):
    grad_rows, grad_logits = _features_backward(features, grad_features, rows, feature_map, is_key=True)
    grad_value = grad_value[..., :-1]
    if inputs.keep is not None:
        keep = inputs.keep[:, here, None]
        grad_rows, grad_value = torch.where(keep, grad_rows, 0), torch.where(keep, grad_value, 0)
        grad_logits = torch.where(keep, grad_logits, 0)
    flat_grads[1][:, here], flat_grads[2][:, here] = grad_rows, grad_value
    parameters.add(rows, grad_logits)
