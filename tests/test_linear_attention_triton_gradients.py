"""linear_attention through its Triton kernels: every gradient, its inputs' layouts, isolation, the compiler.

Runs under Triton's interpreter where there is no GPU. Run: pytest tests/test_linear_attention_triton_gradients.py
"""

import pytest
import torch
from kernel_device import INTERPRETED
from linear_attention_cases import (
    MAPS,
    all_gradients,
    assert_like_eager,
    doubled,
    make_inputs,
    make_map,
    random_mask,
    reference,
)
from linear_attention_triton_cases import (
    DEVICE,
    on_device,
    plain_computations,
    tensor_core_products,  # noqa: F401
    triton_attention,
)

from hf_efficient.kernels.linear_attention import FeatureMap, LinearAttentionState, linear_attention


pytest.importorskip("triton")
causal_or_not = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
SMALL = {"batch": 1, "heads": 1}


def make_case(
    name, length, dtype=torch.float32, causal=True, head_dim=8, value_dim=5, batch=1, heads=1, features=None
):
    """Inputs, feature map, an earlier state and the weights of the loss; a bidirectional case has other keys."""
    keys = length if causal else length + 9
    query, key, value = make_inputs(name, length, head_dim, value_dim, keys, batch, heads, dtype)
    feature_map = make_map(name, head_dim, features=features)
    state = reference(*make_inputs(name, 11, head_dim, value_dim, batch=batch, heads=heads), feature_map)[1]
    weights = [torch.randn(*query.shape[:3], value_dim).to(dtype)]
    weights += [torch.randn_like(sums) / (length + 11) for sums in state[:2]]
    return query, key, value, feature_map, state, weights


def assert_gradients(case, **options):
    """Each gradient of the output, then each of the final sums: theirs are larger and would hide other errors."""
    *arguments, state, weights = case
    dtype = arguments[0].dtype
    exact_state = LinearAttentionState(*doubled(*state))
    for of in ("output", "state"):
        kept = [w if (index == 0) == (of == "output") else 0 * w for index, w in enumerate(weights)]
        oracle = all_gradients(reference, *doubled(*arguments), exact_state, list(doubled(*kept)), **options)
        actual = all_gradients(triton_attention, *arguments, state, kept, **options)
        assert actual.keys() == oracle.keys() >= {"query", "key", "value", "key_value", "key_sum"}
        plain = {
            of_sums: [
                all_gradients(function, *arguments, state, kept, **options)
                for function in plain_computations(dtype, of_sums)
            ]
            for of_sums in (False, True)
        }
        for part in oracle:
            eagers = [found[part] for found in plain[part not in ("query", "key", "value")]]
            assert_like_eager(actual[part], oracle[part], eagers, f"of {of}: {part}")


@pytest.mark.parametrize("name", MAPS)
@causal_or_not
def test_every_map(name, causal, nan_poisoned):
    """Two chunks with a ragged tail, two tiles of features, a mask and a state; projection and bias too."""
    case = make_case(name, 19, causal=causal, heads=2)
    assert_gradients(case, causal=causal, mask=random_mask(1, case[1].shape[2]))


@pytest.mark.parametrize("name", ["softmax", "relu", "identity-of-inputs"])
@causal_or_not
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_low_precision(name, causal, dtype, tensor_core_products, nan_poisoned):  # noqa: F811
    assert_gradients(make_case(name, 35, dtype, causal, head_dim=20), causal=causal)


@pytest.mark.parametrize("name", ["softmax-large-epsilon", "gelu", "elu_plus_one"])
@causal_or_not
def test_several_tiles_of_everything(name, causal, nan_poisoned):
    """Head size, values and features over two tiles each, two rows of a batch."""
    assert_gradients(make_case(name, 17, causal=causal, head_dim=18, value_dim=20, batch=2), causal=causal)


@pytest.mark.parametrize("head_dim, value_dim", [(136, 5), (8, 132)], ids=["head", "values"])
@causal_or_not
def test_heads_and_values_longer_than_what_is_unrolled(head_dim, value_dim, causal, nan_poisoned):
    case = make_case("softmax-large-epsilon", 19, causal=causal, head_dim=head_dim, value_dim=value_dim, features=20)
    assert_gradients(case, causal=causal)


@pytest.mark.parametrize("name", ["softmax-large-epsilon", "optimal-positive", "gelu", "identity-of-inputs"])
@causal_or_not
def test_features_that_fill_their_tiles(name, causal, nan_poisoned):
    """Neither features nor, without a mask, gradients of logits are masked then; rows behind the end still are."""
    assert_gradients(make_case(name, 19, causal=causal, head_dim=16, features=32), causal=causal)


