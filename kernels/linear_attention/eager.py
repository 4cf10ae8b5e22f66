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

from .eager_features import ChunkFeatures, Scratch
from .feature_maps import FeatureMap
from .state import EMPTY_LOG_SCALE, LinearAttentionState


# Rows at a time. Measured on two cores (m = 266, d = 64): the causal form takes an EPYC the same time with 32 to 128,
# a Xeon 10 to 20 % less with 128 than with 64 or 256, and in the other form 5 % less with 256 than with 128.
CAUSAL_CHUNK = 128
BIDIRECTIONAL_CHUNK = 256


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

    def keys(self, here: slice, chunk_features: ChunkFeatures, for_backward: bool = False):
        rows = self.rows("key", here)
        if self.keep is not None:
            rows = torch.where(self.keep[:, here, None], rows, 0)
        features = chunk_features.keys(rows, for_backward)
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

    def __init__(self, state: LinearAttentionState, scratch: Scratch):
        self.product = scratch("memory", *state.key_value.flatten(0, 1).shape)
        self.values, self.sums, self.scale = (
            t.flatten(0, 1).clone(memory_format=torch.contiguous_format) for t in state
        )

    def add(self, features: torch.Tensor, log_scale: torch.Tensor, values: torch.Tensor, end: torch.Tensor) -> None:
        """Add the keys of a chunk; `end` is the scale behind them."""
        weights, decay = torch.exp(log_scale - end[:, None]), torch.exp(self.scale - end)
        # The product is a sum of its own: added row by row, it would lose digits.
        torch.bmm(features.mT, values * weights[..., None], out=self.product)
        torch.addcmul(self.product, self.values, decay[:, None, None], out=self.values)
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


