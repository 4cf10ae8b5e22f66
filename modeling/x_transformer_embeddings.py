"""XTransformer's embeddings: tokens, types and absolute positions, and the memory tokens in front of them."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import initialization as init

from .norm_family import layer_norm, unit_length
from .positions import SinusoidalPositionEmbedding


class UnitEmbedding(nn.Embedding):
    """An embedding whose rows are returned with norm 1 (arXiv 1910.05895). They start near zero, and so turn fast."""

    INITIAL_STD = 1e-5

    def set_initial_values(self) -> None:
        init.normal_(self.weight, std=self.INITIAL_STD)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return unit_length(super().forward(ids))


class ScaledSinusoids(SinusoidalPositionEmbedding):
    """Fixed sinusoids times one learned number."""

    def __init__(self, size: int):
        super().__init__(size, base=10000.0)
        self.scale = nn.Parameter(torch.full((1,), size**-0.5))

    def set_initial_values(self) -> None:
        init.constant_(self.scale, self.hidden_size**-0.5)

    def forward(self, position_ids: torch.Tensor) -> torch.Tensor:
        return super().forward(position_ids).to(self.scale.dtype) * self.scale


class TokenTypes(nn.ModuleList):
    """Several kinds of token types: the sum of one embedding for each."""

    def __init__(self, counts: list[int], size: int):
        super().__init__(nn.Embedding(count, size) for count in counts)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """`[B, N, size]` for ids `[B, N, kinds]`."""
        return sum(table(ids[..., kind]) for kind, table in enumerate(self))


class XTransformerEmbeddings(nn.Module):
    """Everything between token embeddings and the first block, except the token table itself."""

    def __init__(self, config):
        super().__init__()
        size = config.token_size
        self.positions = None
        if config.absolute_positions == "learned":
            table = UnitEmbedding if config.l2_normalize_embeddings else nn.Embedding
            self.positions = table(config.max_position_embeddings, size)
        elif config.absolute_positions == "scaled_sinusoidal":
            self.positions = ScaledSinusoids(size)
        types = config.type_vocab_size
        self.kinds_of_types = (len(types),) if isinstance(types, list) else ()
        self.token_types = None
        if types:
            self.token_types = TokenTypes(types, size) if self.kinds_of_types else nn.Embedding(types, size)
        self.norm = layer_norm(config, size) if config.embedding_norm else nn.Identity()
        self.dropout = nn.Dropout(config.embedding_dropout)
        self.projection = nn.Linear(size, config.hidden_size) if size != config.hidden_size else nn.Identity()

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        token_type_ids: torch.Tensor | None = None,
        prepend_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[B, P + N, hidden_size]` of `inputs_embeds` `[B, N, embedding_size]` and `position_ids` `[B or 1, N]`.

        `token_type_ids` are `[B, N]`, `[B, N, kinds]` where there are several kinds, or zeros if not given.
        `prepend_embeds` `[B, P, embedding_size]` are put in front as they are: no position, type or norm.
        """
        hidden_states = inputs_embeds
        if self.positions is not None:
            hidden_states = hidden_states + self.positions(position_ids).to(hidden_states.dtype)
        if self.token_types is not None:
            if token_type_ids is None:
                token_type_ids = position_ids.new_zeros(*position_ids.shape, *self.kinds_of_types)
            expected = (*inputs_embeds.shape[:2], *self.kinds_of_types)
            if token_type_ids.shape[1:] != expected[1:] or token_type_ids.shape[0] not in (1, expected[0]):
                raise ValueError(f"token_type_ids must have shape {expected}, got {tuple(token_type_ids.shape)}")
            hidden_states = hidden_states + self.token_types(token_type_ids)
        hidden_states = self.norm(hidden_states)
        if prepend_embeds is not None:
            hidden_states = torch.cat([prepend_embeds.to(hidden_states.dtype), hidden_states], dim=1)
        return self.projection(self.dropout(hidden_states))


def make_token_embedding(config) -> nn.Embedding:
    """The token table that `config` asks for."""
    table = UnitEmbedding if config.l2_normalize_embeddings else nn.Embedding
    return table(config.vocab_size, config.token_size, config.pad_token_id)


class Prefix(NamedTuple):
    """Memory tokens and prepended vectors of a sequence.

    Attributes:
        start: `[B]`, the token before which they stand in each row; None for the front.
        length: how many there are.
    """

    start: torch.Tensor | None = None
    length: int = 0


def insert_prefix(tokens: torch.Tensor, prefix: torch.Tensor, start: torch.Tensor | None) -> torch.Tensor:
    """Put `prefix` `[B, m, ...]` into `tokens` `[B, N, ...]` before token `start[b]` of each row: `[B, m + N, ...]`.

    A prefix of left-padded rows stands right before their first real token, so that no distance depends on padding.
    `start` None puts it in front.
    """
    together = torch.cat([prefix, tokens], dim=1)
    if start is None:
        return together
    return together.gather(1, _as_index(_insertion_order(tokens, prefix, start), together))


def remove_prefix(together: torch.Tensor, prefix: Prefix, kept: int = 0) -> torch.Tensor:
    """Undo `insert_prefix`; the last `kept` of the prefix stay, in front of all tokens: `[B, kept + N, ...]`."""
    if prefix.start is None:
        return together[:, prefix.length - kept :]
    start = prefix.start[:, None]
    index = torch.arange(together.shape[1] - prefix.length, device=together.device)[None]
    index = torch.where(index < start, index, index + prefix.length)
    if kept:
        places = torch.arange(prefix.length - kept, prefix.length, device=together.device)
        index = torch.cat([start + places, index], dim=1)
    return together.gather(1, _as_index(index, together))


def read_prefix(together: torch.Tensor, prefix: Prefix, place: int, count: int) -> torch.Tensor:
    """`count` of the prefix in `together` `[B, m + N, ...]`, from its `place` on: `[B, count, ...]`."""
    if prefix.start is None:
        return together[:, place : place + count]
    index = prefix.start[:, None] + torch.arange(place, place + count, device=together.device)
    return together.gather(1, _as_index(index, together))


def _insertion_order(tokens, prefix, start):
    """For each slot of the result, its place in prefix and tokens set one behind the other."""
    length = prefix.shape[1]
    slot = torch.arange(length + tokens.shape[1], device=tokens.device)[None]
    start = start[:, None]
    return torch.where(slot < start, slot + length, torch.where(slot < start + length, slot - start, slot))


def _as_index(index, like):
    return index.view(*index.shape, *[1] * (like.ndim - 2)).expand(-1, -1, *like.shape[2:])
