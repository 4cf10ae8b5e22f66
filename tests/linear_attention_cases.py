"""What the linear attention tests share: the formula written once more, naively, and the feature maps they all run."""

import torch
from helpers import assert_within_budget
from torch import Tensor

from hf_efficient.kernels.linear_attention import FeatureMap, LinearAttentionState, linear_attention
from hf_efficient.kernels.linear_attention.reference import linear_attention_recurrent, linear_attention_reference


# Written out a second time on purpose: a wrong function in the table of the kernel has to show.
POINTWISE = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp(min=0),
    "squared_relu": lambda x: x.clamp(min=0) ** 2,
    "elu_plus_one": lambda x: torch.where(x > 0, x + 1, x.clamp(max=0).exp()),
    "gelu": lambda x: x * torch.distributions.Normal(0.0, 1.0).cdf(x),
    "silu": lambda x: x / (1 + (-x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "softplus": lambda x: x.exp().log1p(),
}

# name -> (function, rows of the projection or None, bias?, epsilon, subtract_norm)
MAPS = {
    "softmax": ("exponential", 24, False, 1e-6, True),
    "softmax-large-epsilon": ("exponential", 24, False, 1e-2, True),
    "softmax-no-epsilon": ("exponential", 24, False, 0.0, True),
    "hyperbolic": ("exponential", 24, False, 1e-6, True),
    "optimal-positive": ("exponential", 24, True, 1e-6, True),
    "without-norm": ("exponential", 24, False, 1e-6, False),
    "exponential-of-inputs": ("exponential", None, False, 0.0, True),
    "exponential-of-inputs-with-bias": ("exponential", None, True, 1e-3, True),
    "relu": ("relu", 24, False, 1e-3, True),
    "relu-of-inputs": ("relu", None, False, 1e-3, True),
    "identity-of-inputs": ("identity", None, False, 0.0, True),
    "squared_relu": ("squared_relu", 24, False, 1e-3, True),
    "elu_plus_one": ("elu_plus_one", None, False, 0.0, True),
    "gelu": ("gelu", 24, True, 1e-3, True),
    "silu": ("silu", 24, True, 1e-3, True),
    "sigmoid": ("sigmoid", 24, False, 0.0, True),
    "softplus": ("softplus", 24, False, 0.0, True),
}


def make_map(name: str, head_dim: int, dtype=torch.float32, features: int | None = None) -> FeatureMap:
    """The feature map of that name; `features` replaces its number of rows."""
    function, rows, has_bias, epsilon, subtract_norm = MAPS[name]
    projection = None
    if rows is not None:
        projection = torch.randn(features or rows, head_dim)
        if name == "hyperbolic":
            half = projection[: projection.shape[0] // 2]
            projection = torch.cat([half, -half])
    bias = None
    if has_bias:
        size = head_dim if projection is None else projection.shape[0]
        # gelu and silu dip below zero; a shift keeps the denominators away from it, and the comparison well-posed.
        bias = 2 + 0.1 * torch.randn(size) if function in ("gelu", "silu") else 0.3 * torch.randn(size)
    return FeatureMap(function, projection, bias, head_dim**-0.25, epsilon, subtract_norm).to(dtype)


def make_inputs(name, length, head_dim=8, value_dim=5, keys=None, batch=2, heads=3, dtype=torch.float32):
    """Query, key and value; the same numbers for every dtype, up to its rounding."""
    keys = length if keys is None else keys
    query, key = (torch.randn(batch, heads, n, head_dim) for n in (length, keys))
    if name.startswith("identity"):  # the inputs are the features: positive, so that the denominators are
        query, key = query.abs() + 0.1, key.abs() + 0.1
    return tuple(t.to(dtype) for t in (query, key, torch.randn(batch, heads, keys, value_dim)))


def empty_state(query, value, feature_map) -> LinearAttentionState:
    dtype = torch.promote_types(query.dtype, torch.float32)
    features = feature_map.num_features(query.shape[-1])
    return LinearAttentionState.empty(*query.shape[:2], features, value.shape[-1], dtype=dtype)


def reference(query, key, value, feature_map, *, causal=False, mask=None, state=None):
    """`linear_attention_reference` with the defaults of `linear_attention`."""
    state = empty_state(query, value, feature_map) if state is None else state
    return linear_attention_reference(query, key, value, feature_map, mask, state, causal)


def naive_features(inputs: Tensor, feature_map: FeatureMap) -> Tensor:
    """φ as the module docstring of `feature_maps.py` has it, nothing rescaled: over- and underflows where φ does."""
    scaled = feature_map.scale * inputs
    logits = (
        scaled if feature_map.projection is None else torch.einsum("...d,fd->...f", scaled, feature_map.projection)
    )
    if feature_map.bias is not None:
        logits = logits + feature_map.bias
    if feature_map.function != "exponential":
        return POINTWISE[feature_map.function](logits) + feature_map.epsilon
    features = logits.exp() + feature_map.epsilon * logits.exp().sum(-1, keepdim=True)
    return features * (-scaled.square().sum(-1, keepdim=True) / 2).exp() if feature_map.subtract_norm else features


def definition(query, key, value, feature_map, *, causal=False, mask=None, first_row=0):
    """The formula of the operation, dense; `query` may be the rows from `first_row` on only."""
    weights = naive_features(query, feature_map) @ naive_features(key, feature_map).mT
    if mask is not None:
        weights = torch.where(mask[:, None, None, :].bool(), weights, 0)
        value = torch.where(mask[:, None, :, None].bool(), value, 0)
    if causal:
        weights = weights.tril(diagonal=first_row)
    return (weights @ value) / weights.sum(-1, keepdim=True)


def definition_of_state(key, value, feature_map, mask=None):
    """The two sums of the state, true to scale."""
    features = naive_features(key, feature_map)
    if mask is not None:
        features = features * mask[:, None, :, None]
    return features.mT @ value, features.sum(-2)


def true_sums(state: LinearAttentionState):
    """The sums of a state without its scale, comparable between two ways to get there."""
    scale = state.log_scale.double().exp()
    return state.key_value.double() * scale[..., None, None], state.key_sum.double() * scale[..., None]


def doubled(*tensors):
    """Detached float64 copies; a feature map comes back as a feature map."""
    return tuple(t.to(torch.float64) if isinstance(t, FeatureMap) else t.detach().double() for t in tensors)


def run_in_parts(query, key, value, feature_map, sizes, mask=None):
    """Causal attention over consecutive calls of these sizes, each given the state of the one before."""
    outputs, state, start = [], None, 0
    for size in sizes:
        here = slice(start, start + size)
        part = None if mask is None else mask[:, here]
        output, state = linear_attention(
            *(t[:, :, here] for t in (query, key, value)), feature_map, causal=True, mask=part, state=state
        )
        outputs.append(output)
        start += size
    assert start == query.shape[2]
    return torch.cat(outputs, dim=2), state


def all_gradients(function, query, key, value, feature_map, state, weights, **options):
    """Gradients of a weighted sum of the output and both sums of the state, by the name of what they belong to."""
    return gradients_of_each(function, query, key, value, feature_map, state, [weights], **options)[0]


def gradients_of_each(function, query, key, value, feature_map, state, losses, **options):
    """`all_gradients` for each of several lists of weights, after one forward pass."""
    names = ["query", "key", "value", "key_value", "key_sum", "projection", "bias"]
    tensors = [query, key, value, *state[:2], feature_map.projection, feature_map.bias]
    leaves = {n: t.detach().clone().requires_grad_() for n, t in zip(names, tensors, strict=True) if t is not None}
    feature_map = feature_map._replace(projection=leaves.get("projection"), bias=leaves.get("bias"))
    start = LinearAttentionState(leaves["key_value"], leaves["key_sum"], state.log_scale)
    output, new_state = function(*list(leaves.values())[:3], feature_map, state=start, **options)
    found = []
    for weights in losses:
        loss = sum((t.to(w.dtype) * w).sum() for t, w in zip((output, *new_state[:2]), weights, strict=True))
        gradients = torch.autograd.grad(loss, list(leaves.values()), retain_graph=weights is not losses[-1])
        found.append(dict(zip(leaves, gradients, strict=True)))
    return found


def prefix_sums(query, key, value, feature_map, *, causal=False, mask=None, state=None):
    """Linear attention as one would first write it down: naive features, every prefix sum in memory, autograd."""
    start = empty_state(query, value, feature_map) if state is None else state
    dtype = start.key_value.dtype
    final = reference(query, key, value, feature_map, mask=mask, state=start)[1].log_scale.detach()
    q, k = (naive_features(t.to(dtype), feature_map) for t in (query, key))
    k = k if mask is None else k * mask[:, None, :, None]
    scale = start.log_scale.exp()
    sums, total = start.key_value * scale[..., None, None], start.key_sum * scale[..., None]
    if causal:
        sums = sums[:, :, None] + (k[..., None] * value.to(dtype)[..., None, :]).cumsum(2)
        total = total[:, :, None] + k.cumsum(2)
        numerator, denominator = torch.einsum("bhnm,bhnmv->bhnv", q, sums), (q * total).sum(-1)
        sums, total = sums[:, :, -1], total[:, :, -1]
    else:
        sums, total = sums + k.mT @ value.to(dtype), total + k.sum(2)
        numerator, denominator = q @ sums, (q @ total[..., None])[..., 0]
    inverse = torch.exp(-final)
    new_state = LinearAttentionState(sums * inverse[..., None, None], total * inverse[..., None], final)
    return (numerator / denominator[..., None]).to(value.dtype), new_state


def token_by_token(query, key, value, feature_map, *, causal=False, mask=None, state=None):
    """`linear_attention_recurrent`, and for bidirectional attention a reading of the state it ends with."""
    start = empty_state(query, value, feature_map) if state is None else state
    if causal:
        return linear_attention_recurrent(query, key, value, feature_map, mask, start)
    seen = linear_attention_recurrent(key, key, value, feature_map, mask, start)[1]
    return reference(query, key[:, :, :0], value[:, :, :0], feature_map, state=seen)[0], seen


def shuffled(function):
    """The same function of the same numbers, whose sums run in another order wherever the order is free."""

    def call(query, key, value, feature_map, *, causal=False, mask=None, state=None):
        state = empty_state(query, value, feature_map) if state is None else state
        rows, keys, channels = (torch.randperm(n) for n in (query.shape[0], key.shape[2], query.shape[3]))
        queries = torch.randperm(query.shape[2])
        if causal:
            queries = keys = torch.arange(query.shape[2])
        query = query[rows][:, :, queries][..., channels]
        key, value = key[rows][:, :, keys][..., channels], value[rows][:, :, keys]
        mask = None if mask is None else mask[rows][:, keys]
        features = channels
        if feature_map.projection is not None:
            features = torch.randperm(feature_map.projection.shape[0])
            feature_map = feature_map._replace(projection=feature_map.projection[features][:, channels])
        if feature_map.bias is not None:
            feature_map = feature_map._replace(bias=feature_map.bias[features])
        start = LinearAttentionState(
            state.key_value[rows][:, :, features], state.key_sum[rows][:, :, features], state.log_scale[rows]
        )
        output, end = function(query, key, value, feature_map, causal=causal, mask=mask, state=start)
        row, feature = rows.argsort(), features.argsort()
        return output[row][:, :, queries.argsort()], LinearAttentionState(
            end.key_value[row][:, :, feature], end.key_sum[row][:, :, feature], end.log_scale[row]
        )

    return call


def several(*functions, orders=2):
    """Plain computations whose largest error is that of their dtype: one alone may be lucky in its rounding."""
    return [variant for f in functions for variant in (f, *(shuffled(f) for _ in range(orders)))]


def assert_like_eager(actual: Tensor, oracle: Tensor, eagers, name: str) -> None:
    """Within the budget of the least accurate of several plain computations in the same dtype."""
    finite = [eager for eager in eagers if torch.isfinite(eager).all()]  # a naive form overflows where ours must not
    worst = max(finite, key=lambda eager: (eager.double() - oracle).abs().max().item())
    assert_within_budget(actual, oracle, worst, name)


def random_mask(batch, length):
    """About a third of the keys masked, never the first one (rows without a key have tests of their own)."""
    mask = torch.rand(batch, length) > 0.3
    mask[:, 0] = True
    return mask


def assert_equal_in_double(actual, expected, name, tolerance=1e-10):
    """The same up to the rounding of float64, relative to the largest value."""
    assert actual.dtype == torch.float64
    error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1e-300)
    assert error <= tolerance, f"{name}: relative error {error:.3e}"
