"""Attention to a context that never exists as keys and values all at once.

The context comes in chunks. Each is projected, attended to and forgotten; the partial results are merged by their
log-sum-exp (arXiv 2205.14135, section 3.1). The backward pass projects each chunk again and needs nothing else of the
forward pass than the merged output and its log-sum-exp (`part_gradients`), so that memory beside the context, its
gradient and the result is that of one chunk.

`torch.compile` sees plain operations instead, one checkpoint for each chunk, and so has the same memory.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..kernels.flash_attention import flash_attention, merge_attention, part_gradients
from .rotary import RotaryTables


class ContextChunk(NamedTuple):
    """A part of the context.

    Attributes:
        context: `[B, K, C]`.
        key_mask: `[B, K]`, nonzero where a position counts, or None.
        rotary: whatever the projection needs beside the context.
        causal: whether the last query stands at the last position of this chunk and sees none behind its own.
    """

    context: Tensor
    key_mask: Tensor | None = None
    rotary: object = None
    causal: bool = False


# Makes keys `[B, H, K, D]` and values `[B, H, K, V]` of a context and the `rotary` of its chunk.
Project = Callable[[Tensor, object], tuple[Tensor, Tensor]]


class Scores(NamedTuple):
    """Factor of the scores, probability of dropping a weight, and the seed `[1]` of the first chunk or None."""

    scale: float
    dropout: float
    seed: Tensor | None

    def of(self, index: int, chunk: ContextChunk) -> dict:
        """The arguments that attention to this chunk has beside its tensors, forward and backward."""
        return {
            "scale": self.scale,
            "causal": chunk.causal,
            "key_mask": chunk.key_mask,
            "dropout_p": self.dropout,
            "dropout_seed": None if self.seed is None else self.seed + index,
        }


def make_scores(scale: float, dropout: float, device: torch.device) -> Scores:
    """`Scores` with a seed of their own where weights are dropped."""
    # A tensor, so that checkpointing, which restores the generator, drops the same weights again.
    return Scores(scale, dropout, torch.randint(2**62, (1,), device=device) if dropout else None)


def split_context(
    context: Tensor, size: int, key_mask: Tensor | None, rotary: RotaryTables | None, causal_length: int
) -> list[ContextChunk]:
    """Cut `context` `[B, K, C]`, its mask and its rotary tables `[B or 1, 1, K, D]` into chunks of `size`.

    The last `causal_length` positions, 0 for none, are those of causal queries: a chunk of their own.
    """
    length = context.shape[1]
    edges = [*range(0, length - causal_length, size), length - causal_length]
    edges += [length] if causal_length else []
    chunks = []
    for start, end in pairwise(edges):
        here = slice(start, end)
        tables = None if rotary is None else RotaryTables(*(table[:, :, here] for table in rotary[:2]))
        mask = None if key_mask is None else key_mask[:, here]
        causal = bool(causal_length) and end == length
        chunks.append(ContextChunk(context[:, here], mask, tables, causal))
    return chunks


def streamed_attention(
    query: Tensor, chunks: Iterable[ContextChunk], project: Project, scale: float, dropout: float = 0.0
) -> Tensor:
    """Softmax attention of `query` `[B, H, N, D]` to chunks that are read once, each forgotten before the next.

    Returns `[B, H, N, V]`, zeros where a row sees nothing.

    Raises:
        ValueError: no chunk at all, or gradients are wanted, for which the chunks would be read again.
    """
    if torch.is_grad_enabled():
        raise ValueError("an iterator of inputs can be read once, so it needs torch.no_grad(), got gradients on")
    return _forward(query, chunks, project, make_scores(scale, dropout, query.device))[0]


def chunked_attention(
    query: Tensor,
    context: Tensor,
    size: int,
    key_mask: Tensor | None,
    rotary: RotaryTables | None,
    causal_length: int,
    project: Project,
    parameters: Sequence[Tensor],
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of `query` `[B, H, N, D]` to `context` `[B, K, C]`, `size` positions of it at a time.

    Args:
        key_mask, rotary, causal_length: as for `split_context`.
        project: a function of the context and `parameters` alone.
        parameters: what `project` reads and may need a gradient.
        scale: factor of the scores.
        dropout: probability of dropping a weight; the same weights are dropped in the backward pass.

    Returns:
        `[B, H, N, V]`, zeros where a row sees nothing.
    """
    scores = make_scores(scale, dropout, query.device)
    cut = (size, key_mask, rotary, causal_length)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _ChunkedAttention.apply(query, context, cut, project, scores, *parameters)
    recomputed = torch.is_grad_enabled() and not torch.compiler.is_exporting()
    return _forward(query, split_context(context, *cut), project, scores, recomputed)[0]


def _attend(query, chunk, project, arguments):
    """Output and lse of one chunk. Merged in the precision of the lse: a rounding more for each would add up."""
    key, value = project(chunk.context, chunk.rotary)
    output, lse = flash_attention(query, key, value, return_lse=True, **arguments)
    return output.to(lse.dtype), lse


def _forward(query, chunks, project, scores, recomputed=False):
    output = lse = None
    for index, chunk in enumerate(chunks):
        arguments = (query, chunk, project, scores.of(index, chunk))
        part = checkpoint(_attend, *arguments, use_reentrant=False) if recomputed else _attend(*arguments)
        output, lse = part if output is None else merge_attention((output, part[0]), (lse, part[1]))
    if output is None:
        raise ValueError("the input must hold at least one chunk, got none")
    return output.to(query.dtype), lse


class _ChunkedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, context, cut, project, scores, *parameters):
        output, lse = _forward(query, split_context(context, *cut), project, scores)
        ctx.save_for_backward(query, context, output, lse, *parameters)
        ctx.cut, ctx.project, ctx.scores = cut, project, scores
        kind = query.device.type
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, context, output, lse, *parameters = ctx.saved_tensors
        needs_context, needs = ctx.needs_input_grad[1], ctx.needs_input_grad[5:]
        wanted = [parameter for parameter, needed in zip(parameters, needs, strict=True) if needed]
        grad_query = torch.zeros_like(query, dtype=lse.dtype)
        grad_context = torch.empty_like(context) if needs_context else None
        totals, start = [torch.zeros_like(parameter) for parameter in wanted], 0
        for index, chunk in enumerate(split_context(context, *ctx.cut)):
            here = slice(start, start := start + chunk.context.shape[1])
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                own = chunk.context.detach().requires_grad_(needs_context)
                key, value = ctx.project(own, chunk.rotary)
            found = part_gradients(query, key, value, output, lse, grad, **ctx.scores.of(index, chunk))
            grad_query += found.query
            inputs = [own, *wanted] if needs_context else wanted
            if not inputs:
                continue
            grads = torch.autograd.grad((key, value), inputs, (found.key, found.value))
            if needs_context:
                grad_context[:, here] = grads[0]
            for total, new in zip(totals, grads[len(inputs) - len(wanted) :], strict=True):
                total += new
        per_parameter = iter(totals)
        rest = [next(per_parameter) if needed else None for needed in needs]
        return grad_query.to(query.dtype), grad_context, None, None, None, *rest
