"""linear_attention through its Triton kernels, forward: the definition, options, layouts, isolation, refusals.

Runs under Triton's interpreter where there is no GPU. Run: pytest tests/test_linear_attention_triton.py -k causal
"""

import pytest
import torch
from kernel_device import INTERPRETED
from linear_attention_cases import (
    MAPS,
    assert_like_eager,
    make_inputs,
    make_map,
    random_mask,
    reference,
    true_sums,
)
from linear_attention_triton_cases import (
    in_double,
    on_device,
    plain_computations,
    tensor_core_products,  # noqa: F401
    triton_attention,
)

from hf_efficient.kernels.linear_attention import FeatureMap, LinearAttentionState, linear_attention
from hf_efficient.kernels.linear_attention.feature_maps import key_features
from hf_efficient.kernels.linear_attention.launch_plan import MapTensors
from hf_efficient.kernels.linear_attention.triton_states import normalizers


pytest.importorskip("triton")
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
every_map = pytest.mark.parametrize("name", MAPS)
# One head and one row of the batch are a program each: what they share is tested once.
SMALL = {"batch": 1, "heads": 1}


def earlier_state(name, feature_map, head_dim=8, value_dim=5, batch=1, heads=1):
    """What eleven keys leave behind."""
    inputs = make_inputs(name, 11, head_dim, value_dim, batch=batch, heads=heads)
    return reference(*inputs, feature_map)[1]


def assert_output_and_state(actual, inputs, feature_map, causal, mask=None, state=None):
    dtype = inputs[0].dtype
    *exact, exact_state = in_double(*inputs, feature_map, state)
    oracle, oracle_state = reference(*exact, causal=causal, mask=mask, state=exact_state)
    options = {"causal": causal, "mask": mask, "state": state}
    eagers = [function(*inputs, feature_map, **options)[0] for function in plain_computations(dtype, False)]
    assert_like_eager(actual[0], oracle, eagers, "output")
    states = [function(*inputs, feature_map, **options)[1] for function in plain_computations(dtype, True)]
    assert all(part.dtype == torch.float32 for part in actual[1])
    assert actual[1].log_scale.shape == oracle_state.log_scale.shape
    for part in ("key_value", "key_sum"):
        eagers = [getattr(state, part) for state in states]
        assert_like_eager(getattr(actual[1], part), getattr(oracle_state, part), eagers, part)
    # A scale by itself is one number, whose error is luck: it has to be right together with the sums.
    for part, found, exact_sum, *eagers in zip("SZ", *map(true_sums, (actual[1], oracle_state, *states)), strict=True):
        assert_like_eager(found.float(), exact_sum, [eager.float() for eager in eagers], f"{part} to scale")


@pytest.mark.parametrize("name", [name for name in MAPS if MAPS[name][0] == "exponential"])
def test_scales_of_keys(name, nan_poisoned):
    key = make_inputs(name, 70, 20, **SMALL)[1]
    feature_map = make_map(name, 20)
    found = normalizers(on_device(key), MapTensors.of(on_device(feature_map), on_device(key)), None, is_key=True)[1]
    exact = key_features(key.double(), feature_map.to(torch.float64))[1]
    eagers = [key_features(key, feature_map)[1]]
    for _ in range(6):
        channels, features = torch.randperm(20), torch.randperm(feature_map.num_features(20))
        shuffled = feature_map._replace(
            projection=None if feature_map.projection is None else feature_map.projection[features][:, channels],
            bias=None if feature_map.bias is None else feature_map.bias[features],
        )
        if feature_map.projection is not None or feature_map.bias is None:
            eagers.append(key_features(key[..., channels], shuffled)[1])
    assert_like_eager(found.cpu(), exact, eagers, "scales")


@every_map
@causal_or_not
@pytest.mark.parametrize("masked", [False, True], ids=["all-keys", "masked-after-a-state"])
def test_every_map(name, causal, masked, nan_poisoned):
    """Three chunks with a ragged tail, two tiles of features; then the same with a mask and a state."""
    inputs = make_inputs(name, 37, keys=37 if causal else 21, **SMALL)
    feature_map = make_map(name, 8)
    mask = random_mask(1, inputs[1].shape[2]) if masked else None
    state = earlier_state(name, feature_map) if masked else None
    actual = triton_attention(*inputs, feature_map, causal=causal, mask=mask, state=state)
    assert_output_and_state(actual, inputs, feature_map, causal, mask, state)


