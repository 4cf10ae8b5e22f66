"""Hyper-connections against their papers' formulas, written out for one token at a time."""

import pytest
import torch
from generation_models import tokens
from x_transformer_models import SIZES

from hf_efficient import XTransformerConfig, XTransformerForCausalLM
from hf_efficient.modeling.hyper_connections import (
    HyperConnection,
    ManifoldHyperConnection,
    doubly_stochastic,
    make_hyper_connection,
)


MIXINGS = ("free", "doubly_stochastic")


def connection(mixing, streams=3, branch_idx=1):
    torch.manual_seed(0)
    config = XTransformerConfig(**SIZES, num_residual_streams=streams, residual_stream_mixing=mixing)
    module = make_hyper_connection(config, branch_idx)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module.double(), torch.randn(2, 5, streams, SIZES["hidden_size"], dtype=torch.float64)


@torch.no_grad()
def test_unconstrained_weights_are_those_of_the_paper():
    module, streams = connection("free")
    inputs, mixed, write = module(streams)
    for place in ((0, 0), (1, 4)):
        x = streams[place]
        z = torch.stack([(row - row.mean()) / (row.var(correction=0) + 1e-5).sqrt() for row in x]) * module.norm.weight
        dynamic = [[torch.tanh(row @ column) for column in module.dynamic.T] for row in z]
        read = sum((module.read_bias[i] + module.mix_scale * dynamic[i][0]) * x[i] for i in range(3))
        torch.testing.assert_close(inputs[place], read)
        for j in range(3):
            row = sum((module.mix_bias[i, j] + module.mix_scale * dynamic[i][1 + j]) * x[i] for i in range(3))
            torch.testing.assert_close(mixed[place][j], row)
            torch.testing.assert_close(write[place][j], (module.write_bias[j] + module.write_scale * dynamic[j][4])[0])


@torch.no_grad()
def test_constrained_weights_are_those_of_the_paper():
    module, streams = connection("doubly_stochastic")
    inputs, mixed, write = module(streams)
    x = streams[1, 3]
    z = x.flatten() / (x.flatten().square().mean() + 1e-6).sqrt() * module.norm.weight
    dynamic = module.dynamic.weight @ z
    a_read, a_write, a_mix = module.scales
    torch.testing.assert_close(inputs[1, 3], torch.sigmoid(a_read * dynamic[:3] + module.read_bias) @ x)
    torch.testing.assert_close(write[1, 3], 2 * torch.sigmoid(a_write * dynamic[3:6] + module.write_bias))
    mix = torch.exp(a_mix * dynamic[6:].view(3, 3) + module.mix_bias)
    for _ in range(module.iterations):
        mix = mix / mix.sum(dim=1, keepdim=True)
        mix = mix / mix.sum(dim=0, keepdim=True)
    torch.testing.assert_close(mixed[1, 3], mix @ x)


def test_sinkhorn_gives_rows_and_columns_that_sum_to_one():
    logits = 2 * torch.randn(4, 5, 5, generator=torch.Generator().manual_seed(0))
    mix = doubly_stochastic(logits, 100)
    torch.testing.assert_close(mix.sum(-1), torch.ones(4, 5), rtol=0, atol=1e-4)
    torch.testing.assert_close(mix.sum(-2), torch.ones(4, 5))
    assert doubly_stochastic(logits.bfloat16(), 5).dtype == torch.bfloat16


@torch.no_grad()
def test_constrained_streams_keep_their_mean():
    module, streams = connection("doubly_stochastic", streams=4)
    torch.testing.assert_close(module(streams)[1].mean(dim=2), streams.mean(dim=2), rtol=0, atol=1e-3)


@pytest.mark.parametrize("mixing", MIXINGS)
@torch.no_grad()
def test_it_begins_as_the_model_without(mixing):
    """Equal to it (unconstrained), or nearly: its sigmoids are not quite 0 and 1."""
    models = []
    for options in ({}, {"num_residual_streams": 4, "residual_stream_mixing": mixing}):
        torch.manual_seed(0)
        models.append(XTransformerForCausalLM(XTransformerConfig(**SIZES, **options, layer_norm_eps=1e-12)).double())
    plain, several = models
    several.load_state_dict(plain.state_dict(), strict=False)
    for layer in several.model.layers:  # at first, no weight depends on the token
        for branch in (layer.self_attn_branch, layer.mlp_branch):
            dynamic = branch.hyper_connection.dynamic
            torch.nn.init.zeros_(dynamic if mixing == "free" else dynamic.weight)
    ids = tokens(2, 9)
    tolerance = 1e-9 if mixing == "free" else 1e-2
    torch.testing.assert_close(several(ids).logits, plain(ids).logits, rtol=tolerance, atol=tolerance)


def test_initial_values():
    first, second = (layer.mlp_branch for layer in XTransformerForCausalLM(
        XTransformerConfig(**SIZES, num_residual_streams=4)).model.layers)  # fmt: skip
    assert type(first.hyper_connection) is HyperConnection and first.residual is None
    assert first.hyper_connection.read_bias.tolist() == [0, 1, 0, 0]
    assert second.hyper_connection.read_bias.tolist() == [0, 0, 0, 1]
    assert torch.equal(first.hyper_connection.mix_bias, torch.eye(4))
    config = XTransformerConfig(**SIZES, num_residual_streams=4, residual_stream_mixing="doubly_stochastic")
    branch = XTransformerForCausalLM(config).model.layers[0].self_attn_branch.hyper_connection
    assert type(branch) is ManifoldHyperConnection
    assert branch.read_bias.argmax() == 0 and 0.9 < branch.read_bias.sigmoid().sum() < 1.1


def test_bfloat16_and_autocast():
    model = XTransformerForCausalLM(
        XTransformerConfig(**SIZES, num_residual_streams=2, residual_stream_mixing="doubly_stochastic")
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    assert model.bfloat16()(tokens(2, 9)).logits.dtype == torch.bfloat16
