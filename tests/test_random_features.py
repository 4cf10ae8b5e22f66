"""Random projections: Haar orthogonal, unbiased, of less variance where promised, and reproducible."""

import math

import pytest
import torch
from generation_models import SIZES

from hf_efficient import PerformerConfig, PerformerForCausalLM
from hf_efficient.modeling.feature_redraw import redraw_projections
from hf_efficient.modeling.random_features import draw_projection, optimal_positive_constants


def draw(rows=64, dim=8, **options):
    return draw_projection(rows, dim, **({"seed": 0, "layer_idx": 0, "draw": 0} | options))


def test_rows_are_orthogonal_within_blocks():
    for block in draw(rows=20).split(8):
        gram = block @ block.mT
        assert (gram - torch.diag(gram.diagonal())).abs().max() < 1e-5


def test_orthogonal_blocks_are_haar_distributed():
    # Without the sign fix the diagonal of a block is mostly negative: -0.58 in the mean after scaling at d = 64.
    diagonals = torch.stack([draw(rows=8, draw=i).diagonal() for i in range(2000)])
    assert diagonals.mean(dim=0).abs().max() < 4 / math.sqrt(2000)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_kernel_estimate_is_unbiased_in_every_direction(direction):
    # The original's projections give 1.74 along +ones and 3.58 along -ones for a true value of e.
    x = torch.full((8,), direction / math.sqrt(8), dtype=torch.float64)
    estimates = torch.stack(
        [torch.exp(2 * (draw(draw=i).double() @ x) - x.square().sum()).mean() for i in range(1500)]
    )
    error = estimates.std() / math.sqrt(len(estimates))
    assert abs(estimates.mean() - math.e) < 5 * error
    assert error < 0.05


def test_row_norms():
    assert torch.allclose(draw(scaling="sqrt_dim").norm(dim=1), torch.full((64,), math.sqrt(8)))
    norms = torch.cat([draw(draw=i).square().sum(dim=1) for i in range(200)])
    assert abs(norms.mean() - 8) < 0.2  # chi-square with 8 degrees of freedom: mean 8, standard deviation 4
    assert abs(norms.std() - 4) < 0.2


def test_draws_depend_on_seed_layer_and_count_alone():
    assert torch.equal(draw(), draw())
    for change in ({"seed": 1}, {"layer_idx": 1}, {"draw": 1}):
        assert not torch.equal(draw(), draw(**change))
    torch.manual_seed(123)
    before = torch.get_rng_state()
    draw()
    assert torch.equal(before, torch.get_rng_state()), "drawing must leave the global random state alone"


@pytest.mark.parametrize("pair_norm", [0.5, 4.0, 16.0])
def test_optimal_positive_features_are_unbiased_and_have_the_variance_of_the_theory(pair_norm):
    dim = 4
    a, b = (constant.item() for constant in optimal_positive_constants(dim, torch.tensor(pair_norm).double()))
    assert a < 0 and math.isclose(b, math.sqrt(1 - 4 * a))
    z = torch.zeros(dim, dtype=torch.float64)
    z[0] = math.sqrt(pair_norm)
    rows = torch.randn(400_000, dim, dtype=torch.float64)
    # φ(x)·φ(y) with x + y = z; the factor (1 - 4A)^(d/2) is the D² that cancels in attention.
    terms = (1 - 4 * a) ** (dim / 2) * torch.exp(2 * a * rows.square().sum(dim=1) + b * (rows @ z) - pair_norm / 2)
    assert abs(terms.mean() - 1) < 5 * terms.std() / math.sqrt(len(terms))

    def log_second_moment(a):
        return dim / 2 * math.log(1 + 16 * a**2 / (1 - 8 * a)) + pair_norm / (1 - 8 * a)

    nearby = [log_second_moment(a + step) for step in (-1e-3, 1e-3)]
    assert log_second_moment(a) < min(nearby), "A must minimise the variance"
    assert log_second_moment(a) < log_second_moment(0.0), "and beat the plain positive features (A = 0)"


def test_redraw_comes_every_interval_and_is_counted():
    projections = [torch.zeros(6, 4), torch.zeros(6, 4)]
    forwards, draws = torch.zeros((), dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    changed_at = []
    for step in range(1, 11):
        before = projections[0].clone()
        redraw_projections(projections, forwards, draws, [0, 2], 3, 7, True, "chi")
        if not torch.equal(before, projections[0]):
            changed_at.append(step)
    assert changed_at == [4, 7, 10]  # three forwards with each draw
    assert draws == 3
    for index, projection in zip((0, 2), projections, strict=True):
        assert torch.equal(projection, draw(6, 4, seed=7, layer_idx=index, draw=3))


def test_redraw_in_a_model_only_while_training():
    model = PerformerForCausalLM(PerformerConfig(**SIZES, feature_redraw_interval=2))
    ids = torch.randint(0, 61, (1, 5))
    first = model.model.layers[0].self_attn.projection_matrix.clone()
    model.eval()
    for _ in range(5):
        model(ids)
    assert torch.equal(first, model.model.layers[0].self_attn.projection_matrix)
    model.train()
    for _ in range(3):
        model(ids)
    assert model.model.num_redraws == 1
    assert not torch.equal(first, model.model.layers[0].self_attn.projection_matrix)
    frozen = PerformerForCausalLM(PerformerConfig(**SIZES, feature_redraw_interval=None)).train()
    for _ in range(5):
        frozen(ids)
    assert frozen.model.num_redraws == 0


def test_a_redraw_between_forward_and_backward_changes_no_gradient():
    ids = torch.randint(0, 61, (1, 9))
    gradients = []
    for forwards_between in (0, 3):
        torch.manual_seed(0)
        model = PerformerForCausalLM(PerformerConfig(**SIZES, feature_redraw_interval=2)).train()
        model.gradient_checkpointing_enable()
        loss = model(ids, labels=ids, use_cache=False).loss
        with torch.no_grad():
            for _ in range(forwards_between):
                model(ids, use_cache=False)
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        assert model.model.num_redraws == (1 if forwards_between else 0)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_calibration_measures_the_pairs():
    model = PerformerForCausalLM(PerformerConfig(**SIZES, feature_map="optimal_positive")).eval()
    ids = torch.randint(0, 61, (3, 40))
    attention = model.model.layers[0].self_attn
    seen = {}
    handle = attention.register_forward_pre_hook(lambda m, args: seen.update(x=args[0].detach()))
    model(ids)
    handle.remove()
    query, key = (
        attention.split_heads(p(seen["x"])).transpose(0, 1).flatten(1, 2) for p in (attention.q_proj, attention.k_proj)
    )
    sums = query[:, :, None] + key[:, None, :]  # every pair of a head
    expected = sums.square().sum(-1).mean() * attention.head_dim**-0.5
    model.model.calibrate_features(ids)
    assert torch.allclose(attention.pair_norm, expected, rtol=1e-4)
    with pytest.raises(ValueError, match="optimal_positive"):
        PerformerForCausalLM(PerformerConfig(**SIZES)).model.calibrate_features(ids)
