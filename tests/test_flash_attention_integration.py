"""flash_attention inside torch, and what it must not do: leak, hold N×M tensors, touch tiles outside of the window."""

import importlib.util
import sys
import threading
import time

import psutil
import pytest
import torch
import torch.nn.functional as F
from flash_attention_cases import BATCH, COMBINATIONS, DIFFERENTIABLE, HEADS, in_dtype, make_call, operands_of
from helpers import ROOT, assert_within_budget

from hf_efficient.kernels.flash_attention import eager, eager_tiles, flash_attention, t5_distance_bias
from hf_efficient.kernels.flash_attention.operands import Operands
from hf_efficient.kernels.flash_attention.reference import flash_attention_reference


backends = pytest.mark.parametrize("backend", ["auto", "eager"])


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(eager_tiles, "ROWS", 16)
    monkeypatch.setattr(eager_tiles, "LEAST_ROWS", 4)
    monkeypatch.setattr(eager_tiles, "TILE", {"cpu": 16 * 16 * 3})


# --- torch's own machinery --------------------------------------------------------------------------------------


@pytest.mark.parametrize("combination", ["plain", "decoder", "encoder", "decoder with dropout"])
@pytest.mark.parametrize("requires_grad", [True, False], ids=["training", "inference"])
def test_opcheck_forward(combination, requires_grad):
    call = make_call(combination)
    leaves = {n: call[n].requires_grad_(requires_grad) for n in DIFFERENTIABLE if n in call}
    operands, options = operands_of(**call | leaves)
    torch.library.opcheck(torch.ops.hf_efficient.flash_attention_forward.default, (*operands, *options, "eager"))


@pytest.mark.parametrize("combination", ["plain", "decoder", "encoder", "decoder with dropout"])
def test_opcheck_backward(combination):
    operands, options = operands_of(**make_call(combination))
    output, lse = torch.ops.hf_efficient.flash_attention_forward(*operands, *options, "eager")
    gradients = torch.randn_like(output), torch.randn_like(lse)
    # It has no derivative of its own, which is what test_autograd_registration looks for.
    torch.library.opcheck(
        torch.ops.hf_efficient.flash_attention_backward.default,
        (*gradients, output, lse, *operands, *options, "eager", True, True),
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
    )


@pytest.mark.parametrize("combination", ["causal", "mask", "decoder"])
def test_compiles_to_one_graph(combination):
    """Forward and backward, for two lengths without a third compilation; nothing is unrolled."""
    torch.compiler.reset()
    table = torch.randn(8, HEADS, requires_grad=True)
    generator = "inductor" if combination == "decoder" else "aot_eager"  # code is generated for the fullest one
    nodes = []

    def count(graph, _):
        nodes.append(len(graph.graph.nodes))
        return graph.forward

    def attend(query, key, value, rest):
        bias = (
            {"distance_bias": t5_distance_bias(table, bidirectional=False, max_distance=9)} if "sinks" in rest else {}
        )
        return flash_attention(query, key, value, **rest | bias)

    for length in (70, 150, 200):
        call = with_equal_sizes(combination, length)
        inputs = [call.pop(n).requires_grad_() for n in ("query", "key", "value")]
        results = []
        for function in (attend, torch.compile(attend, fullgraph=True, backend=generator)):
            output = function(*inputs, call)
            results.append([output, *torch.autograd.grad(output.square().sum(), inputs)])
        for actual, wanted in zip(*results, strict=True):
            torch.testing.assert_close(actual, wanted)
        torch.compile(attend, fullgraph=True, backend=count)(*inputs, call)
    assert len(nodes) <= 2 and max(nodes) < 150, nodes
    torch.compiler.reset()


@backends
def test_autocast_changes_nothing(backend):
    """The products inside must not fall to bfloat16 because the caller's are."""
    call = make_call("decoder", 40, 40)
    expected = flash_attention(**call, backend=backend)
    leaf = call["query"].clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inference = flash_attention(**call, backend=backend)
        training = flash_attention(**call | {"query": leaf}, backend=backend)
    assert torch.equal(inference, expected) and torch.equal(training, expected)
    training.sum().backward()
    plain = call["query"].clone().requires_grad_()
    flash_attention(**call | {"query": plain}, backend=backend).sum().backward()
    assert torch.equal(leaf.grad, plain.grad)


