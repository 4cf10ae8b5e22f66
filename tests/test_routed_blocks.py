"""Conditional computation: the formulas, and what must hold of every routed block."""

import pytest
import torch
from routed_blocks import (
    WIDTH,
    attention,
    autoregressive_attention,
    close,
    cross_attention,
    feed_forward,
    image_attention,
    masks,
    one_sequence,
    soft_scores,
    states,
)
from torch.nn.functional import scaled_dot_product_attention

from hf_efficient.modeling.differentiable_topk import topk
from hf_efficient.modeling.heavy_attention import HeavyAttention
from hf_efficient.modeling.image_patches import PatchEmbedding, sincos_positions
from hf_efficient.modeling.routed_attention import RoutedAttention
from hf_efficient.modeling.routed_block import RoutedTransformerBlock
from hf_efficient.modeling.routed_vit import RoutedImageBlock
from hf_efficient.modeling.token_router import RouterOptions, TokenRouter, tokens_for


# --- against the formulas of the paper, written out


def route(router, tokens, k, temperature=1.0):
    """Positions and scores of the k best of `[N, C]`, for each route."""
    normed = tokens / tokens.square().mean(-1, keepdim=True).add(1e-6).sqrt()
    found = []
    for vector in router.routing_vectors:
        logits = normed @ vector
        chosen = logits.topk(k).indices.sort().values
        found.append((chosen, soft_scores(logits, 9 / 8 * k, temperature)[chosen]))
    return found


def test_feed_forward_is_the_formula():
    block, tokens = feed_forward(router_options=RouterOptions(temperature=0.3)), states(1)[0]
    with torch.no_grad():
        ((chosen, scores),) = route(block.router, tokens, 6, 0.3)
        expected = block.light_mlp(block.light_norm(tokens))
        expected[chosen] += scores[:, None] * block.heavy_mlp(block.heavy_norm(tokens[chosen]))
        close(block(tokens[None])[0], expected)


@pytest.mark.parametrize("sets", [1, 2])
def test_heavy_attention_is_the_formula(sets):
    """`s_q · A(X_q, s_kv X_kv)`: the scores of the keys multiply the tokens that keys and values come from."""
    block, tokens = attention(light_heads=0, num_key_value_sets=sets, rotary_base=None), states(1)[0]
    heavy = block.heavy_attn
    with torch.no_grad():
        ((queries, query_scores),) = route(heavy.q_router, tokens, 5)
        normed, per_set, outputs = heavy.norm(tokens), 4 // sets, []
        for index, (keys, key_scores) in enumerate(route(heavy.key_value_router, tokens, 7)):
            rows = slice(8 * per_set * index, 8 * per_set * (index + 1))
            scored = key_scores[:, None] * normed[keys]
            q, k, v = (
                (source @ projection.weight[rows].T).view(len(source), per_set, 8).transpose(0, 1)
                for source, projection in (
                    (normed[queries], heavy.q_proj),
                    (scored, heavy.k_proj),
                    (scored, heavy.v_proj),
                )
            )
            outputs.append((q @ k.mT / 8**0.5).softmax(-1) @ v)
        expected = torch.zeros_like(tokens)
        attended = torch.cat(outputs).transpose(0, 1).flatten(1)
        expected[queries] = query_scores[:, None] * (attended @ heavy.o_proj.weight.T)
        # torch's own attention in float64 is not exact to the last digits.
        torch.testing.assert_close(block(tokens[None])[0], expected, rtol=0, atol=1e-8)


def test_light_attention_sees_its_radius():
    block, tokens = attention().light_attn, states(1)
    with torch.no_grad():
        query, key, value = block.project(tokens)
        distance = torch.arange(40)[:, None] - torch.arange(40)
        expected = scaled_dot_product_attention(query, key, value, attn_mask=distance.abs() <= 4)
        close(block(tokens), block.o_proj(expected.transpose(1, 2).flatten(2)))


def test_rotary_positions_are_those_of_the_sequence():
    """Moving the whole sequence to the right changes nothing; moving a part of it does."""
    heavy = HeavyAttention(WIDTH, num_heads=4, head_dim=8, num_routed_queries=40, num_routed_keys=40).double()
    tokens = states(1)
    with torch.no_grad():
        whole = heavy(torch.zeros_like(tokens), tokens)
        padded = torch.cat([states(1, 6, seed=1), tokens], dim=1)
        mask = torch.arange(46)[None] >= 6
        moved = heavy(torch.zeros_like(padded), padded, mask)
        torch.testing.assert_close(moved[:, 6:], whole, rtol=0, atol=1e-6)  # the angles are float32
        apart = torch.cat([tokens[:, :20], padded[:, :6], tokens[:, 20:]], dim=1)
        mask = (torch.arange(46)[None] < 20) | (torch.arange(46)[None] >= 26)
        moved = heavy(torch.zeros_like(apart), apart, mask)[mask.expand(1, -1)]
        assert (moved - whole[0]).abs().max() > 1e-3


