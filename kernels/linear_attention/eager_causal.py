"""Causal linear attention chunk by chunk: the fast form for machines without a Triton path.

Only one chunk's rows of features exist at a time, so the working set stays in the processor's cache and nothing of
size length × features is ever stored; the backward pass computes the features again. A chunk is several blocks. Inside
a block the weights are the small matrix `A = (Q̂ K̂ᵀ) ∘ D` with `D_ij = exp(s_j - m_i)` for `j ≤ i`, where `s_j` is
the key's scale and `m_i` the running maximum of the scales; the keys before the block are in the state `S̄`:

    N̄ = A V̄ + exp(m₀ - m) ∘ (Q̂ S̄),      S̄ ← exp(m₀ - m_C) S̄ + K̂ᵀ (exp(s - m_C) ∘ V̄),      V̄ = [V, 1]

The column of ones makes the denominators. `D` and all the exponentials are at most 1, and row i uses nothing of a
later row. The blocks of a chunk go through features and weights together; one after the other they read the state and
advance it, or in the backward pass, which needs all states at once, add up those between them. So the weights cost as
little as their block is short, and the operators are few where the chunk is long.

Tensors are flat over batch, heads and blocks (B·H·G first), states over batch and heads.
"""

from typing import NamedTuple

import torch

from .eager_chunks import (
    CHUNK_OF_MANY_HEADS,
    InputGrads,
    Inputs,
    joint_sums,
    quotient_grads,
    rows_at_a_time,
    scaled_rows,
    store_quotient,
)
from .eager_features import ChunkFeatures, Scratch
from .state import LinearAttentionState


# Rows of a block. Measured on two cores of a Xeon with 2 MiB of cache each (8 heads of 64, m = 266): 4 blocks of 64
# take 15 % less time than a chunk of 128 in one piece.
CAUSAL_BLOCK = 64


def causal_chunks(length: int, size: int) -> list[tuple[slice, int]]:
    """The rows of each chunk of this size and the size of its blocks: whole blocks, then what is left as one more."""
    chunks = []
    for start in range(0, length, size):
        rows = min(size, length - start)
        # Less than two blocks' worth is one block: there is no state between to be formed.
        whole = 0 if rows < 2 * CAUSAL_BLOCK else rows - rows % CAUSAL_BLOCK
        if whole:
            chunks.append((slice(start, start + whole), CAUSAL_BLOCK))
        if rows > whole:
            chunks.append((slice(start + whole, start + rows), rows - whole))
    return chunks


def saved_states(length: int) -> int:
    """How many states before chunks there is room for: enough, and by arithmetic alone, for symbolic shapes too."""
    return (length + 2 * CAUSAL_BLOCK - 1) // (2 * CAUSAL_BLOCK)