def test_a_second_definition_is_harmless():
    """The package and a checkpoint's own copy define the same operators in one process."""
    name = "hf_efficient.kernels.flash_attention.autograd_again"
    spec = importlib.util.spec_from_file_location(name, ROOT / "kernels/flash_attention/autograd.py")
    again = importlib.util.module_from_spec(spec)
    sys.modules[name] = again
    try:
        spec.loader.exec_module(again)
    finally:
        del sys.modules[name]
    call = make_call("decoder")
    leaf = call["query"].clone().requires_grad_()
    first = flash_attention(**call | {"query": leaf})
    second, _ = again.attend(*operands_of(**call | {"query": leaf}), "eager")
    assert torch.equal(first, second)
    first.sum().backward()
    assert torch.isfinite(leaf.grad).all()


def test_gradient_checkpointing_draws_the_same_dropout():
    call = make_call("plain") | {"dropout_p": 0.4}
    query = call.pop("query")
    gradients = []
    for use in (True, False):
        torch.manual_seed(3)
        leaf = query.clone().requires_grad_()
        run = lambda q: flash_attention(q, **call)  # noqa: E731
        output = torch.utils.checkpoint.checkpoint(run, leaf, use_reentrant=False) if use else run(leaf)
        output.square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


# --- isolation --------------------------------------------------------------------------------------------------


def with_equal_sizes(combination, length=40):
    """A call that `auto` may give to SDPA: values as wide as keys."""
    call = make_call(combination, length, length)
    call["value"] = torch.randn_like(call["key"])
    if "memory_value" in call:
        call["memory_value"] = torch.randn_like(call["memory_key"])
    return call


def prefix_results(call, token, filling, backend):
    """Output and gradients of the rows before `token`, where all from there on is replaced."""
    changed = call | {n: call[n].clone() for n in ("query", "key", "value")}
    if filling is not None:
        for name in ("query", "key", "value"):
            changed[name][:, :, token:] = filling
    leaves = [changed[n].requires_grad_() for n in ("query", "key", "value")]
    output = flash_attention(**changed, backend=backend)[:, :, :token]
    gradients = torch.autograd.grad(output.square().sum(), leaves)
    return {"output": output} | {n: g[:, :, :token] for n, g in zip(("query", "key", "value"), gradients, strict=True)}


@backends
@pytest.mark.parametrize("combination", ["causal", "causal window", "causal mask", "decoder", "decoder with dropout"])
def test_no_future_to_the_bit(combination, backend, small_tiles):
    call = with_equal_sizes(combination)
    for token in (1, 16, 33, 39):
        before, after = (prefix_results(call, token, filling, backend) for filling in (None, 1e4))
        for name in before:
            assert torch.equal(before[name], after[name]), f"{name}, token {token}"


@backends
@pytest.mark.parametrize("filling", [float("inf"), float("nan")])
@pytest.mark.parametrize("combination", ["causal", "causal window", "decoder"])
def test_no_future_that_is_no_number(combination, filling, backend, small_tiles):
    """A weight of zero times inf would be NaN. (The gradient of keys sums over later rows, which are NaN here.)"""
    call = with_equal_sizes(combination)
    for token in (1, 33):
        before, after = (prefix_results(call, token, value, backend) for value in (None, filling))
        for name in ("output", "query"):
            assert torch.isfinite(after[name]).all(), f"{name}, token {token}"
            torch.testing.assert_close(after[name], before[name], msg=f"{name}, token {token}")