@pytest.mark.parametrize("name", ["softmax", "optimal-positive", "relu", "identity-of-inputs"])
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_low_precision(name, causal, dtype, tensor_core_products, nan_poisoned):  # noqa: F811
    """Products that round as tensor cores do, with twice the usual norms: where a careless exponent shows."""
    inputs = make_inputs(name, 53, head_dim=20, value_dim=12, dtype=dtype, **SMALL)
    if name == "softmax":
        inputs = (*(2 * t for t in inputs[:2]), inputs[2])
    feature_map = make_map(name, 20)
    actual = triton_attention(*inputs, feature_map, causal=causal)
    assert actual[0].dtype == dtype
    assert_output_and_state(actual, inputs, feature_map, causal)


# The last is longer than what is unrolled.
SIZES = [(40, 20, 24), (16, 48, 40), (3, 1, 1), (1, 7, 5), (64, 8, 70), (24, 8, 32), (136, 7, 20)]


@pytest.mark.parametrize("head_dim, value_dim, features", SIZES)
@causal_or_not
def test_any_sizes(head_dim, value_dim, features, causal, nan_poisoned):
    """Several tiles of head size, values and features, ragged each."""
    inputs = make_inputs("softmax", 35, head_dim, value_dim, **SMALL)
    feature_map = make_map("softmax", head_dim, features=features)
    assert_output_and_state(triton_attention(*inputs, feature_map, causal=causal), inputs, feature_map, causal)


@pytest.mark.parametrize("name", ["softmax-large-epsilon", "optimal-positive", "gelu", "identity-of-inputs"])
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_features_that_fill_their_tiles(name, causal, dtype, tensor_core_products, nan_poisoned):  # noqa: F811
    """None is masked then; rows behind the end still are."""
    inputs = make_inputs(name, 37, head_dim=16, dtype=dtype, **SMALL)
    feature_map = make_map(name, 16, features=32)
    assert_output_and_state(triton_attention(*inputs, feature_map, causal=causal), inputs, feature_map, causal)


@causal_or_not
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 33])
def test_any_length(causal, length, nan_poisoned):
    inputs = make_inputs("softmax", length, keys=length if causal else 18, batch=1, heads=2)
    feature_map = make_map("softmax", 8)
    state = earlier_state("softmax", feature_map, heads=2)
    actual = triton_attention(*inputs, feature_map, causal=causal, state=state)
    assert_output_and_state(actual, inputs, feature_map, causal, state=state)


@causal_or_not
def test_nothing_to_attend_from(causal):
    query, key, value = make_inputs("softmax", 0, keys=0 if causal else 9)
    output, state = triton_attention(query, key, value, make_map("softmax", 8), causal=causal)
    assert output.shape == (2, 3, 0, 5)
    assert state.key_sum.any() != causal


def test_no_keys_and_reading_a_state(nan_poisoned):
    query, key, value = make_inputs("softmax", 18, keys=0, **SMALL)
    feature_map = make_map("softmax", 8)
    state = earlier_state("softmax", feature_map)
    *exact, exact_state = in_double(query, key, value, feature_map, state)
    oracle = reference(*exact, state=exact_state)[0]
    eager = reference(query, key, value, feature_map, state=state)[0]
    for key_and_value in ((key, value), (None, None)):
        output, unchanged = triton_attention(query, *key_and_value, feature_map, state=state)
        assert_like_eager(output, oracle, [eager], "output")
        assert all(torch.equal(a, b) for a, b in zip(unchanged, state, strict=True))
    nothing, _ = triton_attention(query, key, value, feature_map)
    assert not nothing.any()


@causal_or_not
def test_strides_and_views(causal):
    """Transposed, expanded and sliced inputs are read where they lie."""
    feature_map = make_map("softmax", 8)
    query, key, value = (t.transpose(1, 2) for t in torch.randn(1, 19, 3, 2, 8).unbind(2))
    mask = random_mask(19, 2).T[:1]
    mask[:, 0] = True
    views = {
        "transposed": (query, key, value),
        "heads expanded": (query, key[:, :1].expand(-1, 2, -1, -1), value[:, :1].expand(-1, 2, -1, -1)),
        "every second token": tuple(t.repeat_interleave(2, 2)[:, :, ::2] for t in (query, key, value)),
        "channels reversed in memory": tuple(t.mT.contiguous().mT for t in (query, key, value)),
        "length expanded": (query[:, :, :1].expand(-1, -1, 19, -1), key, value),
    }
    for name, inputs in views.items():
        assert any(not t.is_contiguous() for t in inputs), name
        viewed = triton_attention(*inputs, feature_map, causal=causal, mask=mask)
        copied = triton_attention(
            *(t.contiguous() for t in inputs), feature_map, causal=causal, mask=mask.contiguous()
        )
        if INTERPRETED:  # a GPU adds up in an order that depends on how the tiles lie in memory
            for view, copy in zip((viewed[0], *viewed[1]), (copied[0], *copied[1]), strict=True):
                assert torch.equal(view, copy), name
        assert_output_and_state(viewed, inputs, feature_map, causal, mask)