def _in_blocks(tensor: torch.Tensor, block: int) -> torch.Tensor:
    """`[BH, G C, ·]` as `[BHG, C, ·]`, of any size, nothing included."""
    heads, rows, size = tensor.shape
    return tensor.reshape(heads * (rows // block), block, size)


class _Scales(NamedTuple):
    """What the keys' scales come to in a chunk of G blocks of C rows."""

    decay_matrix: torch.Tensor  # [BHG, C, C], D. Above the diagonal it means nothing and may be infinite: use `tril_`.
    carried: torch.Tensor  # [BHG, C, 1], what is left at each row of the state before its block
    to_end: torch.Tensor  # [BHG, C, 1], of each key at the end of its block
    across: torch.Tensor  # [BH, G, 1, 1], of the state before a block at the end of it
    end: torch.Tensor  # [BH], the running maximum behind the chunk

    @classmethod
    def of(cls, log_scale, maximum, block: int, scratch: Scratch):
        """Of a chunk's scales `[BH, G C]` and the maximum `[BH]` of all the keys before it."""
        by_block = len(maximum), log_scale.shape[1] // block, block
        running = torch.maximum(torch.cummax(log_scale, dim=-1).values, maximum[:, None]).view(by_block)
        log_scale, ends = log_scale.view_as(running), running[..., -1]
        starts = torch.cat([maximum[:, None], ends[:, :-1]], dim=1)
        decay = scratch("decay", *running.shape, block)
        torch.sub(log_scale[:, :, None], running[..., None], out=decay).exp_()
        carried = torch.exp(starts[..., None] - running)
        to_end = torch.exp(log_scale - ends[..., None])
        across = torch.exp(starts - ends)[..., None, None]
        return cls(decay.flatten(0, 1), *(t.flatten(0, 1)[..., None] for t in (carried, to_end)), across, ends[:, -1])


def _add_up(first, products, across, between) -> None:
    """Fill `between`, the states between blocks: `first`, and then each time the one before, decayed, plus a product.

    Lists have an entry for each block.
    """
    between[0].copy_(first)
    for product, decay, state, following in zip(products[:-1], across[:-1], between[:-1], between[1:], strict=True):
        torch.addcmul(product, state, decay, out=following)


def _by_block(tensor, scales: _Scales) -> tuple[torch.Tensor, ...]:
    """A tensor `[BHG, ...]` as one of `[BH, ...]` for each block."""
    return tensor.unflatten(0, scales.across.shape[:2]).unbind(1)


def _states_before(memory, products, scales: _Scales, scratch: Scratch) -> torch.Tensor:
    """The states before the blocks of a chunk, given the one before the chunk and what each block adds to it."""
    across = scales.across.unbind(1)
    if len(across) == 1:
        return memory
    before = scratch("before", *products.shape)
    _add_up(memory, _by_block(products, scales), across, _by_block(before, scales))
    return before


def _through_blocks(values, sums, q, k, v, scales: _Scales, numerator, denominator, scratch: Scratch) -> None:
    """Add to each block's sums what it sees of the state before it, and then the block to the state, in place."""
    seen = scratch("seen", len(values), *numerator.shape[1:])
    rows = torch.mul(v, scales.to_end, out=scratch("rows", *v.shape))
    blocked = (q, k, rows, scales.carried, scales.to_end, numerator, denominator)
    blocks = zip(scales.across.unbind(1), *(_by_block(t, scales) for t in blocked), strict=True)
    for decay, q_block, k_block, v_block, carried, to_end, block_numerator, block_denominator in blocks:
        block_numerator.addcmul_(torch.bmm(q_block, values, out=seen), carried)
        block_denominator.addcmul_(torch.bmm(sums, q_block.mT).mT, carried)
        values.mul_(decay).baddbmm_(k_block.mT, v_block)
        torch.addcmul(torch.bmm(to_end.mT, k_block), sums, decay, out=sums)


def causal_forward(query, key, value, feature_map, mask, state, save_states: bool):
    """Output (not rounded yet), final state, denominators `[BH, N]`, and the states before each chunk.

    The last two, `[saved, BH, M, V+1]` and `[saved, BH]`, are empty unless `save_states`, and may have room to spare.
    """
    inputs = Inputs.of(query, key, value, mask, state.key_value.dtype)
    # A state is kept as values `[BH, M, V]` and sums `[BH, 1, M]`: products of 65 columns are slower than of 64 and 1,
    # and a row times a matrix takes a sixth of the time of a matrix times a column.
    values, sums, maximum = (t.flatten(0, 1).clone(memory_format=torch.contiguous_format) for t in state)
    sums = sums[:, None]
    scratch = Scratch(values)
    chunk_features = ChunkFeatures(feature_map, scratch)
    output = values.new_empty(value.shape)
    flat_output = output.flatten(0, 1)
    denominators = output.new_empty(flat_output.shape[:2])
    saved = saved_states(value.shape[2]) if save_states else 0
    heads, features, size = values.shape
    memories, maxima = values.new_empty(saved, heads, features, size + 1), values.new_empty(saved, heads)

    # Without a backward pass to come, memory counts: 13 MiB for 17, of which the output is 8, at 4,096 tokens and 8
    # heads, for up to 5 % more time on a Xeon and none on an EPYC.
    chunk = rows_at_a_time(heads) if save_states else CHUNK_OF_MANY_HEADS
    for index, (here, block) in enumerate(causal_chunks(value.shape[2], chunk)):
        if save_states:
            memories[index, ..., :-1], memories[index, ..., -1], maxima[index] = values, sums.squeeze(1), maximum
        q = chunk_features.add_floor(chunk_features.queries(inputs.rows("query", here))).values
        k = inputs.keys(here, chunk_features, with_floor=True)[1]
        scales = _Scales.of(k.log_scale, maximum, block, scratch)
        q, k, v = (_in_blocks(t, block) for t in (q, k.values, inputs.values(here)))

        weights = torch.bmm(q, k.mT, out=scratch("weights", *scales.decay_matrix.shape))
        weights.mul_(scales.decay_matrix).tril_()
        numerator = torch.bmm(weights, v, out=scratch("numerator", *v.shape))
        denominator = weights.sum(dim=-1, keepdim=True)
        _through_blocks(values, sums, q, k, v, scales, numerator, denominator, scratch)

        shape = heads, here.stop - here.start
        store_quotient(flat_output, denominators, here, numerator.view(*shape, size), denominator.view(shape))
        maximum = scales.end
    tensors = (values, sums.squeeze(1), maximum.clone())
    return (
        output,
        LinearAttentionState(*(t.unflatten(0, query.shape[:2]) for t in tensors)),
        denominators,
        memories,
        maxima,
    )


def causal_backward(
    grad_output, grad_state, query, key, value, feature_map, wanted, mask, output, denominators, memories, maxima
):
    """Gradients of query, key, value, of the two initial sums, of the projection and of the bias.

    `wanted` says which of the last two to compute; the others are None.
    """
    inputs = Inputs.of(query, key, value, mask, denominators.dtype)
    input_grads = InputGrads(inputs, feature_map, wanted)
    scratch, ones = Scratch(denominators), denominators.new_ones(1)
    chunk_features = ChunkFeatures(feature_map, scratch)
    grad_memory = joint_sums(*grad_state).to(denominators.dtype)
    chunks = causal_chunks(value.shape[2], rows_at_a_time(len(grad_memory)))

    for index, (here, block) in reversed(list(enumerate(chunks))):
        q_rows = inputs.rows("query", here)
        q_features = chunk_features.add_floor(chunk_features.queries(q_rows, for_backward=True))
        k_rows, k_features = inputs.keys(here, chunk_features, with_floor=True, for_backward=True)
        scales = _Scales.of(k_features.log_scale, maxima[index], block, scratch)
        grads = quotient_grads(grad_output, output, denominators, here, scratch)
        chunk = q_features.values, k_features.values, inputs.values(here), grads
        q, k, v, grads = (_in_blocks(tensor, block) for tensor in chunk)
        grad_numerator, grad_denominator = grads[..., :-1], grads[..., -1:]
        rows = scaled_rows(v, ones, scales.to_end, scratch("rows", *grads.shape))
        products = torch.bmm(k.mT, rows, out=scratch("products", *k.shape[::2], rows.shape[-1]))
        before = _states_before(memories[index], products, scales, scratch)
        carried_grads = torch.mul(grads, scales.carried, out=scratch("carried", *grads.shape))
        # The gradients of the states behind the blocks add up like the states, from the last block to the first.
        products = torch.bmm(q.mT, carried_grads, out=scratch("products", *products.shape))
        after = scratch("after", *products.shape)
        by_block, across = _by_block(products, scales)[::-1], scales.across.unbind(1)[::-1]
        between = _by_block(after, scales)[::-1]
        _add_up(grad_memory, by_block, across, between)
        torch.addcmul(by_block[-1], between[-1], across[-1], out=grad_memory)

        square = scales.decay_matrix.shape
        weights = torch.bmm(q, k.mT, out=scratch("weights", *square)).mul_(scales.decay_matrix).tril_()
        grad_weights = torch.bmm(grad_numerator, v.mT, out=scratch("grad_weights", *square))
        grad_weights.add_(grad_denominator).mul_(scales.decay_matrix).tril_()
        grad_v = torch.bmm(k, after[..., :-1], out=scratch("grad_value", *v.shape)).mul_(scales.to_end)
        grad_v.baddbmm_(weights.mT, grad_numerator)
        grad_k = torch.bmm(rows, after.mT, out=scratch("grad_key", *k.shape)).baddbmm_(grad_weights.mT, q)
        grad_q = torch.bmm(carried_grads, before.mT, out=scratch("grad_query", *q.shape)).baddbmm_(grad_weights, k)

        grad_q, grad_k, grad_v = (grad.view(*q_rows.shape[:2], grad.shape[-1]) for grad in (grad_q, grad_k, grad_v))
        input_grads.store_query(here, *chunk_features.backward(q_features, grad_q, q_rows), q_rows)
        input_grads.store_key_value(here, *chunk_features.backward(k_features, grad_k, k_rows), k_rows, grad_v)
    grad_memory = grad_memory.unflatten(0, query.shape[:2])
    sums = grad_memory[..., :-1], grad_memory[..., -1]
    return (*input_grads.inputs, *sums, input_grads.projection, input_grads.bias)
