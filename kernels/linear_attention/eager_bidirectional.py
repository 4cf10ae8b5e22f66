"""Bidirectional linear attention chunk by chunk: the fast form for machines without a Triton path.

Only one chunk's rows of features exist at a time, so the working set stays in the processor's cache and nothing of
size length × features is ever stored; the backward pass computes the features again. All keys go into the state

    S̄ ← exp(m₀ - m) S̄ + K̂ᵀ (exp(s - m) ∘ V̄),      V̄ = [V, 1],      N̄ = Q̂ S̄

relative to the running maximum `m` of the keys' scales `s`, and then the queries read it. The column of ones makes the
denominators; the forward pass computes them apart, because a product with 65 columns takes a fifth longer than one
with 64. The floor of exponential features is added to the sums, once for the keys in them and once for the queries to
come (`ChunkFeatures.add_floor_to_sums`).
"""

import torch

from .eager_chunks import InputGrads, Inputs, joint_sums, quotient_grads, rows_at_a_time, scaled_rows, store_quotient
from .eager_features import ChunkFeatures, Features, Scratch
from .state import LinearAttentionState


# Rows whose features are added up by one product.
ROWS_OF_A_SUM = 64


def _chunks(tensor: torch.Tensor) -> list[slice]:
    """The rows of each chunk of `[B, H, N, ·]`."""
    batch, heads, length = tensor.shape[:3]
    size = rows_at_a_time(batch * heads)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class _Memory:
    """A state to be advanced in place, flat over batch and heads: `values` `[BH, M, V]`, `sums` `[BH, M]`, `scale`.

    What is added comes without the features' floor, which is added to the sums at the end.
    """

    def __init__(self, state: LinearAttentionState, scratch: Scratch):
        self.first = state
        self.product = scratch("memory", *state.key_value.flatten(0, 1).shape)
        self.values, self.sums = (t.new_zeros(t.flatten(0, 1).shape) for t in state[:2])
        self.scale = state.log_scale.flatten()

    def add(self, keys: Features, values: torch.Tensor, end: torch.Tensor) -> None:
        """Add the keys of a chunk; `end` is the scale behind them."""
        weights, decay = torch.exp(keys.log_scale - end[:, None]), torch.exp(self.scale - end)
        # The product is a sum of its own: added row by row, it would lose digits.
        torch.bmm(keys.values.mT, values * weights[..., None], out=self.product)
        torch.addcmul(self.product, self.values, decay[:, None, None], out=self.values)
        torch.addcmul(_weighted_sum(weights, keys.values), self.sums, decay[:, None], out=self.sums)
        self.scale = end

    def state(self, chunk_features: ChunkFeatures) -> LinearAttentionState:
        """What was there at first and what was added, with the features' floor; in place, so nothing may follow."""
        for sums in (self.values, self.sums):
            chunk_features.add_floor_to_sums(sums, out=sums)
        first = self.first
        key_value, key_sum, log_scale = (
            t.view(part.shape) for t, part in zip((self.values, self.sums, self.scale), first, strict=True)
        )
        decay = torch.exp(first.log_scale - log_scale)
        key_value.addcmul_(first.key_value, decay[..., None, None])
        key_sum.addcmul_(first.key_sum, decay[..., None])
        # Without any key, the scale is the caller's own tensor.
        return LinearAttentionState(key_value, key_sum, log_scale.clone())


