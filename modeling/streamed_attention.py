"""Attention to a context that never exists as keys and values all at once.

The context comes in chunks. Each is projected, attended to and forgotten; the partial results are merged by their
log-sum-exp (arXiv 2205.14135, section 3.1). The backward pass goes through the chunks again: with
`out = Σ_c w_c out_c`, `w_c = exp(lse_c - lse)`, the chunk c gets the gradients

    d out_c = w_c · d out            d lse_c = w_c · (d out · (out_c - out))

so that memory beside the context, its gradient and the result is that of one chunk.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.flash_attention import flash_attention, merge_attention


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


def split_context(
    context: Tensor, size: int, key_mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None, causal_length: int
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
        tables = None if rotary is None else tuple(table[:, :, here] for table in rotary)
        mask = None if key_mask is None else key_mask[:, here]
        causal = bool(causal_length) and end == length
        chunks.append(ContextChunk(context[:, here], mask, tables, causal))
    return chunks


def streamed_attention(
    query: Tensor,
    chunks: Iterable[ContextChunk],
    project: Project,
    parameters: Sequence[Tensor],
    scaling: float,
    dropout: float = 0.0,
) -> Tensor:
    """Softmax attention of `query` `[B, H, N, D]` to all chunks: `[B, H, N, V]`, zeros where a row sees nothing.

    Args:
        chunks: any iterable without gradients; a sequence with them.
        project: a function of the context and `parameters` alone.
        parameters: what `project` reads and may need a gradient.
        scaling: factor of the scores.
        dropout: probability of dropping a weight; the same weights are dropped in the backward pass.

    Raises:
        ValueError: no chunk at all, or an iterator where gradients are wanted.
    """
    # A tensor, so that checkpointing, which restores the generator, drops the same weights again.
    seed = torch.randint(2**62, (1,), device=query.device) if dropout else None
    needs_gradient = torch.is_grad_enabled()
    if not isinstance(chunks, Sequence):
        if needs_gradient:
            raise ValueError("an iterator of inputs can be read once, so it needs torch.no_grad(), got gradients on")
        return _forward(query, chunks, project, scaling, dropout, seed)[0]
    if not needs_gradient:
        return _forward(query, chunks, project, scaling, dropout, seed)[0]
    if not chunks:
        raise ValueError("the input must hold at least one chunk, got none")
    contexts = [chunk.context for chunk in chunks]
    rest = [chunk._replace(context=None) for chunk in chunks]
    return _StreamedAttention.apply(query, rest, project, scaling, dropout, seed, *contexts, *parameters)


def _attend(query, chunk, project, scaling, dropout, seed, index):
    """Output and lse of one chunk."""
    key, value = project(chunk.context, chunk.rotary)
    return flash_attention(
        query,
        key,
        value,
        scale=scaling,
        causal=chunk.causal,
        key_mask=chunk.key_mask,
        dropout_p=dropout,
        dropout_seed=None if seed is None else seed + index,
        return_lse=True,
    )


def _forward(query, chunks, project, scaling, dropout, seed):
    output = lse = None
    for index, chunk in enumerate(chunks):
        part, part_lse = _attend(query, chunk, project, scaling, dropout, seed, index)
        # Merged in the precision of the lse: each rounding to a low dtype would be one more error per chunk.
        part = part.to(part_lse.dtype)
        output, lse = (part, part_lse) if output is None else merge_attention((output, part), (lse, part_lse))
    if output is None:
        raise ValueError("the input must hold at least one chunk, got none")
    return output.to(query.dtype), lse


class _StreamedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, rest, project, scaling, dropout, seed, *tensors):
        chunks = (chunk._replace(context=context) for chunk, context in zip(rest, tensors, strict=False))
        output, lse = _forward(query, chunks, project, scaling, dropout, seed)
        ctx.save_for_backward(query, output, lse, seed, *tensors)
        ctx.rest, ctx.project, ctx.numbers = rest, project, (scaling, dropout)
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
        query, output, lse, seed, *tensors = ctx.saved_tensors
        count = len(ctx.rest)
        contexts, parameters, needs = tensors[:count], tensors[count:], ctx.needs_input_grad[6:]
        wanted = [p for p, needed in zip(parameters, needs[count:], strict=True) if needed]
        grad = grad.to(lse.dtype)
        total = (grad * output.to(lse.dtype)).sum(-1)
        grad_query, grad_parameters, grad_contexts = torch.zeros_like(query), None, []
        for index, (context, chunk) in enumerate(zip(contexts, ctx.rest, strict=True)):
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                q = query.detach().requires_grad_()
                c = context.detach().requires_grad_(needs[index])
                part, part_lse = _attend(q, chunk._replace(context=c), ctx.project, *ctx.numbers, seed, index)
            # A row that sees nothing of this chunk, or nothing at all, takes no gradient through it.
            weight = torch.where(part_lse == -torch.inf, 0, torch.exp(part_lse - lse)).detach()
            grad_part = weight[..., None] * grad
            grad_lse = weight * ((grad * part.detach().to(lse.dtype)).sum(-1) - total)
            inputs = [q, *([c] if needs[index] else []), *wanted]
            grads = torch.autograd.grad(
                (part, part_lse), inputs, (grad_part.to(part.dtype), grad_lse), allow_unused=True
            )
            grad_query += grads[0]
            grad_contexts.append(grads[1] if needs[index] else None)
            news = grads[len(inputs) - len(wanted) :]
            grad_parameters = list(news) if grad_parameters is None else _add(grad_parameters, news)
        found = iter(grad_parameters)
        per_parameter = [next(found) if needed else None for needed in needs[count:]]
        return grad_query, None, None, None, None, None, *grad_contexts, *per_parameter


def _add(totals, news):
    sums = []
    for total, new in zip(totals, news, strict=True):
        sums.append(total if new is None else new if total is None else total + new)
    return sums
