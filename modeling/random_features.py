"""Random projections for positive features, and the constants of the features of least variance.

A projection depends on `(seed, layer, number of the draw)` and on nothing else, so every rank of a distributed run
draws the same one and a resumed run continues the same series.
"""

import hashlib
import math

import torch
from torch import Tensor


def draw_projection(
    num_rows: int,
    head_dim: int,
    *,
    seed: int,
    layer_idx: int,
    draw: int,
    orthogonal: bool = True,
    scaling: str = "chi",
) -> Tensor:
    """A `[num_rows, head_dim]` float32 projection with rows distributed as standard normal vectors.

    Args:
        num_rows: number of rows.
        head_dim: length of a row.
        seed, layer_idx, draw: what the result depends on.
        orthogonal: rows orthogonal within blocks of `head_dim` (arXiv 2009.14794, section 2.4), each block Haar
            distributed; False gives independent Gaussian rows.
        scaling: `"chi"` gives orthogonal rows the norms of Gaussian vectors, which keeps the kernel estimate unbiased;
            `"sqrt_dim"` gives all of them the norm `sqrt(head_dim)`.
    """
    digest = hashlib.sha256(f"{seed}:{layer_idx}:{draw}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)

    def normal(*shape):
        # On the CPU also where a model is made under `torch.device("cuda")`: the generator is the CPU's.
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    if not orthogonal:
        return normal(num_rows, head_dim).float()
    blocks = []
    for _ in range(math.ceil(num_rows / head_dim)):
        q, r = torch.linalg.qr(normal(head_dim, head_dim))
        # LAPACK picks the signs of R's diagonal, which biases Q; fixing them makes Q uniform over the rotations.
        blocks.append((q * r.diagonal().sign()).mT)
    rows = torch.cat(blocks)[:num_rows]
    norms = normal(num_rows, head_dim).norm(dim=1, keepdim=True) if scaling == "chi" else math.sqrt(head_dim)
    return (rows * norms).float()


def optimal_positive_constants(head_dim: int, pair_norm: Tensor) -> tuple[Tensor, Tensor]:
    """`A` and `B` of the positive features of least variance (arXiv 2205.15317, theorem 4).

    The features `exp(A|w|² + B w·x - |x|²/2)` are unbiased for `B = sqrt(1 - 4A)`. The logarithm of their variance is,
    with `1 - 8A = 1/ρ`, `d log((ρ + 1)/(2 sqrt(ρ))) + (1 + ρ) |q + k|²`, smallest at the root of
    `2 Z ρ² + (2 Z + d) ρ = d`, where `Z` stands for the expectation of `|q + k|²`.

    Args:
        head_dim: `d`.
        pair_norm: `Z`, a scalar, in the scaled units of the queries and keys that the features see.
    """
    z = pair_norm
    rho = (torch.sqrt((2 * z + head_dim) ** 2 + 8 * z * head_dim) - 2 * z - head_dim) / (4 * z)
    a = (1 - 1 / rho) / 8
    return a, torch.sqrt(1 - 4 * a)