@pytest.mark.parametrize("name", ["softmax", "relu"])
@pytest.mark.parametrize("size", [0.0, 1e15], ids=["zero", "1e15"])
def test_causal_means_causal_to_the_bit(name, size):
    inputs = make_inputs(name, 37, **SMALL)
    feature_map = make_map(name, 8)
    expected, _ = triton_attention(*inputs, feature_map, causal=True)
    for token in (1, 16, 30):
        perturbed = [t.clone() for t in inputs]
        for tensor in perturbed:
            tensor[:, :, token:] = size * torch.randn_like(tensor[:, :, token:])
        actual, _ = triton_attention(*perturbed, feature_map, causal=True)
        assert torch.equal(actual[:, :, :token], expected[:, :, :token]), f"token {token}"
        assert not torch.equal(actual[:, :, token:], expected[:, :, token:])


@pytest.mark.parametrize("sizes", [[17, 18], [16, 16, 3], [3, 1, 30, 1]], ids=str)
@pytest.mark.parametrize("name", ["softmax", "relu"])
def test_any_split_is_the_whole(name, sizes):
    """The parts of length one go through the kernel of decoding."""
    inputs = make_inputs(name, 35, **SMALL)
    feature_map = make_map(name, 8)
    mask = random_mask(1, 35)
    outputs, state, start = [], None, 0
    for size in sizes:
        here = slice(start, start + size)
        parts = (t[:, :, here] for t in inputs)
        output, state = triton_attention(*parts, feature_map, causal=True, mask=mask[:, here], state=state)
        outputs.append(output)
        start += size
    assert_output_and_state((torch.cat(outputs, dim=2), state), inputs, feature_map, True, mask)


@every_map
def test_decoding_step_is_the_recurrence(name, nan_poisoned):
    """Two rows of a batch, of which one's token is masked, with a value that is no number there."""
    inputs = make_inputs(name, 1, 20, 18, heads=2)
    feature_map = make_map(name, 20)
    state = earlier_state(name, feature_map, 20, 18, batch=2, heads=2)
    mask = torch.tensor([[1], [0]])
    poisoned = (inputs[0], *(torch.where(mask[:, None, None].bool(), t, float("nan")) for t in inputs[1:]))
    actual = triton_attention(*poisoned, feature_map, causal=True, mask=mask, state=state)
    assert_output_and_state(actual, inputs, feature_map, True, mask, state)
    assert all(torch.equal(a[1], b[1]) for a, b in zip(actual[1], state, strict=True))


def test_decoding_from_nothing_to_a_few_tokens():
    inputs = make_inputs("softmax", 4, **SMALL)
    feature_map = make_map("softmax", 8)
    state, outputs = None, []
    for token in range(4):
        here = (t[:, :, token : token + 1] for t in inputs)
        output, state = triton_attention(*here, feature_map, causal=True, state=state)
        outputs.append(output)
    assert_output_and_state((torch.cat(outputs, dim=2), state), inputs, feature_map, True)


@causal_or_not
def test_padding_is_not_read(causal):
    """Whatever stands at masked positions, numbers or not: the result has the same bits."""
    inputs = make_inputs("softmax", 25, batch=2, heads=1)
    feature_map = make_map("softmax", 8)
    mask = torch.ones(2, 25, dtype=torch.long)
    mask[0, :20] = 0
    mask[1] = 0
    results = []
    for filling in (0.0, float("inf"), float("nan")):
        filled = (inputs[0], *(torch.where(mask[:, None, :, None] == 0, filling, t) for t in inputs[1:]))
        results.append(triton_attention(*filled, feature_map, causal=causal, mask=mask))
    for output, state in results[1:]:
        assert torch.equal(output, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(state, results[0][1], strict=True))
    output, state = results[0]
    assert not output[1].any() and not state.key_value[1].any() and not state.key_sum[1].any()
    assert output[0, :, 20:].all() and output[0, :, :20].any() != causal
    boolean = triton_attention(*inputs, feature_map, causal=causal, mask=mask.bool())[0]
    assert torch.equal(boolean, output)


