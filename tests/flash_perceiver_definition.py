"""flash-perceiver's two models, written out from their formulas: the original cannot be imported without a GPU.

Names of weights are the original's; a block keeps no skip around its feed-forward and does not normalise what it
attends to. `rounding` is the multiple to which a release of flash-attn rounds the width of a gated feed-forward.
"""

import torch
from torch import nn


class Mixer(nn.Module):
    def __init__(self, dim, heads, head_dim, context_dim=None, rotary_dim=0):
        super().__init__()
        inner, self.heads, self.rotary_dim = heads * head_dim, heads, rotary_dim
        self.is_cross = context_dim is not None
        if self.is_cross:
            self.Wq = nn.Linear(dim, inner, bias=False)
            self.Wkv = nn.Linear(context_dim, 2 * inner, bias=False)
        else:
            self.Wqkv = nn.Linear(dim, 3 * inner)
        self.out_proj = nn.Linear(inner, dim)

    def turn(self, x):
        """Rotate the pairs (i, i + d/2) of the first channels of `[B, H, N, D]` by position / 10000^(2i/d)."""
        half = self.rotary_dim // 2
        if not half:
            return x
        angle = torch.arange(x.shape[2])[:, None] * 10000 ** (-torch.arange(half) / half)
        a, b = x[..., :half], x[..., half : 2 * half]
        turned = [a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()]
        return torch.cat([*turned, x[..., 2 * half :]], dim=-1)

    def forward(self, x, context, mask):
        if self.is_cross:
            q, (k, v) = self.Wq(x), self.Wkv(context).chunk(2, dim=-1)
        else:
            q, k, v = self.Wqkv(x).chunk(3, dim=-1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        if not self.is_cross:
            q, k = self.turn(q), self.turn(k)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if mask is not None:
            scores = scores - 10000 * (~mask[:, None, None]).to(scores.dtype)
        return self.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, dim, hidden, gated):
        super().__init__()
        self.gated = gated
        self.fc1 = nn.Linear(dim, hidden * (2 if gated else 1))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        x = self.fc1(x)
        if not self.gated:
            return self.fc2(nn.functional.gelu(x))
        value, gate = x.chunk(2, dim=-1)
        return self.fc2(value * gate.sigmoid())


class Block(nn.Module):
    def __init__(self, dim, mixer, hidden, gated, rounding):
        super().__init__()
        self.mixer, self.norm1, self.norm2 = mixer, nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = Mlp(dim, -(-hidden // rounding) * rounding if gated else hidden, gated)

    def forward(self, x, context=None, mask=None):
        return self.mlp(self.norm2(x + self.mixer(self.norm1(x), context, mask)))


class Perceiver(nn.Module):
    def __init__(
        self, *, input_dim, depth, num_latents=512, latent_dim=512, cross_heads=1, cross_head_dim=64, latent_heads=8,
        latent_head_dim=64, latent_rotary_emb_dim=0, weight_tie_layers=False, gated_mlp=True, self_per_cross_attn=1,
        num_zero_tokens=None, output_dim=None, output_mode="average", rounding=128,
    ):  # fmt: skip
        super().__init__()
        self.output_mode, self.depth = output_mode, depth
        sizes = [input_dim] * depth if isinstance(input_dim, int) else input_dim
        self.latents = None if num_latents is None else nn.Parameter(torch.randn(num_latents, latent_dim))
        self.zero_tokens = nn.ParameterList(
            nn.Parameter(torch.randn(num_zero_tokens, size)) for size in sizes * bool(num_zero_tokens)
        )

        def make(size):
            cross = Mixer(latent_dim, cross_heads, cross_head_dim, size)
            shape = {"hidden": 4 * latent_dim, "gated": gated_mlp, "rounding": rounding}
            blocks = nn.ModuleList(
                Block(
                    latent_dim, Mixer(latent_dim, latent_heads, latent_head_dim, None, latent_rotary_emb_dim), **shape
                )
                for _ in range(self_per_cross_attn)
            )
            return nn.ModuleList([Block(latent_dim, cross, **shape), blocks])

        layers = [make(size) for size in sizes]
        if weight_tie_layers:
            layers = layers[:1] + layers[1:2] * (depth - 1)
        self.layers = nn.ModuleList(layers)
        self.out_proj = None
        if output_dim is not None:
            size = latent_dim * (num_latents if output_mode == "concat" else 1)
            self.out_proj = nn.Sequential(nn.LayerNorm(size), nn.Linear(size, output_dim))

    def latent_array(self, data, mask=None, latents=None):
        is_list = isinstance(data, (list, tuple))
        parts = list(data) if is_list else [data] * self.depth
        masks = mask if isinstance(mask, (list, tuple)) else [mask] * self.depth
        rows = parts[0].shape[0]
        x = (self.latents if latents is None else latents).expand(rows, -1, -1)
        for index, (cross, blocks) in enumerate(self.layers):
            part, seen = parts[index], masks[index]
            if self.zero_tokens:
                # With a tensor the tokens of the first layer are read by all.
                tokens = self.zero_tokens[index if is_list else 0].expand(rows, -1, -1)
                part = torch.cat([tokens, part], dim=1)
                if seen is not None:
                    seen = torch.cat([seen.new_ones(rows, tokens.shape[1]), seen], dim=1)
            x = cross(x, part, seen)
            for block in blocks:
                x = block(x)
        return x

    def forward(self, data, mask=None, latents=None):
        x = self.latent_array(data, mask, latents)
        if self.out_proj is None:
            return x
        pooled = {"average": lambda: x.mean(1), "concat": lambda: x.flatten(1), "first": lambda: x[:, 0]}
        return self.out_proj(pooled[self.output_mode]())


class PerceiverIO(nn.Module):
    def __init__(
        self, *, input_dim, query_dim, depth, proj_dim=None, query_heads=1, query_head_dim=64, latent_dim=512,
        gated_mlp=True, rounding=128, weight_tie_layers=False, **arguments,
    ):  # fmt: skip
        super().__init__()
        shape = {"latent_dim": latent_dim, "gated_mlp": gated_mlp, "rounding": rounding}
        base = Perceiver(input_dim=input_dim, depth=1, self_per_cross_attn=depth, **shape, **arguments)
        self.latents, self.zero_tokens, self.layers = base.latents, base.zero_tokens, base.layers
        self.base = [base]  # its weights are here under their own names
        mixer = Mixer(query_dim, query_heads, query_head_dim, latent_dim)
        self.query_block = Block(query_dim, mixer, 4 * latent_dim, gated_mlp, rounding)
        self.out_proj = nn.Identity()
        if proj_dim is not None:
            self.out_proj = nn.Sequential(nn.LayerNorm(query_dim), nn.Linear(query_dim, proj_dim))

    def forward(self, data, mask=None, latents=None, queries=None):
        x = self.base[0].latent_array(data, mask, latents)
        if queries is None:
            return x
        return self.out_proj(self.query_block(queries.expand(x.shape[0], -1, -1), x))