@causal_or_not
def test_a_bias_beyond_what_an_exponential_holds(causal):
    """Rows behind the end of the last chunk have nothing but the bias, and no part in any gradient."""
    *rest, feature_map, state, weights = make_case("optimal-positive", 20, causal=causal, head_dim=16, features=32)
    feature_map = feature_map._replace(bias=feature_map.bias + 95)
    # Beside such keys a state of the usual scale would count as little as a GPU takes for zero.
    state = state._replace(log_scale=state.log_scale + 95)
    assert_gradients((*rest, feature_map, state, weights), causal=causal)


@pytest.mark.skipif(not INTERPRETED, reason="a GPU may take products so small for zero")
@causal_or_not
@pytest.mark.parametrize("sign", [1, -1])
def test_a_gradient_of_zero_over_a_subnormal_denominator(sign, causal):
    """It is zero, not what zero times infinity is."""
    leaves = [torch.full((1, 1, 5, 8), size, requires_grad=True) for size in (sign * 3e-21, 1e-20, 1.0)]
    output, _ = triton_attention(*leaves, FeatureMap("identity", None, None, 1.0, 0.0, True), causal=causal)
    assert torch.allclose(output, torch.ones_like(output), atol=1e-3)
    for gradient in torch.autograd.grad((0 * output).sum(), leaves):
        assert not gradient.any()


@causal_or_not
@pytest.mark.parametrize("length", [1, 16])
def test_one_chunk_and_one_row(causal, length, nan_poisoned):
    assert_gradients(make_case("softmax", length, causal=causal), causal=causal)


@causal_or_not
def test_strides_and_expanded_gradients(causal):
    """Transposed inputs, keys that all heads share, and the stride-0 gradient of a sum."""
    feature_map = make_map("softmax", 8)
    query, key, value = (t.transpose(1, 2) for t in torch.randn(1, 19, 3, 2, 8).unbind(2))
    shared = (query, *(t[:, :1].expand(-1, 2, -1, -1) for t in (key, value)))
    gradients = []
    for inputs in (shared, [t.contiguous() for t in shared]):
        leaves = [t.detach().requires_grad_() for t in inputs]
        output, _ = triton_attention(*leaves, feature_map, causal=causal)
        gradients.append(torch.autograd.grad(output.sum(), leaves))
    for viewed, copied in zip(*gradients, strict=True):
        if INTERPRETED:  # a GPU adds up in an order that depends on how the tiles lie in memory
            assert torch.equal(viewed, copied)
        torch.testing.assert_close(viewed, copied, rtol=1e-4, atol=1e-5)
        assert viewed.any()


@causal_or_not
@pytest.mark.parametrize("wanted", ["query", "value", "key_sum", "projection", "bias"])
def test_gradient_of_one_thing_alone(causal, wanted):
    case = make_case("optimal-positive", 17, causal=causal)
    expected = all_gradients(triton_attention, *case, causal=causal)[wanted]
    query, key, value, feature_map, state, weights = case
    tensors = {"query": query, "value": value, "key_sum": state.key_sum}
    tensors |= {"projection": feature_map.projection, "bias": feature_map.bias}
    leaf = tensors[wanted].detach().clone().requires_grad_()
    tensors[wanted] = leaf
    output, new_state = triton_attention(
        tensors["query"],
        key,
        tensors["value"],
        feature_map._replace(projection=tensors["projection"], bias=tensors["bias"]),
        state=state._replace(key_sum=tensors["key_sum"]),
        causal=causal,
    )
    loss = sum((t * w).sum() for t, w in zip((output, *new_state[:2]), weights, strict=True))
    assert torch.equal(torch.autograd.grad(loss, leaf)[0], expected)


@pytest.mark.parametrize("name", ["softmax", "relu"])
@pytest.mark.parametrize("row", [0, 15, 20])
def test_no_gradient_from_the_future(name, row):
    inputs = [t.requires_grad_() for t in make_inputs(name, 35, **SMALL)]
    output, _ = triton_attention(*inputs, make_map(name, 8), causal=True)
    for gradient in torch.autograd.grad(output[:, :, : row + 1].square().sum(), inputs):
        assert not gradient[:, :, row + 1 :].any()


@causal_or_not
def test_padding_has_no_gradient_and_gives_none(causal):
    feature_map = make_map("softmax", 8)
    inputs = make_inputs("softmax", 35, **SMALL)
    mask = random_mask(1, 35)
    gradients = []
    for filling in (0.0, float("nan")):
        filled = [inputs[0], *(torch.where(mask[:, None, :, None], t, filling) for t in inputs[1:])]
        leaves = [t.requires_grad_() for t in filled]
        output, _ = triton_attention(*leaves, feature_map, causal=causal, mask=mask)
        gradients.append(torch.autograd.grad(output.square().sum(), leaves))
    for first, second in zip(*gradients, strict=True):
        assert torch.equal(first, second)
    for gradient in gradients[0][1:]:
        assert not gradient[:, :, ~mask[0]].any() and gradient[:, :, mask[0]].any()