def _weighted_sum(weights: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """`Σ_j w_j φ_j` of weights `[BH, C]` and features `[BH, C, M]`.

    Some processors add up a row times a matrix row by row. Features are positive, so that their sum grows with every
    row and each loses more of its digits; a sum of 64 rows loses few.
    """
    heads, rows, size = features.shape
    blocks, rest = divmod(rows, ROWS_OF_A_SUM)
    whole = rows - rest
    total = torch.bmm(weights[:, None, whole:], features[:, whole:]).squeeze(1)
    if blocks:
        rows_of_weights = weights[:, :whole].reshape(heads * blocks, 1, ROWS_OF_A_SUM)
        sums = torch.bmm(rows_of_weights, features[:, :whole].reshape(heads * blocks, ROWS_OF_A_SUM, size))
        total.add_(sums.view(heads, blocks, size).sum(dim=1))
    return total


def bidirectional_forward(query, key, value, feature_map, mask, state):
    """Output, final state and denominators; the keys may be of another length than the queries."""
    inputs = Inputs.of(query, key, value, mask, state.key_value.dtype)
    scratch = Scratch(state.key_value)
    chunk_features, memory = ChunkFeatures(feature_map, scratch), _Memory(state, scratch)
    for here in _chunks(key):
        _, keys = inputs.keys(here, chunk_features, with_floor=False)
        memory.add(keys, inputs.values(here), torch.maximum(keys.log_scale.amax(dim=-1), memory.scale))
    new_state = memory.state(chunk_features)
    output, denominators = _read_state(query, chunk_features, new_state, scratch)
    return output, new_state, denominators


def _read_state(query, chunk_features: ChunkFeatures, state, scratch: Scratch):
    """What queries `[B, H, N, D]` see of a finished state: output `[B, H, N, V]` and denominators `[BH, N]`."""
    memory = chunk_features.add_floor_to_sums(state.key_value.flatten(0, 1))
    sums = chunk_features.add_floor_to_sums(state.key_sum.flatten(0, 1)[..., None])
    output = memory.new_empty(*query.shape[:3], memory.shape[-1])
    flat_output = output.flatten(0, 1)
    denominators = memory.new_empty(memory.shape[0], query.shape[2])
    for here in _chunks(query):
        rows = query[:, :, here].flatten(0, 1).to(memory.dtype)
        q = chunk_features.queries(rows).values
        # As a row times a matrix, which takes a sixth of the time of a matrix times a column.
        denominator = torch.bmm(sums.mT, q.mT).squeeze(1)
        numerator = torch.bmm(q, memory, out=scratch("numerator", *q.shape[:2], memory.shape[2]))
        store_quotient(flat_output, denominators, here, numerator, denominator)
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
    inputs = Inputs.of(query, key, value, mask, dtype)
    input_grads = InputGrads(inputs, feature_map, wanted)
    scratch, ones = Scratch(denominators), denominators.new_ones(1)
    chunk_features = ChunkFeatures(feature_map, scratch)
    # Queries come without their floor: the sums they read have it twice, and the gradients of those pass it as well.
    memory, maximum = chunk_features.add_floor_to_sums(joint_sums(*state[:2])), state.log_scale.flatten()
    grad_memory = torch.zeros_like(memory)
    for here in _chunks(query):
        rows = inputs.rows("query", here)
        features = chunk_features.queries(rows, for_backward=True)
        grads = quotient_grads(grad_output, output, denominators, here, scratch)
        grad_memory.add_(torch.bmm(features.values.mT, grads, out=scratch("memory", *memory.shape)))
        grad_q = torch.bmm(grads, memory.mT, out=scratch("grad_query", *features.values.shape))
        input_grads.store_query(here, *chunk_features.backward(features, grad_q, rows), rows)
    grad_of_state = joint_sums(*grad_state).to(dtype).add_(chunk_features.add_floor_to_sums(grad_memory))
    grad_memory = chunk_features.add_floor_to_sums(grad_of_state)
    for here in _chunks(key):
        rows, features = inputs.keys(here, chunk_features, with_floor=False, for_backward=True)
        to_end = torch.exp(features.log_scale - maximum[:, None])[..., None]
        v = inputs.values(here)
        grad_v = torch.bmm(features.values, grad_memory[..., :-1], out=scratch("grad_value", *v.shape)).mul_(to_end)
        rows_with_ones = scaled_rows(v, ones, to_end, scratch("rows", *v.shape[:2], memory.shape[-1]))
        grad_k = torch.bmm(rows_with_ones, grad_memory.mT, out=scratch("grad_key", *features.values.shape))
        input_grads.store_key_value(here, *chunk_features.backward(features, grad_k, rows), rows, grad_v)
    shrink = torch.exp(initial_log_scale.flatten() - maximum)[:, None, None]
    grad_memory = (grad_of_state * shrink).unflatten(0, query.shape[:2])
    sums = grad_memory[..., :-1], grad_memory[..., -1]
    return (*input_grads.inputs, *sums, input_grads.projection, input_grads.bias)
