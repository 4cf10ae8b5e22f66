"""linear_attention's kernels where several programs share the walk along one sequence.

Runs under Triton's interpreter where there is no GPU. Run: pytest tests/test_linear_attention_triton_segments.py
"""

import pytest
import torch
from kernel_device import INTERPRETED
from linear_attention_cases import random_mask
from linear_attention_triton_cases import on_device, record_launches, triton_attention
from test_linear_attention_triton import assert_output_and_state
from test_linear_attention_triton_gradients import assert_gradients, make_case

from hf_efficient.kernels.linear_attention import triton_segments
from hf_efficient.kernels.linear_attention.launch_plan import Chunks


pytest.importorskip("triton")
# Chunks for several segments, and a ragged tail.
LENGTH = 16 * 5 + 3 if INTERPRETED else 32 * 26 + 3


@pytest.mark.parametrize("name, causal", [("softmax", True), ("relu", False)], ids=["causal", "bidirectional"])
def test_output_state_and_gradients(name, causal, monkeypatch, nan_poisoned):
    """A mask, an earlier state, gradients of the output and of the final sums."""
    launches = record_launches(monkeypatch)
    case = make_case(name, LENGTH, causal=causal)
    query, key, value, feature_map, state, _ = case
    mask = random_mask(1, key.shape[2])
    actual = triton_attention(query, key, value, feature_map, causal=causal, mask=mask, state=state)
    assert {reverse for _, reverse in launches} == {False} and min(launches)[0] >= 3
    assert_output_and_state(actual, (query, key, value), feature_map, causal, mask, state)
    del launches[:]
    assert_gradients(case, causal=causal, mask=mask)
    assert {reverse for _, reverse in launches} == {False, True} and min(launches)[0] >= 3


def test_causal_means_causal_to_the_bit(monkeypatch):
    """Across a segment's border, with later keys whose scales are above all earlier ones."""
    launches = record_launches(monkeypatch)
    query, key, value, feature_map, *_ = make_case("without-norm", LENGTH)
    expected, _ = triton_attention(query, key, value, feature_map, causal=True)
    assert launches
    for token in (LENGTH // 2, LENGTH - 5):
        later = [t.clone() for t in (query, key, value)]
        for tensor in later:
            tensor[:, :, token:] = 8 * torch.randn_like(tensor[:, :, token:])
        actual, _ = triton_attention(*later, feature_map, causal=True)
        assert torch.equal(actual[:, :, :token], expected[:, :, :token]), f"token {token}"


def test_segments_of_masked_keys_alone(monkeypatch):
    """Nothing stands in them, so that the scale before them is carried past them."""
    launches = record_launches(monkeypatch)
    case = make_case("softmax", LENGTH)
    mask = torch.ones(1, LENGTH, dtype=torch.bool)
    mask[:, LENGTH // 4 :] = False
    for kept in (mask, torch.zeros_like(mask)):
        actual = triton_attention(*case[:4], causal=True, mask=kept, state=case[4])
        assert_output_and_state(actual, case[:3], case[3], True, kept, case[4])
    assert launches


def test_any_default_dtype(monkeypatch):
    """What the library makes for itself is float32 to the kernels."""
    launches = record_launches(monkeypatch)
    case = make_case("relu", LENGTH, causal=False)
    torch.set_default_dtype(torch.float64)
    try:
        leaves = [on_device(t).requires_grad_() for t in case[:3]]
        output, _ = triton_attention(*leaves, case[3], causal=False)
        output.sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    assert launches and all(leaf.grad.dtype == torch.float32 for leaf in leaves)


def test_when_the_walk_is_shared(monkeypatch):
    record_launches(monkeypatch)
    some = on_device(torch.zeros(1))
    chunks = Chunks.of(batch=1, length=LENGTH, size=16, cu_seqlens=None)
    cut = triton_segments.in_segments(chunks, 1, some, walks=2)
    assert cut.segments >= 3 and cut.segments * cut.per_segment >= chunks.per_sequence
    assert (cut.segments - 1) * cut.per_segment < chunks.per_sequence
    assert triton_segments.in_segments(chunks, 10_000, some, walks=1) is chunks  # enough programs without
    short = Chunks.of(batch=1, length=17, size=16, cu_seqlens=None)
    assert triton_segments.in_segments(short, 1, some, walks=2) is short
    packed = Chunks.of(1, LENGTH, 16, on_device(torch.tensor([0, 5, LENGTH])))
    assert triton_segments.in_segments(packed, 1, some, walks=1) is packed


def test_several_rows_and_heads(monkeypatch, nan_poisoned):
    """What one head carries never goes to another, nor to another row of the batch."""
    launches = record_launches(monkeypatch)
    query, key, value, feature_map, *_ = make_case("relu", LENGTH, batch=2, heads=2)
    for causal in (True, False):
        actual = triton_attention(query, key, value, feature_map, causal=causal)
        assert_output_and_state(actual, (query, key, value), feature_map, causal)
    del launches[:]
    assert_gradients(make_case("relu", LENGTH, heads=2), causal=True)
    assert {reverse for _, reverse in launches} == {False, True}