@pytest.mark.parametrize("sets", [1, 2])
def test_distance_bias_is_added_for_routed_pairs(sets):
    """With everything routed, as flash attention adds it for regular distances."""
    block = attention(num_routed_queries=40, num_routed_keys=40, rotary_base=None, num_key_value_sets=sets)
    heavy, tokens, bias = block.heavy_attn, states(2), torch.randn(4, 2 * 5 + 1, dtype=torch.float64)
    with torch.no_grad():
        q, k, v = (
            projection(heavy.norm(tokens)).unflatten(-1, (4, 8)).transpose(1, 2)
            for projection in (heavy.q_proj, heavy.k_proj, heavy.v_proj)
        )
        distance = (torch.arange(40) - torch.arange(40)[:, None]).clamp(-5, 5) + 5
        expected = scaled_dot_product_attention(q, k, v, attn_mask=bias[:, distance])
        expected = heavy.o_proj(expected.transpose(1, 2).flatten(2))
        close(heavy(torch.zeros_like(tokens), tokens, distance_bias=bias), expected)


def test_static_routing_is_evenly_spaced_and_has_no_parameters():
    router = TokenRouter(WIDTH, options=RouterOptions(static=True))
    assert not list(router.parameters())
    routing = router(states(2, 12), 4, masks(12, 8, total=12).bool())
    assert routing.indices[0, 0].tolist() == [2, 5, 8, 11] and sorted(routing.indices[1, 0].tolist()) == [1, 3, 5, 7]
    assert (routing.scores == 1).all()


# --- what must hold


@one_sequence
def test_padded_rows_equal_single_rows(make):
    block, tokens, lengths = make(), states(), (40, 29, 3)
    with torch.no_grad():
        together = block(tokens, masks(*lengths))
        garbage = torch.where(masks(*lengths)[..., None] == 1, tokens, 1e3)
        assert torch.equal(block(garbage, masks(*lengths))[masks(*lengths) == 1], together[masks(*lengths) == 1])
        for row, length in enumerate(lengths):
            close(together[row, :length], block(tokens[row : row + 1, :length])[0])


@pytest.mark.parametrize("sets", [1, 2])
def test_padded_rows_of_cross_attention_equal_single_rows(sets):
    """Queries and memories both padded, on the left: neither is routed, wherever it stands."""
    block, tokens, memories = cross_attention(num_key_value_sets=sets), states(), states(3, 100, seed=1)
    lengths, memory_lengths = (40, 29, 3), (100, 7, 61)
    mask, memory_mask = masks(*lengths).flip(1), masks(*memory_lengths, total=100).flip(1)
    with torch.no_grad():
        together = block(tokens, memories, mask, memory_mask)
        garbage = (torch.where(m[..., None] == 1, t, 1e3) for t, m in ((tokens, mask), (memories, memory_mask)))
        assert torch.equal(block(*garbage, mask, memory_mask)[mask == 1], together[mask == 1])
        reversed_order = block(tokens.flip(0), memories.flip(0), mask.flip(0), memory_mask.flip(0)).flip(0)
        close(reversed_order, together)
        for row, (length, memory_length) in enumerate(zip(lengths, memory_lengths, strict=True)):
            alone = block(tokens[row : row + 1, -length:], memories[row : row + 1, -memory_length:])
            close(together[row, -length:], alone[0])


@pytest.mark.parametrize("in_windows", [False, True])
def test_maps_of_a_batch_do_not_influence_each_other(in_windows):
    block, maps = (
        image_attention(num_key_value_sets=2, heavy_in_windows=in_windows),
        states(3, 64).view(3, 8, 8, WIDTH),
    )
    with torch.no_grad():
        together = block(maps)
        close(block(maps.flip(0)), together.flip(0))
        for row in range(3):
            close(block(maps[row : row + 1])[0], together[row])


def test_topk_is_torchs_with_a_gradient_for_the_choice():
    values = torch.randn(3, 50, dtype=torch.float64, requires_grad=True)
    found, expected = topk(values, 7), torch.topk(values, 7)
    assert torch.equal(found.values, expected.values) and torch.equal(found.indices, expected.indices)
    for row in range(3):
        close(found.scores[row], soft_scores(values[row].detach(), 9 / 8 * 7, 1.0)[found.indices[row]])
    (gradient,) = torch.autograd.grad(found.gates.sum(), values)
    assert (gradient != 0).sum() > 3 * 20
    with pytest.raises(ValueError, match="k must be an integer from 1 to N = 50, got 51"):
        topk(values, 51)