@backends
@pytest.mark.parametrize("filling", [float("inf"), float("nan")])
@pytest.mark.parametrize("combination", ["mask", "causal mask", "row without keys", "decoder", "lengths"])
def test_what_does_not_count_is_never_read(combination, filling, backend, small_tiles):
    call = with_equal_sizes(combination)
    unread = torch.zeros(BATCH, 40, dtype=torch.bool)
    if "key_mask" in call:
        unread |= ~call["key_mask"].bool()
    if "key_lengths" in call:
        unread |= torch.arange(40) >= call["key_lengths"][:, None]
    assert unread.any()
    results = []
    for value in (0.0, filling):
        changed = call | {n: call[n].masked_fill(unread[:, None, :, None], value) for n in ("key", "value")}
        leaves = [changed[n].requires_grad_() for n in ("query", "key", "value")]
        output = flash_attention(**changed, backend=backend)
        results.append([output, *torch.autograd.grad(output.square().sum(), leaves)])
    for zeros, other in zip(*results, strict=True):
        assert torch.equal(zeros, other)
    for gradient in results[1][2:]:
        assert not gradient.masked_select(unread[:, None, :, None]).any()


@pytest.mark.parametrize("combination", ["plain", "decoder", "encoder with dropout", "lengths"])
def test_batch_rows_are_alone(combination):
    call = make_call(combination, 20, 20)
    call.pop("dropout_p", None), call.pop("dropout_seed", None)  # its hash counts the batch row
    whole = flash_attention(**call)
    per_row = ("query", "key", "value", "key_mask", "key_lengths", "query_lengths")
    for b in range(BATCH):
        alone = flash_attention(**{n: t[b : b + 1] if n in per_row else t for n, t in call.items()})
        torch.testing.assert_close(alone[0], whole[b])


@backends
@pytest.mark.parametrize("split", [(20, 20), (39, 1), (1, 39), (33, 5, 2)])
def test_cached_steps_are_the_whole(split, backend, small_tiles):
    """The rows of a later call see the keys of the earlier ones, whatever the options."""
    call = make_call("causal window distance bias", 40, 40, dtype=torch.float64) | {"softcap": 4.0}
    whole = flash_attention(**call, backend=backend)
    outputs, start = [], 0
    for size in split:
        part = call | {"query": call["query"][:, :, start : start + size]}
        part |= {n: call[n][:, :, : start + size] for n in ("key", "value")}
        outputs.append(flash_attention(**part, backend=backend))
        start += size
    assert torch.allclose(torch.cat(outputs, 2), whole, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "combination", ["plain", "causal alibi", "causal window distance bias", "mask", "decoding", "row without keys"]
)
def test_a_step_of_decoding(combination, dtype, monkeypatch):
    """One row goes to SDPA, with its bias as a mask of one row, and sees the same."""
    decoding = ("causal", "mask", "alibi per row", "shared distance bias", "one-sided window")
    monkeypatch.setitem(COMBINATIONS, "decoding", decoding)
    call = make_call(combination, 1, 40, dtype=torch.float64)
    call["value"] = torch.randn_like(call["key"])
    exact = flash_attention(**call, backend="eager")
    call = in_dtype(call, dtype)
    plain = flash_attention_reference(*operands_of(**call))[0]
    monkeypatch.setattr(eager, "_forward", None)
    assert_within_budget(flash_attention(**call), exact, plain, combination)


def test_a_step_of_decoding_keeps_the_digits_of_far_biases():
    """In bfloat16, 4,000 steps times a slope have three digits."""
    call = make_call("alibi", 1, 4096, dtype=torch.float64)
    call |= {"value": torch.randn_like(call["key"]), "alibi_slopes": 2.0 ** -torch.arange(9, 13).double()}
    exact = flash_attention(**call, backend="eager")
    half = in_dtype(call, torch.bfloat16)
    assert_within_budget(flash_attention(**half), exact, flash_attention(**half, backend="eager"), "output")


def test_lengths_are_cuts():
    call = make_call("decoder", 30, 34, dtype=torch.float64)
    lengths = {"key_lengths": torch.tensor([34, 9]), "query_lengths": torch.tensor([12, 30])}
    padded = flash_attention(**call, **lengths)
    for b, (rows, keys) in enumerate([(12, 34), (30, 9)]):
        cut = call | {"query": call["query"][b : b + 1, :, :rows], "key_mask": call["key_mask"][b : b + 1, :keys]}
        cut |= {n: call[n][b : b + 1, :, :keys] for n in ("key", "value")}
        assert torch.allclose(padded[b : b + 1, :, :rows], flash_attention(**cut), rtol=0, atol=1e-13)
        assert not padded[b, :, rows:].any()


