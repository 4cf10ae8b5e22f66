"""linear_attention compiled: shipped configurations, bfloat16; and, on a GPU, more than 2³¹ elements, large grids.

Run: HF_EFFICIENT_COMPILED_FOR=sm_90 pytest tests/test_linear_attention_triton_gpu.py, or on a GPU
"""

import pytest
import torch
from linear_attention_cases import all_gradients, assert_like_eager, doubled, make_map
from linear_attention_triton_cases import DEVICE, quadratic_with_rounded_products, record_launches

from hf_efficient.kernels.linear_attention import FeatureMap, LinearAttentionState, linear_attention


causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def triton_attention(*arguments, **options):
    return linear_attention(*arguments, backend="triton", **options)


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("head_dim, features", [(64, 256), (64, 266), (128, 256), (128, None), (256, 40), (300, 70)])
@causal_or_not
def test_shipped_configurations(dtype, head_dim, features, causal, nan_poisoned):
    """Output and every gradient, each row of the launch tables, ragged tails, against float64."""
    assert_output_and_gradients(dtype, head_dim, features, causal, (2, 3, 333))


@pytest.mark.compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("head_dim, features", [(64, 256), (128, None)])
@causal_or_not
def test_a_walk_shared_by_several_programs(dtype, head_dim, features, causal, nan_poisoned, monkeypatch):
    """A sequence so long, and heads so few, that the walk along it is cut into segments."""
    launches = record_launches(monkeypatch)
    if DEVICE == "cpu":  # as many as a GPU has
        count = "hf_efficient.kernels.linear_attention.triton_segments.multiprocessor_count"
        monkeypatch.setattr(count, lambda tensor: 132)
    assert_output_and_gradients(dtype, head_dim, features, causal, (1, 2, 3001))
    assert {reverse for _, reverse in launches} == {False, True}


def assert_output_and_gradients(dtype, head_dim, features, causal, sizes):
    """Within the budget of plain computations; `sizes` are those of batch, heads and length.

    Low precision is judged by four draws together: in one of four the largest error of a projection's gradient was 2.2
    times the largest of the plain computation, in the others 0.8 to 1.3 times, with every configuration alike.
    """
    torch.set_default_device(DEVICE)
    try:
        draws = []
        for draw in range(1 if dtype == torch.float32 else 4):
            torch.manual_seed(draw)
            draws.append(compute(dtype, head_dim, features, causal, sizes))
        for part in draws[0]:
            actual, exact, *plain = (torch.stack(ways) for ways in zip(*(found[part] for found in draws), strict=True))
            assert_like_eager(actual, exact, plain, part)
    finally:
        torch.set_default_device(None)


def compute(dtype, head_dim, features, causal, sizes):
    """Output and every gradient by name: through the kernels, in float64, and plainly."""
    name = "identity-of-inputs" if features is None else "softmax"
    query, key, value = (torch.randn(*sizes, head_dim) for _ in range(3))
    if features is None:
        query, key = query.abs() + 0.1, key.abs() + 0.1
    inputs = [t.to(dtype) for t in (query, key, value)]
    feature_map = make_map(name, head_dim, features=features)
    state = LinearAttentionState.empty(*sizes[:2], feature_map.num_features(head_dim), head_dim, device=DEVICE)
    weights = [torch.randn_like(inputs[2]), *(0 * part for part in state[:2])]
    exact = (*doubled(*inputs, feature_map), LinearAttentionState(*doubled(*state)))

    def eager(*arguments, **options):
        return linear_attention(*arguments, backend="eager", **options)

    found = {
        "output": [
            triton_attention(*inputs, feature_map, causal=causal).output,
            eager(*exact[:4], causal=causal).output,
            eager(*inputs, feature_map, causal=causal).output,
        ]
    }
    given = *inputs, feature_map, state, weights
    ways = [
        all_gradients(triton_attention, *given, causal=causal),
        all_gradients(eager, *exact, list(doubled(*weights)), causal=causal),
        *(all_gradients(way, *given, causal=causal) for way in (eager, quadratic_with_rounded_products)),
    ]
    return found | {part: [gradients[part] for gradients in ways] for part in ways[1]}


@pytest.mark.gpu
def test_more_than_two_to_the_31_elements():
    """The end of a sequence of which the rows before would overflow 32 bits, against a continuation from a state."""
    length, tail = 2**24 + 96, 64
    feature_map = FeatureMap("elu_plus_one")
    query = torch.randn(1, 1, 4096, 128, device="cuda", dtype=torch.bfloat16)
    inputs = [query.repeat(1, 1, length // 4096 + 1, 1)[:, :, :length] for _ in range(3)]
    assert inputs[0].numel() > 2**31
    with torch.no_grad():
        whole, end = triton_attention(*inputs, feature_map, causal=True)
        _, state = triton_attention(*(t[:, :, :-tail] for t in inputs), feature_map, causal=True)
        last = (t[:, :, -tail:] for t in inputs)
        expected, expected_end = linear_attention(*last, feature_map, causal=True, state=state, backend="eager")
    torch.testing.assert_close(whole[:, :, -tail:], expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(end.key_sum, expected_end.key_sum, rtol=1e-4, atol=0)


@pytest.mark.gpu
@causal_or_not
def test_more_rows_than_a_grid_has_in_its_second_axis(causal):
    feature_map = make_map("softmax", 16)
    feature_map = feature_map._replace(projection=feature_map.projection.cuda())
    inputs = [torch.randn(70_000, 1, 2, 16, device="cuda", requires_grad=True) for _ in range(3)]
    results = []
    for backend in ("triton", "eager"):
        output, _ = linear_attention(*inputs, feature_map, causal=causal, backend=backend)
        results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        one = [t[:, :, :1] for t in inputs]
        steps = [linear_attention(*one, feature_map, causal=True, backend=b).output for b in ("triton", "eager")]
    torch.testing.assert_close(*steps, rtol=1e-4, atol=1e-5)