@pytest.mark.parametrize("in_windows", [False, True])
def test_image_attention_is_global_unless_asked_not_to_be(in_windows):
    """The original routes inside each window, so a pixel never reaches another window."""
    block = image_attention(heavy_in_windows=in_windows, num_routed_keys=0.9)
    maps = states(1, 96).view(1, 8, 12, WIDTH)
    changed = maps.clone()
    changed[0, 1, 1] += states(1, 1, seed=3)[0, 0]
    with torch.no_grad():
        moved = (block(maps) != block(changed)).any(-1)[0]
    assert moved[:4, :4].any() and moved[4:, 4:].any() == (not in_windows)
    block.channel_first = True
    with torch.no_grad():
        first = block(maps.movedim(-1, 1)).movedim(1, -1)
        block.channel_first = False
        close(first, block(maps))


@one_sequence
def test_every_parameter_gets_a_gradient(make):
    block = make()
    (block(states()) * states(seed=4)).sum().backward()
    silent = [name for name, p in block.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not silent


@pytest.mark.parametrize("make", [feed_forward, attention, autoregressive_attention])
def test_gradients_are_those_of_finite_differences(make):
    """Where the choice does not change, so along the router's vectors too."""
    block, tokens = make(), states(1, 12).requires_grad_()
    torch.autograd.gradcheck(block, (tokens,), fast_mode=True)


def test_a_router_learns_where_the_heavy_branch_pays():
    torch.manual_seed(0)
    block = feed_forward(num_routed=8).float()
    torch.nn.init.zeros_(block.light_mlp.down_proj.weight)
    optimizer = torch.optim.Adam(block.router.parameters(), lr=3e-2)
    for _ in range(60):
        tokens = torch.randn(4, 64, WIDTH)
        marked = torch.zeros(4, 64, dtype=torch.bool).scatter_(1, torch.rand(4, 64).topk(8).indices, True)
        tokens[..., 0] = marked * 4.0 - 2.0
        with torch.no_grad():
            target = marked[..., None] * block.heavy_mlp(block.heavy_norm(tokens))
        optimizer.zero_grad()
        (block(tokens) - target).square().sum().backward()
        optimizer.step()
    found = block.router(tokens, 8).indices[:, 0]
    assert marked.gather(1, found).float().mean() > 0.95


def test_blocks_and_parts_of_a_vision_transformer():
    block = RoutedTransformerBlock(
        WIDTH,
        attention={"light_heads": 2, "heavy_heads": 2},
        feed_forward={"light_intermediate_size": 16, "heavy_intermediate_size": 64},
    ).double()
    tokens = states(2)
    with torch.no_grad():
        middle = tokens + block.self_attn(tokens)
        close(block(tokens), middle + block.mlp(middle))
    images = torch.randn(2, 3, 16, 24)
    maps = PatchEmbedding(4, 3, WIDTH)(images)
    assert maps.shape == (2, 4, 6, WIDTH)
    positions = sincos_positions(4, 6, WIDTH)
    close(positions[2, 3, :8], torch.sin(3 * 10000 ** (-torch.arange(8) / 7)))
    close(positions[2, 3, 24:], torch.cos(2 * 10000 ** (-torch.arange(8) / 7)))
    block = RoutedImageBlock(
        WIDTH,
        attention={"window_size": 2},
        feed_forward={"light_intermediate_size": 16, "heavy_intermediate_size": 64},
    )
    assert block(maps + positions).shape == maps.shape


def test_numbers_of_tokens():
    lengths = torch.tensor([0, 1, 15, 16, 17])
    assert tokens_for(1 / 16, lengths).tolist() == [tokens_for(1 / 16, int(n)) for n in lengths] == [0, 1, 1, 1, 2]
    assert tokens_for(4, lengths).tolist() == [tokens_for(4, int(n)) for n in lengths] == [0, 1, 4, 4, 4]


@pytest.mark.parametrize("number", [0, -1, 0.0, 1.5, True])
def test_bad_numbers_of_tokens(number):
    with pytest.raises(ValueError, match="num_routed_queries must be a number of tokens.*or a fraction"):
        RoutedAttention(WIDTH, num_routed_queries=number)


def test_bad_input():
    with pytest.raises(ValueError, match=r"attention_mask must have shape \(3, 40\).*got \(3, 39\)"):
        attention()(states(), masks(3, 3, 3, total=39))
    with pytest.raises(ValueError, match=r"num_key_value_sets must divide num_heads \(4\), got 3"):
        attention(num_key_value_sets=3)
    with pytest.raises(ValueError, match="that 4 divides, got 6 and 8"):
        image_attention()(states(1, 48).view(1, 6, 8, WIDTH))
