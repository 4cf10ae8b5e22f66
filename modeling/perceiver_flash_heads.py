"""What stands behind the latents of a PerceiverFlash: pooling, projections, and queries that read them."""

import torch
from torch import nn

from .attention_masks import make_attention_mask
from .perceiver_flash_inputs import expand_rows, positions_or_range
from .perceiver_flash_layer import PerceiverFlashLayer
from .rotary import rotary_tables


def pooled_size(config) -> int:
    """Width of what `pool` gives."""
    return config.hidden_size * (config.num_latents if config.pooling == "concat" else 1)


def pool(latents: torch.Tensor, kind: str) -> torch.Tensor:
    """One vector for each row of latents `[B, M, C]`: their mean, the first, or all behind one another."""
    if kind == "concat":
        return latents.flatten(1)
    return latents[:, 0] if kind == "first" else latents.mean(dim=1)


class PerceiverFlashProjection(nn.Sequential):
    """LayerNorm (with `output_norm`) and a linear layer."""

    def __init__(self, config, size: int, output_size: int):
        norm = nn.LayerNorm(size, eps=config.layer_norm_eps) if config.output_norm else nn.Identity()
        super().__init__(norm, nn.Linear(size, output_size))


class PerceiverFlashDecoder(nn.Module):
    """Queries read the latents in one cross-attention block (arXiv 2107.14795, section 3.2).

    Args:
        num_queries: number of learned queries, None for none.
        output_size: width of the outputs, None for that of the queries.
    """

    def __init__(self, config, num_queries: int | None, output_size: int | None):
        super().__init__()
        self.config = config
        self.queries = None if num_queries is None else nn.Parameter(torch.empty(num_queries, config.query_size))
        self.layer = PerceiverFlashLayer(config, config.query_block())
        self.projection = nn.Identity()
        if output_size is not None:
            self.projection = PerceiverFlashProjection(config, config.query_size, output_size)

    def forward(
        self,
        latents: torch.Tensor,
        queries: torch.Tensor | None = None,
        query_position_ids: torch.Tensor | None = None,
        latent_position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> torch.Tensor:
        """Outputs `[B, Q, …]` for latents `[B, M, hidden_size]` and queries `[Q or B×Q, query_size]`."""
        if queries is None:
            queries = self.queries
        if queries is None:
            raise ValueError("queries must be given to a model without num_queries, got None")
        queries = expand_rows(queries, latents.shape[0], self.config.query_size, "queries")
        rotary, size = {}, self.config.query_rotary_dim
        if size:
            positions = {
                "query_rotary": positions_or_range(query_position_ids, queries),
                "key_rotary": positions_or_range(latent_position_ids, latents, self.config.latent_spacing),
            }
            rotary = {name: rotary_tables(ids, size, self.config.rotary_emb_base) for name, ids in positions.items()}
        mask = make_attention_mask(
            self.config._attn_implementation, None, queries.shape[1], latents.shape[1], device=latents.device
        )
        return self.projection(self.layer(queries, latents, attention_mask=mask, **rotary, **kwargs))


class PerceiverFlashClassificationHead(nn.Module):
    """Logits `[B, num_labels]` of latents `[B, M, C]`: pooled and projected, or read by one query."""

    def __init__(self, config):
        super().__init__()
        self.pooling = config.pooling
        self.dropout = nn.Dropout(config.classifier_dropout)
        if config.pooling == "query":
            self.decoder = PerceiverFlashDecoder(config, 1, config.num_labels)
        else:
            size = pooled_size(config)
            self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps) if config.output_norm else nn.Identity()
            self.out_proj = nn.Linear(size, config.num_labels)

    def forward(self, latents: torch.Tensor, latent_position_ids: torch.Tensor | None = None) -> torch.Tensor:
        if self.pooling == "query":
            return self.decoder(self.dropout(latents), latent_position_ids=latent_position_ids)[:, 0]
        return self.out_proj(self.norm(self.dropout(pool(latents, self.pooling))))