@pytest.mark.parametrize("norm", [1e-20, 40.0, 3e3])
@causal_or_not
def test_extreme_inputs(norm, causal):
    """exp(w·x - |x|²/2) leaves float32 at |x'| ≈ 13; the result must not notice."""
    query, key, value = make_inputs("softmax", 37, **SMALL)
    size = norm * torch.rand(1, 1, 37, 1) * 8**0.25 / 8**0.5
    inputs = (query * size, key * size.flip(2), value)
    feature_map = make_map("softmax", 8)
    actual = triton_attention(*inputs, feature_map, causal=causal)
    assert_output_and_state(actual, inputs, feature_map, causal)
    assert (actual[0].abs() <= value.abs().amax(dim=2, keepdim=True) * 1.0001).all()


@pytest.mark.skipif(not INTERPRETED, reason="a GPU may take products so small for zero")
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=["fp16", "fp32"])
def test_denominators_below_the_normal_numbers(dtype, causal):
    """One over such a number is infinite; the quotient of two of them is not."""
    inputs = torch.full((1, 1, 5, 8), -47.0, dtype=dtype)
    value = torch.linspace(-1, 1, 5, dtype=dtype)[:, None].expand(1, 1, 5, 3)
    feature_map = FeatureMap("elu_plus_one", None, None, 1.0, 0.0, True)
    output, _ = triton_attention(inputs, inputs, value, feature_map, causal=causal)
    mean = (value.float().cumsum(2) / torch.arange(1, 6)[:, None]) if causal else value.float().mean(2, keepdim=True)
    assert torch.allclose(output.float(), mean.expand_as(output), atol=1e-3)


@causal_or_not
@pytest.mark.parametrize("features", [24, 32])
def test_a_bias_beyond_what_an_exponential_holds(features, causal):
    """Rows behind the end of the last chunk have nothing but the bias."""
    inputs = make_inputs("optimal-positive", 20, **SMALL)
    feature_map = make_map("optimal-positive", 8, features=features)
    feature_map = feature_map._replace(bias=feature_map.bias + 95)
    output, state = triton_attention(*inputs, feature_map, causal=causal)
    *exact, _ = in_double(*inputs, feature_map, None)
    oracle = reference(*exact, causal=causal)[0]
    eagers = [
        function(*inputs, feature_map, causal=causal)[0] for function in plain_computations(torch.float32, False)
    ]
    assert_like_eager(output, oracle, eagers, "output")
    assert all(part.isfinite().all() for part in state)


@pytest.mark.parametrize("backend", ["eager", "triton"])
@pytest.mark.parametrize("length", [1, 5])
def test_state_updated_in_place(backend, length):
    inputs = on_device(tuple(make_inputs("softmax", length, heads=2)))
    feature_map = make_map("softmax", 8)
    state = on_device(earlier_state("softmax", feature_map, batch=2, heads=2))
    feature_map = on_device(feature_map)
    options = {"causal": True, "backend": backend}
    fresh, new_state = linear_attention(*inputs, feature_map, state=state, **options)
    parts = list(state)
    output, returned = linear_attention(*inputs, feature_map, state=state, update_state_in_place=True, **options)
    assert torch.equal(output, fresh)
    for part, same, expected in zip(parts, returned, new_state, strict=True):
        assert part is same and torch.equal(part, expected)
    # A state that is spread over other memory is updated there.
    spread = LinearAttentionState(*(torch.stack([part, part], dim=-1)[..., 0] for part in parts))
    linear_attention(*inputs, feature_map, state=spread, update_state_in_place=True, **options)
    expected = linear_attention(*inputs, feature_map, state=LinearAttentionState(*parts), **options).state
    assert all(torch.equal(a, b) for a, b in zip(spread, expected, strict=True))


def test_in_place_is_refused_where_it_would_hurt():
    inputs = [t.requires_grad_() for t in make_inputs("softmax", 1, **SMALL)]
    feature_map = make_map("softmax", 8)
    for state in (None, earlier_state("softmax", feature_map)):
        with pytest.raises(ValueError, match="update_state_in_place needs a state, and tensors that require no grad"):
            linear_attention(*inputs, feature_map, causal=True, state=state, update_state_in_place=True)


def test_what_the_kernels_do_not_serve_is_refused():
    feature_map = make_map("softmax", 8)
    with pytest.raises(RuntimeError, match="linear_attention has no Triton kernels for torch.float64"):
        linear_attention(*make_inputs("softmax", 5, dtype=torch.float64), feature_map, backend="triton")
    with pytest.raises(RuntimeError, match="no Triton kernels for heads or values of size 0"):
        linear_attention(*make_inputs("softmax", 5, value_dim=0), feature_map, backend="triton")
    automatic = linear_attention(*make_inputs("softmax", 5, dtype=torch.float64), feature_map).output
    assert automatic.dtype == torch.float64