def test_gradients_flow_through_a_state_to_earlier_calls():
    """Split calls have the gradients of one call; a part of length one with gradients is no decoding step."""
    query, key, value, feature_map, *_ = make_case("softmax", 20)
    gradients = []
    for sizes in ([20], [3, 16, 1]):
        leaves = [t.clone().requires_grad_() for t in (query, key, value)]
        outputs, state, start = [], None, 0
        for size in sizes:
            here = slice(start, start + size)
            parts = (t[:, :, here] for t in leaves)
            output, state = triton_attention(*parts, feature_map, causal=True, state=state)
            outputs.append(output)
            start += size
        loss = (torch.cat(outputs, dim=2) * torch.linspace(-1, 1, 20)[:, None]).sum()
        gradients.append(torch.autograd.grad(loss, leaves))

    def attend(query, key, value):
        return (
            reference(query, key, value, feature_map.to(query.dtype), causal=True)[0]
            * torch.linspace(-1, 1, 20)[:, None].to(query.dtype)
        ).sum()

    exact = [t.double().requires_grad_() for t in (query, key, value)]
    plain = [t.clone().requires_grad_() for t in (query, key, value)]
    oracle, eager = (torch.autograd.grad(attend(*leaves), leaves) for leaves in (exact, plain))
    for index, part in enumerate(("query", "key", "value")):
        for found in gradients:
            assert_like_eager(found[index], oracle[index], [eager[index], gradients[0][index]], part)


def operator_arguments(causal, requires_grad, cu_seqlens=None):
    query, key, value, feature_map, state = on_device(make_case("optimal-positive", 18, causal=causal)[:5])
    tensors = (query, key, value, state.key_value, state.key_sum, feature_map.projection, feature_map.bias)
    for tensor in tensors:
        tensor.requires_grad_(requires_grad)
    function, projection, bias, *options = feature_map
    mask = on_device(random_mask(1, key.shape[2]))
    return (query, key, value, *state, mask, projection, bias, cu_seqlens, function, *options, causal)


@causal_or_not
def test_operators(causal):
    forward = torch.ops.hf_efficient.linear_attention_triton_forward.default
    torch.library.opcheck(forward, operator_arguments(causal, True))
    arguments = operator_arguments(causal, False)
    tensors, options = arguments[:10], arguments[10:]
    outputs = forward(*arguments)
    gradients = [torch.randn_like(t) for t in outputs[:3]]
    # It has no derivative of its own, which is what test_autograd_registration looks for.
    torch.library.opcheck(
        torch.ops.hf_efficient.linear_attention_triton_backward.default,
        (*gradients, *tensors, *outputs, *options, True, True),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


def test_operator_of_decoding():
    arguments = operator_arguments(True, False)
    one_token = [t[:, :, :1] for t in arguments[:3]]
    torch.library.opcheck(
        torch.ops.hf_efficient.linear_attention_triton_decode.default,
        (*one_token, *arguments[3:6], arguments[6][:, :1], *arguments[7:9], *arguments[10:14]),
    )


@pytest.mark.parametrize("length", [1, 18])
def test_compiles_to_one_graph_and_ignores_autocast(length):
    torch.compiler.reset()
    feature_map = on_device(make_map("softmax", 8))
    inputs = [on_device(t).requires_grad_(length > 1) for t in make_inputs("softmax", length, **SMALL)]
    state = on_device(make_case("softmax", 1)[4])

    def attend(query, key, value, in_place=False):
        return linear_attention(
            query, key, value, feature_map, causal=True, state=state, update_state_in_place=in_place, backend="triton"
        )

    expected = attend(*inputs)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        results = [torch.compile(attend, fullgraph=True)(*inputs), attend(*inputs)]
    for output, new_state in results:
        assert torch.equal(output, expected.output)
        assert all(torch.equal(a, b) for a, b in zip(new_state, expected.state, strict=True))
        if length > 1:
            gradients = [torch.autograd.grad(o.sum(), inputs, retain_graph=True) for o in (output, expected.output)]
            assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
        else:
            assert not output.requires_grad
    if length == 1:
        torch.compile(attend, fullgraph=True)(*inputs, in_place=True)
        assert all(torch.equal(a, b) for a, b in zip(state, expected.state, strict=True))
    torch.compiler.reset()