def _dot(features: torch.Tensor, sums: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """The denominators `[BH, C]`. By `sum`, whose rounding is half that of a product of matrices with one column."""
    return torch.mul(features, sums[:, None], out=scratch("products", *features.shape)).sum(dim=-1)


def _decay_matrix(log_scale: torch.Tensor, running: torch.Tensor, scratch: Scratch) -> torch.Tensor:
    """`exp(s_j - m_i)` `[BH, C, C]`. Entries above the diagonal are meaningless and may be infinite: use `tril_`."""
    decay = scratch("decay", *log_scale.shape, log_scale.shape[1])
    return torch.sub(log_scale[:, None, :], running[:, :, None], out=decay).exp_()


def _weights(left, right, decay: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The weights of a chunk (or their gradients), zero above the diagonal."""
    return torch.bmm(left, right.mT, out=out).mul_(decay).tril_()


def causal_forward(query, key, value, feature_map, mask, state, save_states: bool):
    """Output (not rounded yet), final state, denominators `[BH, N]`, and the states before each chunk.

    The last two, `[chunks, BH, M, V+1]` and `[chunks, BH]`, are empty unless `save_states`.
    """
    inputs = _Inputs.of(query, key, value, mask, state.key_value.dtype)
    scratch = Scratch(state.key_value)
    chunk_features, memory = ChunkFeatures(feature_map, scratch), _Memory(state, scratch)
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
        q = chunk_features.queries(inputs.rows("query", here)).values
        _, (k, log_scale, *_) = inputs.keys(here, chunk_features)
        v = inputs.values(here)
        running = torch.maximum(torch.cummax(log_scale, dim=-1).values, memory.scale[:, None])
        carried = torch.exp(memory.scale[:, None] - running)
        decay = _decay_matrix(log_scale, running, scratch)
        weights = _weights(q, k, decay, scratch("weights", *decay.shape))
        numerator = torch.bmm(q, memory.values, out=scratch("numerator", *v.shape))
        numerator.mul_(carried[..., None]).baddbmm_(weights, v)
        denominator = _dot(q, memory.sums, scratch).mul_(carried).add_(weights.sum(dim=-1))
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
    input_grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    flat_grads = [g.flatten(0, 1) for g in input_grads]
    scratch, ones = Scratch(denominators), denominators.new_ones(1)
    chunk_features, parameters = ChunkFeatures(feature_map, scratch), _ParameterGrads(feature_map, wanted)
    grad_memory = _joint_sums(*grad_state).to(dtype)
    end = final_log_scale.flatten()

    for index, here in reversed(list(enumerate(_chunks(value.shape[2], CAUSAL_CHUNK)))):
        memory, maximum = memories[index], maxima[index]
        q_rows = inputs.rows("query", here)
        q_features = chunk_features.queries(q_rows, for_backward=True)
        k_rows, k_features = inputs.keys(here, chunk_features, for_backward=True)
        q, (k, log_scale, *_) = q_features.values, k_features
        v = inputs.values(here)
        running = torch.maximum(torch.cummax(log_scale, dim=-1).values, maximum[:, None])
        decay = _decay_matrix(log_scale, running, scratch)
        carried = torch.exp(maximum[:, None] - running)[..., None]
        to_end = torch.exp(log_scale - end[:, None])[..., None]
        grads = _quotient_grads(grad_output, output, denominators, here, scratch)
        grad_numerator, grad_denominator = grads[..., :-1], grads[..., -1:]

        weights = _weights(q, k, decay, scratch("weights", *decay.shape))
        grad_weights = torch.bmm(grad_numerator, v.mT, out=scratch("grad_weights", *decay.shape))
        grad_weights.add_(grad_denominator).mul_(decay).tril_()
        grad_v = torch.bmm(k, grad_memory[..., :-1], out=scratch("grad_value", *v.shape)).mul_(to_end)
        grad_v.baddbmm_(weights.mT, grad_numerator)
        rows_with_ones = _scaled_rows(v, ones, to_end, scratch("rows", *grads.shape))
        grad_k = torch.bmm(rows_with_ones, grad_memory.mT, out=scratch("grad_key", *k.shape)).baddbmm_(
            grad_weights.mT, q
        )
        grads.mul_(carried)
        grad_q = torch.bmm(grads, memory.mT, out=scratch("grad_query", *q.shape)).baddbmm_(grad_weights, k)
        product = torch.bmm(q.mT, grads, out=scratch("memory", *memory.shape))
        torch.addcmul(product, grad_memory, torch.exp(maximum - end)[:, None, None], out=grad_memory)
        end = maximum

        _store_query(flat_grads, parameters, here, chunk_features.backward(q_features, grad_q, q_rows), q_rows)
        key_grads = chunk_features.backward(k_features, grad_k, k_rows)
        _store_key_value(flat_grads, parameters, inputs, here, key_grads, grad_v, k_rows)
    grad_memory = grad_memory.unflatten(0, query.shape[:2])
    return (*input_grads, grad_memory[..., :-1], grad_memory[..., -1], parameters.projection, parameters.bias)


def bidirectional_forward(query, key, value, feature_map, mask, state):
    """Output, final state and denominators; the keys may be of another length than the queries."""
    inputs = _Inputs.of(query, key, value, mask, state.key_value.dtype)
    scratch = Scratch(state.key_value)
    chunk_features, memory = ChunkFeatures(feature_map, scratch), _Memory(state, scratch)
    for here in _chunks(key.shape[2], BIDIRECTIONAL_CHUNK):
        _, (k, log_scale, *_) = inputs.keys(here, chunk_features)
        memory.add(k, log_scale, inputs.values(here), torch.maximum(log_scale.amax(dim=-1), memory.scale))
    new_state = memory.state(query.shape[:2])
    output, denominators = _read_state(query, chunk_features, new_state, scratch)
    return output, new_state, denominators


def _read_state(query, chunk_features: ChunkFeatures, state, scratch: Scratch):
    """What queries `[B, H, N, D]` see of a finished state: output `[B, H, N, V]` and denominators `[BH, N]`."""
    memory, sums = state.key_value.flatten(0, 1), state.key_sum.flatten(0, 1)
    output = memory.new_empty(*query.shape[:3], memory.shape[-1])
    flat_output = output.flatten(0, 1)
    denominators = memory.new_empty(memory.shape[0], query.shape[2])
    for here in _chunks(query.shape[2], BIDIRECTIONAL_CHUNK):
        rows = query[:, :, here].flatten(0, 1).to(memory.dtype)
        q = chunk_features.queries(rows).values
        denominator = torch.bmm(q, sums[..., None]).squeeze(-1)
        numerator = torch.bmm(q, memory, out=scratch("numerator", *q.shape[:2], memory.shape[2]))
        _store_quotient(flat_output, denominators, here, numerator, denominator)
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
    input_grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in (query, key, value)]
    flat_grads = [g.flatten(0, 1) for g in input_grads]
    scratch, ones = Scratch(denominators), denominators.new_ones(1)
    chunk_features, parameters = ChunkFeatures(feature_map, scratch), _ParameterGrads(feature_map, wanted)
    memory, maximum = _joint_sums(*state[:2]), state.log_scale.flatten()
    grad_memory = _joint_sums(*grad_state).to(dtype)
    for here in _chunks(query.shape[2], BIDIRECTIONAL_CHUNK):
        rows = inputs.rows("query", here)
        features = chunk_features.queries(rows, for_backward=True)
        grads = _quotient_grads(grad_output, output, denominators, here, scratch)
        grad_memory.add_(torch.bmm(features.values.mT, grads, out=scratch("memory", *memory.shape)))
        grad_q = torch.bmm(grads, memory.mT, out=scratch("grad_query", *features.values.shape))
        _store_query(flat_grads, parameters, here, chunk_features.backward(features, grad_q, rows), rows)
    for here in _chunks(key.shape[2], BIDIRECTIONAL_CHUNK):
        rows, features = inputs.keys(here, chunk_features, for_backward=True)
        to_end = torch.exp(features.log_scale - maximum[:, None])[..., None]
        v = inputs.values(here)
        grad_v = torch.bmm(features.values, grad_memory[..., :-1], out=scratch("grad_value", *v.shape)).mul_(to_end)
        rows_with_ones = _scaled_rows(v, ones, to_end, scratch("rows", *v.shape[:2], memory.shape[-1]))
        grad_k = torch.bmm(rows_with_ones, grad_memory.mT, out=scratch("grad_key", *features.values.shape))
        key_grads = chunk_features.backward(features, grad_k, rows)
        _store_key_value(flat_grads, parameters, inputs, here, key_grads, grad_v, rows)
    shrink = torch.exp(initial_log_scale.flatten() - maximum)[:, None, None]
    grad_memory = (grad_memory * shrink).unflatten(0, query.shape[:2])
    return (*input_grads, grad_memory[..., :-1], grad_memory[..., -1], parameters.projection, parameters.bias)


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


def _scaled_rows(rows: torch.Tensor, column: torch.Tensor, scale: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """`scale · [rows, column]`, as `out` `[BH, C, V+1]`."""
    torch.mul(rows, scale, out=out[..., :-1])
    torch.mul(column, scale, out=out[..., -1:])
    return out


def _quotient_grads(grad_output, output, denominators, here: slice, scratch: Scratch) -> torch.Tensor:
    """Gradient of the rows `[N, den]` from that of `N / den`: `[g, -g·out] / den`."""
    grad, rows = grad_output[:, :, here].flatten(0, 1), output[:, :, here].flatten(0, 1)
    column = (grad * rows).sum(dim=-1, keepdim=True).neg_()
    joint = scratch("grads", *rows.shape[:-1], rows.shape[-1] + 1)
    return _scaled_rows(grad, column, denominators[:, here, None].reciprocal(), joint)


def _store_query(flat_grads, parameters, here, grads, rows):
    flat_grads[0][:, here], grad_logits = grads
    parameters.add(rows, grad_logits)


def _store_key_value(flat_grads, parameters, inputs, here, grads, grad_value, rows):
    grad_rows, grad_logits = grads
    if inputs.keep is not None:
        keep = inputs.keep[:, here, None]
        grad_rows, grad_value = torch.where(keep, grad_rows, 0), torch.where(keep, grad_value, 0)
        grad_logits = torch.where(keep, grad_logits, 0)
    flat_grads[1][:, here], flat_grads[2][:, here] = grad_rows, grad_value
    parameters.add(rows, grad_logits)
