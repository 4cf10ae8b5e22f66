"""Hyper-connections: a branch reads from, and writes to, several residual streams with weights of its own.

With the n streams of a token as rows of x (n × C), the branch f and its weights r (n), w (n) and M (n × n):

    y = f(rᵀ x);   x ← Mᵀ x + w yᵀ

The three are computed for each token: from its streams, and a part that is the same for all tokens.
"""

import torch
from torch import nn
from transformers import initialization as init

from .rms_norm import RMSNorm


class HyperConnection(nn.Module):
    """The weights of one branch, unconstrained (arXiv 2409.19606, Algorithm 2).

    With the rows of x normed to z: `r = a_r · tanh(z W_r) + s_r`, `M = a_r · tanh(z W_M) + S_M`,
    `w = a_w · tanh(z W_w) + s_w`. At first W is 0, s_w is 1, S_M the identity and s_r picks one stream, the next one
    in the next branch: all streams are equal, and each the stream of a model without hyper-connections.

    Args:
        config: reads `hidden_size`, `num_residual_streams` and `layer_norm_eps`.
        branch_idx: the branch's number in the stack.
    """

    INITIAL_SCALE = 0.01

    def __init__(self, config, branch_idx: int):
        super().__init__()
        size, streams = config.hidden_size, config.num_residual_streams
        self.streams, self.first = streams, branch_idx % streams
        self.norm = nn.LayerNorm(size, eps=config.layer_norm_eps, bias=False)
        self.dynamic = nn.Parameter(torch.zeros(size, streams + 2))
        self.read_bias = nn.Parameter(torch.empty(streams))
        self.mix_bias = nn.Parameter(torch.empty(streams, streams))
        self.write_bias = nn.Parameter(torch.empty(streams))
        self.mix_scale = nn.Parameter(torch.empty(1))
        self.write_scale = nn.Parameter(torch.empty(1))

    def set_initial_values(self) -> None:
        init.zeros_(self.dynamic)
        init.copy_(self.read_bias, torch.eye(self.streams, device="cpu")[self.first])
        init.eye_(self.mix_bias)
        init.ones_(self.write_bias)
        init.constant_(self.mix_scale, self.INITIAL_SCALE)
        init.constant_(self.write_scale, self.INITIAL_SCALE)

    def weights(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """r `[B, N, n]`, M `[B, N, n, n]` and w `[B, N, n]` for `streams` `[B, N, n, C]`."""
        dynamic = torch.tanh(self.norm(streams) @ self.dynamic)
        read, mix, write = dynamic.split((1, self.streams, 1), dim=-1)
        read = torch.addcmul(self.read_bias, read[..., 0], self.mix_scale)
        mix = torch.addcmul(self.mix_bias, mix, self.mix_scale)
        return read, mix, torch.addcmul(self.write_bias, write[..., 0], self.write_scale)

    def forward(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What the branch reads `[B, N, C]`, the mixed streams `[B, N, n, C]`, and where it writes, `[B, N, n]`."""
        read, mix, write = self.weights(streams)
        both = torch.cat([read[..., None], mix], dim=-1).mT @ streams
        return both[..., 0, :], both[..., 1:, :], write


class ManifoldHyperConnection(nn.Module):
    """The weights of one branch, with M doubly stochastic (arXiv 2512.24880).

    With all of x as one normed vector z of nC numbers: `r = σ(a_r · z W_r + b_r)`, `w = 2σ(a_w · z W_w + b_w)`, and
    `Mᵀ = Sinkhorn(exp(a_M · z W_M + B_M))`: rows and columns in turn divided by their sums, so that the streams' mean
    is kept. At first the biases read one stream, write 1 to each and mix almost nothing.
    """

    INITIAL_SCALE, APART = 0.01, 8.0

    def __init__(self, config, branch_idx: int):
        super().__init__()
        size, streams = config.hidden_size, config.num_residual_streams
        self.streams, self.first = streams, branch_idx % streams
        self.iterations = config.sinkhorn_iterations
        self.norm = RMSNorm(streams * size, eps=config.rms_norm_eps)
        self.dynamic = nn.Linear(streams * size, streams * (streams + 2), bias=False)
        self.read_bias = nn.Parameter(torch.empty(streams))
        self.mix_bias = nn.Parameter(torch.empty(streams, streams))
        self.write_bias = nn.Parameter(torch.empty(streams))
        self.scales = nn.Parameter(torch.empty(3))

    def set_initial_values(self) -> None:
        identity = torch.eye(self.streams, device="cpu")
        init.copy_(self.read_bias, self.APART * (identity[self.first] - 0.5))
        init.copy_(self.mix_bias, self.APART * (identity - 1))
        init.zeros_(self.write_bias)
        init.constant_(self.scales, self.INITIAL_SCALE)

    def weights(self, streams: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """r `[B, N, n]`, M `[B, N, n, n]` and w `[B, N, n]` for `streams` `[B, N, n, C]`."""
        dynamic = self.dynamic(self.norm(streams.flatten(2)))
        read, write, mix = dynamic.split((self.streams, self.streams, self.streams**2), dim=-1)
        read = torch.sigmoid(torch.addcmul(self.read_bias, read, self.scales[0]))
        write = 2 * torch.sigmoid(torch.addcmul(self.write_bias, write, self.scales[1]))
        mix = torch.addcmul(self.mix_bias, mix.unflatten(-1, (self.streams, -1)), self.scales[2])
        return read, doubly_stochastic(mix, self.iterations).mT, write

    forward = HyperConnection.forward


def doubly_stochastic(logits: torch.Tensor, iterations: int) -> torch.Tensor:
    """`exp(logits)` `[..., n, n]`, rows and columns divided by their sums in turn (Sinkhorn and Knopp, 1967).

    In logarithms and at least float32. The columns come last: their sums are 1 exactly, those of the rows nearly.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    for _ in range(iterations):
        wide = wide - wide.logsumexp(dim=-1, keepdim=True)
        wide = wide - wide.logsumexp(dim=-2, keepdim=True)
    return wide.exp().to(logits.dtype)


def make_hyper_connection(config, branch_idx: int) -> nn.Module | None:
    """The module that `config.num_residual_streams` and `config.residual_stream_mixing` ask for, or None."""
    if config.num_residual_streams == 1:
        return None
    kinds = {"free": HyperConnection, "doubly_stochastic": ManifoldHyperConnection}
    return kinds[config.residual_stream_mixing](config, branch_idx)


def split_streams(hidden_states: torch.Tensor, streams: int) -> torch.Tensor:
    """`[B, N, C]` as `streams` equal streams, `[B, N, n, C]`; itself if `streams` is 1."""
    return hidden_states if streams == 1 else hidden_states[:, :, None].expand(-1, -1, streams, -1)


def join_streams(hidden_states: torch.Tensor, streams: int) -> torch.Tensor:
    """The sum of the streams `[B, N, n, C]`, `[B, N, C]`."""
    return hidden_states if streams == 1 else hidden_states.sum(dim=2)