# --- which path, how much ---------------------------------------------------------------------------------------


def test_plain_calls_go_to_sdpa(monkeypatch):
    def call(length=9, keys=9, size=8, value_size=8, **options):
        shapes = ((4, length, size), (2, keys, size), (2, keys, value_size))
        return [torch.randn(2, *shape) for shape in shapes], options

    def turned():
        inputs, options = call()
        return [t.mT.contiguous().mT for t in inputs], options

    mask = torch.ones(2, 9).bool()
    plain = [
        call(),
        call(causal=True),
        call(length=5),
        call(length=1, causal=True),
        call(key_mask=mask),
        call(scale=2.0),
    ]
    others = [
        call(length=5, causal=True), call(causal=True, key_mask=mask), call(window=3), call(softcap=2.0),
        call(alibi_slopes=torch.ones(4)), call(sinks=torch.ones(4)), call(return_lse=True), call(backend="eager"),
        call(length=1, alibi_slopes=torch.ones(4, requires_grad=True)), call(length=1, softcap=2.0),
        call(dropout_p=0.1), call(value_size=5), call(key_lengths=torch.tensor([1, 2])), turned(), call(keys=0),
    ]  # fmt: skip
    asked = []

    def spy(*arguments, **options):
        asked.append(True)
        return original(*arguments, **options)

    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    for expected, calls in ((True, plain), (False, others)):
        for number, (inputs, options) in enumerate(calls):
            asked.clear()
            flash_attention(*inputs, **options)
            assert bool(asked) == expected, (expected, number)


@pytest.mark.parametrize("combination", ["causal window", "window ahead"])
def test_tiles_outside_of_the_window_are_not_touched(combination, monkeypatch):
    """Logits computed grow with N · window; the whole would be 64 times as many."""
    computed = []

    def spy(part, tile, *rest):
        computed.append((tile.bottom - tile.top) * (tile.right - tile.left))
        return original(part, tile, *rest)

    original = eager_tiles.compute_logits
    monkeypatch.setattr(eager, "compute_logits", spy)
    counts = []
    for length in (1024, 2048):
        computed.clear()
        flash_attention(**make_call(combination, length, length))
        counts.append(sum(computed) // 4 if len(computed) else 0)
    assert 1.8 < counts[1] / counts[0] < 2.2
    assert counts[1] < 2048 * 2048 / 64


def peak_of(function):
    """MiB by which resident memory rises while `function` runs, sampled."""
    process, highest, done = psutil.Process(), [0], threading.Event()

    def watch():
        while not done.is_set():
            highest[0] = max(highest[0], process.memory_info().rss)
            time.sleep(0.001)

    before = process.memory_info().rss
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        function()
    finally:
        done.set()
        thread.join()
    return (highest[0] - before) / 2**20


@pytest.mark.parametrize("options", ["alibi and bias", "softcap", "window"])
def test_memory_is_linear(options):
    """One N×M tensor of 4,096 rows and two heads is 128 MiB in float32."""
    length = 4096
    inputs = [torch.randn(1, 2, length, 8, requires_grad=True) for _ in range(3)]
    chosen = {
        "alibi and bias": {
            "alibi_slopes": torch.rand(2, requires_grad=True),
            "distance_bias": torch.randn(2, 257, requires_grad=True),
            "key_mask": torch.rand(1, length) > 0.1,
        },
        "softcap": {"softcap": 30.0, "causal": True, "sinks": torch.zeros(2, requires_grad=True)},
        "window": {"window": 127, "dropout_p": 0.1},
    }[options]

    def train():
        flash_attention(*inputs, **chosen).sum().backward()

    train()
    assert peak_of(train) < 40


def test_operands_are_left_alone(small_tiles):
    call = make_call("decoder with dropout", 30, 30)
    copies = {n: t.clone() for n, t in call.items() if torch.is_tensor(t)}
    for name in DIFFERENTIABLE:
        if name in call:
            call[name].requires_grad_()
    flash_attention(**call).sum().backward()
    assert all(torch.equal(call[n], copy) for n, copy in copies.items())
    assert set(DIFFERENTIABLE) < set(Operands._fields)
