"""Linear attention on GPUs: several programs share the walk along one sequence.

A walk along the chunks is serial. Where heads and tiles are too few to keep a GPU busy, the sequence is cut into
segments of chunks:

1. every segment is walked at the same time, from nothing;
2. `_carry` goes over the segments alone and gives what stands before each, `x ← decay · x + weight · own`;
3. every segment is walked once more from there, if the states inside of it are wanted.

That is two walks in place of one, each shorter by the number of segments.
"""

import torch
from torch import Tensor

from ..backend import device_guard, gpu_architecture, multiprocessor_count
from .launch_plan import Chunks
from .launch_table import SEGMENT_CHUNKS
from .state import EMPTY_LOG_SCALE, LinearAttentionState


try:  # Outside of `try`, transformers would take it for a requirement of every checkpoint.
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the Triton path of linear_attention needs Triton") from error


PROGRAMS_PER_PROCESSOR = 2  # that registers and shared memory have room for
BLOCK = 1024


def in_segments(chunks: Chunks, programs: int, tensor: Tensor, walks: int) -> Chunks:
    """The chunks cut into as many segments as the GPU has room for; as they are where that gains nothing.

    `programs` walk along a sequence without segments, and `walks` times over each segment with them. Packed sequences
    differ in length, and only the GPU knows it: they stay whole.
    """
    if chunks.table is not None or not chunks.sequences * programs:
        return chunks
    room = PROGRAMS_PER_PROCESSOR * multiprocessor_count(tensor) // (chunks.sequences * programs)
    wanted = min(room, chunks.per_sequence // SEGMENT_CHUNKS[gpu_architecture()])
    cut = chunks.cut(max(wanted, 1))
    return cut if cut.segments > walks else chunks


@triton.jit(do_not_specialize=["segments"])
def _carry(
    p_first, p_own, p_last, p_decays, p_weights, segments, heads, size, REVERSE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    tiles = tl.cdiv(size, BLOCK)
    i_head = (i_program // tiles) % heads
    i_sequence = (i_program // tiles // heads).to(tl.int64)
    o_numbers = (i_program % tiles).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_numbers = o_numbers < size
    o_ends = (i_sequence * heads + i_head) * size + o_numbers
    b_carried = tl.load(p_first + o_ends, mask=m_numbers, other=0.0)  # [BLOCK]
    for i_step in range(0, segments):
        i_segment = segments - 1 - i_step if REVERSE else i_step
        i_row = (i_sequence * segments + i_segment) * heads + i_head
        p_numbers = p_own + i_row * size + o_numbers
        b_own = tl.load(p_numbers, mask=m_numbers, other=0.0)
        tl.store(p_numbers, b_carried, mask=m_numbers)
        b_carried = b_carried * tl.load(p_decays + i_row) + b_own * tl.load(p_weights + i_row)
    tl.store(p_last + o_ends, b_carried, mask=m_numbers)


def carry(first: Tensor, own: Tensor, decays: Tensor, weights: Tensor, reverse: bool = False) -> Tensor:
    """What stands behind the last segment, like `first`; `own` is overwritten by what stands before each.

    `first` is `[B, H, …]` contiguous, `own` `[B·segments, H, …]` what a walk from nothing gives for each segment;
    `decays` and `weights` `[B, segments, H]`. `reverse` goes from the last segment to the first.
    """
    last = torch.empty_like(first)
    heads, size = first.shape[1], first[0, 0].numel()
    grid = (first.shape[0] * heads * triton.cdiv(size, BLOCK),)
    with device_guard(first):
        _carry[grid](first, own, last, decays, weights, decays.shape[1], heads, size, REVERSE=reverse, BLOCK=BLOCK)
    return last


def empty_segments(like: LinearAttentionState, chunks: Chunks) -> LinearAttentionState:
    """The state before the first key, for every segment."""
    count = chunks.sequences * chunks.segments
    sums = (part.new_zeros(count, *part.shape[1:]) for part in like[:2])
    return LinearAttentionState(*sums, like.log_scale.new_full((count, like.log_scale.shape[1]), EMPTY_LOG_SCALE))


def carry_states(
    start: LinearAttentionState, own: LinearAttentionState, chunks: Chunks
) -> tuple[LinearAttentionState, LinearAttentionState]:
    """The states before each segment, in the memory of `own`, and the final one.

    `start` is the state before the sequences, `own` what each segment alone adds up to.
    """
    scales = own.log_scale.unflatten(0, (chunks.sequences, chunks.segments))  # [B, segments, H]
    running = torch.cat([start.log_scale[:, None], scales], dim=1).cummax(dim=1).values
    before, after = running[:, :-1], running[:, 1:]
    decays, weights = (before - after).exp(), (scales - after).exp()
    end = (carry(*sums, decays, weights) for sums in zip(start[:2], own[:2], strict=True))
    return (
        LinearAttentionState(*own[:2], before.flatten(0, 1)),
        LinearAttentionState(*end, running[:, -1].clone()),
    )


def scales_behind(maxima: Tensor, end_scale: Tensor, chunks: Chunks) -> tuple[Tensor, Tensor]:
    """What the state's gradient loses along each segment, `[B, segments, H]`, and the scale behind it.

    `maxima` `[B·chunks, H]` are the scales before each chunk, `end_scale` `[B, H]` is the final one.
    """
    every_chunk = maxima.unflatten(0, (chunks.sequences, chunks.per_sequence))
    before = every_chunk[:, :: chunks.per_segment]
    behind = torch.cat([before[:, 1:], end_scale[:, None]], dim=1)
    return (before - behind).exp(), behind.flatten(0, 1)
