"""scripts/benchmark.py: it runs, refuses figures of red code, and its rows, targets and tables say what was measured.

Run: pytest tests/test_benchmark_script.py
"""

import dataclasses
import shutil
import sys
import time
import types

import pytest
import torch
from helpers import ROOT, run_python
from load_script import load_script


measure = load_script("benchmark_measure")
gate = load_script("benchmark_gate")
layers = load_script("benchmark_colt5")
models = load_script("benchmark_models")
operations = load_script("benchmark_operations")
soft_topk = load_script("benchmark_soft_topk")
table = load_script("benchmark_table")
targets = load_script("benchmark_targets")
benchmark = load_script("benchmark")
benchmark_gpu = load_script("benchmark_gpu")
benchmark_gpu_work = load_script("benchmark_gpu_work")


NO_HYPOTHESIS = "-p no:hypothesispytest"  # its plugin takes a second in each process
PARTS = ("causal", "growth", "generate", "decode", "flash", "topk", "colt5")
PARTS += ("perceiver", "perceiver-chunks", "perceiver-language", "x-transformer")


def make_row(name, provider, mode, length, median, **fields):
    return measure.Row(name, provider, mode, length, median, median, median, 5, **fields)


@pytest.fixture
def few_calls(monkeypatch):
    """One call for each figure, where it is not asked how steady the figure is."""
    monkeypatch.setattr(measure, "SHORT", 0)
    monkeypatch.setattr(measure, "PEAKS", 1)


def test_quick_run_from_the_command_line(tmp_path):
    """A copy of the scripts beside tests of its own: first red, so there are no figures, then green."""
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    (test,) = gate.QUICK_TESTS["soft_topk"]
    path, _, name = test.partition("::")
    output = tmp_path / "rows.csv"

    def run():
        return run_python(
            "scripts/benchmark.py",
            *("--quick", "--threads", 1, "--only", "topk", "--output", output),
            cwd=tmp_path,
            environment={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": NO_HYPOTHESIS},
        )

    (tmp_path / path).write_text(f"def {name}(): assert False\n")
    with pytest.raises(AssertionError, match="The tests of soft_topk are red: no figures"):
        run()
    assert not output.exists()
    (tmp_path / path).write_text(f"def {name}(): pass\n")
    printed = run()
    assert "| target" in printed and "not measured" in printed
    rows = benchmark.read_rows(output)
    assert {(row.name, row.provider, row.length, row.threads) for row in rows} >= {("soft_topk", "ours", 128, 1)}


@pytest.mark.parametrize("mode", soft_topk.MODES)
def test_no_two_calls_in_a_row_select_from_the_same_logits(mode):
    seen = []

    def function(logits):
        seen.append(tuple(logits.flatten().tolist()))
        return 2 * logits

    call = soft_topk._call(function, torch.randn(soft_topk.ROWS, 1, 4), mode)
    seen.clear()
    for _ in range(2 * soft_topk.ROWS):
        call()
    assert seen[: soft_topk.ROWS] == seen[soft_topk.ROWS :]
    assert len(set(seen)) == soft_topk.ROWS


def run_setting_here(setting, output):
    sys.argv += ["--setting", setting, "--output", str(output)]
    benchmark.measure(benchmark.parse_arguments())


def test_every_part_of_a_quick_run(few_calls, tmp_path, monkeypatch):
    """In this process, which is told what the process of its own is told otherwise."""
    output = tmp_path / "rows.csv"
    words = ["benchmark.py", "--quick", "--threads", "1", "--only", *PARTS, "--output", str(output)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(gate, "require_green", lambda ops, quick: None)
    monkeypatch.setattr(benchmark, "run_setting", run_setting_here)
    threads = torch.get_num_threads()
    try:
        benchmark.main()
    finally:
        torch.set_num_threads(threads)
    rows = benchmark.read_rows(output)
    found = {(row.name, row.provider, row.mode, row.length) for row in rows}
    for provider in ("ours", "sdpa"):
        for mode in ("forward", "forward+backward"):
            assert ("linear_attention_causal", provider, mode, 128) in found
    assert ("linear_attention_causal_growth", "ours", "forward+backward", 128) in found
    for option, provider in (("alibi", "ours"), ("t5", "sdpa-bias"), ("softcap", "dense"), ("window", "sdpa-plain")):
        assert (f"flash_attention_{option}", provider, "forward+backward", 128) in found
    assert {("generate", "ours", "8+8", 16), ("decode", "gpt2", "8 steps", 32)} <= found
    for provider in ("ours", "ours-peer-widths", "dense-sdpa"):
        assert ("colt5_layer", provider, "forward+backward", 128) in found
    for provider in ("ours", "ours-at-once", "transformers", "ours-converted"):
        assert ("perceiver_flash_features", provider, "forward+backward", 128) in found
    assert ("perceiver_flash_language", "ours-converted", "forward", 128) in found
    assert ("perceiver_flash_chunks", "ours", "forward+backward", 128) in found
    for provider in ("ours", "ours-as-llama", "llama"):
        assert ("x_transformer_generate", provider, "8+8", 16) in found
    assert ("x_transformer_memory", "sinks", "forward+backward", 128) in found
    for row in rows:
        assert row.median > 0 and row.p20 <= row.median <= row.p80 and row.repeats >= 1
        assert row.threads == 1 and row.torch == torch.__version__ and row.device and row.commit and row.date
        if row.name == "linear_attention_causal":
            assert row.error is not None and row.error < 1e-4
    ours, theirs = ({row.length: row for row in rows if row.key[:2] == ("decode", p)} for p in ("ours", "gpt2"))
    assert ours[16].cache_bytes == ours[32].cache_bytes > 0
    assert theirs[32].cache_bytes > theirs[16].cache_bytes


def test_the_gpu_benchmark_runs(few_calls):
    """Every piece of work, tiny and on the CPU: what a GPU machine must not be the first to run."""
    rows = list(benchmark_gpu.measure(torch.device("cpu"), [64], repeats=1))
    names = {"copy", "product", "linear_attention_causal", "linear_attention_plain", "soft_topk"}
    models = {"train", "decode", "encoder", "perceiver"}
    names |= {f"flash_attention_{kind}" for kind in ("causal", "alibi", "t5", "softcap", "window")}
    names |= {f"{name}_calls" for name in names - {"copy", "product"}}
    assert {row.name for row in rows} == names | models
    for row in rows:
        assert row.median > 0
        assert row.mode == "forward" or row.name not in ("copy", "product")
        if row.provider == "ours" and row.name not in models:
            assert row.roofline > 0


def test_the_first_call_is_timed_apart_from_its_backward_pass():
    """By the process of its own that a GPU machine starts."""
    rows = list(benchmark_gpu.cold_rows("soft_topk", torch.device("cpu")))
    assert [row.key[:4] for row in rows] == [
        ("soft_topk_first_call", "ours", mode, 0) for mode in ("forward", "backward")
    ]
    assert all(row.median > 0 for row in rows)
    for operation in benchmark_gpu.COLD_OPERATIONS:
        assert min(benchmark_gpu_work.first_calls(operation, "cpu")) > 0


def test_targets_and_tables_of_the_first_call():
    rows = [
        make_row("copy", "torch", "forward", 2**30, 1.0),
        make_row("soft_topk_first_call", "ours", "forward", 0, 2500.0),
        make_row("soft_topk_first_call", "ours", "backward", 0, 10500.0),
        make_row("soft_topk", "ours", "forward", 32768, 1.0),
    ]
    verdicts = {line[0]: line[2:4] for line in targets.report(rows, table.GPU_TARGETS)}
    assert verdicts["soft_topk: seconds of the first call"] == ("2.50", "pass")
    assert verdicts["soft_topk: seconds of the first call of its backward pass"] == ("10.50", "MISS")
    assert verdicts["soft_topk: seconds of the first call and the first backward pass together"] == ("13.00", "MISS")
    assert verdicts["linear_attention: seconds of the first call"] == ("", "not measured")
    text = table.tables(rows)
    assert "forward | backward |" in text and "2500 |    10500 |" in text
    assert "forward 32k |" in text and " 0k" not in text


def test_the_gpu_benchmark_compares_the_same_things():
    for works in benchmark_gpu.WORK:
        found = {}
        for work in works(64, torch.device("cpu")):
            output = work.prepare(backward=False)()
            assert torch.isfinite(output.float()).all()
            found.setdefault(work.name, {})[work.provider] = output.float()
        for name, outputs in found.items():
            if name.startswith("flash_attention") and len(outputs) > 1:
                ours, theirs = outputs.values()
                assert torch.allclose(ours, theirs, atol=3e-2), name


@pytest.mark.parametrize("causal", [True, False])
def test_every_provider_attends(few_calls, causal):
    """Each against its own formula in float64; the peers' too, so that a row never times nonsense."""
    rows = list(operations.measure(64, causal, repeats=1))
    providers = {"ours", "ours-relu", "sdpa", "performer-pytorch", "performer-pytorch-relu"}
    assert {row.provider for row in rows} == providers
    assert all(row.error < 1e-3 for row in rows)
    assert all(("performer-pytorch 1." in row.peer) == row.provider.startswith("performer-pytorch") for row in rows)


def test_every_layer_runs(few_calls):
    rows = list(layers.measure(256, repeats=1))
    providers = {"ours", "ours-peer-widths", "dense-sdpa", "colt5-attention", "longt5-local", "longt5-transient", "t5"}
    assert {(row.provider, row.mode) for row in rows} == {(p, m) for p in providers for m in layers.MODES}
    assert all((row.gflops is not None) == row.provider.startswith("ours") for row in rows)


def test_counted_operations_are_those_of_the_formula():
    """Of widths: 4 + 2 in the feed-forwards, 1 + 9 / 32 in the projections, 1 / 85.3 for the pairs; and of windows."""
    length, width = 512, 768
    (row,) = layers.measure_operations(length)
    pairs = length * 255 - 127 * 128  # inside of windows that the ends cut off
    expected = 7.28125 * length * width**2 + length**2 * width * 3 / 256 + 2 * pairs * width / 4
    assert row.gflops * 1e9 == pytest.approx(2 * expected, rel=1e-6)
    assert targets.paper_flops(length) == pytest.approx(2 * (expected - 2 * pairs * width / 4), rel=5e-3)


def test_models_are_of_one_size():
    sizes = [sum(p.numel() for p in make().parameters()) for make in (models.performer, lambda: models.gpt2(256))]
    assert max(sizes) < 1.02 * min(sizes)


@pytest.fixture
def small_project(tmp_path, monkeypatch):
    (tmp_path / "tests").mkdir()
    monkeypatch.setattr(gate, "ROOT", tmp_path)
    monkeypatch.setattr(gate, "PASSED", tmp_path / ".cache/passed")
    monkeypatch.setattr(gate, "TESTS", {"op": ["tests/test_op*.py"]})
    monkeypatch.setenv("PYTEST_ADDOPTS", NO_HYPOTHESIS)
    monkeypatch.setenv("PYTEST_XDIST_AUTO_NUM_WORKERS", "1")
    return tmp_path


def test_no_figure_while_tests_are_red(small_project):
    test = small_project / "tests/test_op.py"
    test.write_text("def test_it(): assert False\n")
    with pytest.raises(SystemExit, match="tests of op are red: no figures"):
        gate.require_green(["op"])
    assert not gate.PASSED.exists()
    test.write_text("def test_it(): pass\n")
    gate.require_green(["op"])


def test_green_is_remembered_until_something_changes(small_project, capsys, monkeypatch):
    monkeypatch.setattr(gate, "OPTIONS", [])  # without workers: they are in the test above
    test, source = small_project / "tests/test_op_more.py", small_project / "kernels/op.py"
    source.parent.mkdir()
    test.write_text("def test_it(): pass\n")
    messages = []
    for content in ("one = 1\n", "one = 1\n", "one = 2\n", "one = 1\n"):
        source.write_text(content)
        gate.require_green(["op"])
        messages.append("running" in capsys.readouterr().out)
    assert messages == [True, False, True, False]
    test.write_text("def test_it(): assert False\n")
    with pytest.raises(SystemExit):
        gate.require_green(["op"])


def test_gate_finds_its_tests():
    """A renamed test file must not open the gate."""
    for op, patterns in gate.TESTS.items():
        for pattern in patterns:
            assert gate._matching(pattern), f"{op}: no file like {pattern}"
    for test in (test for tests in gate.QUICK_TESTS.values() for test in tests):
        path, _, name = test.partition("::")
        assert f"def {name}(" in (ROOT / path).read_text()


def test_rows_survive_the_file(tmp_path):
    rows = [
        make_row("op", "ours", "forward", 64, 1.25, peak_mib=3.5, error=1e-7, error_length=64, load=0.5),
        make_row("decode", "gpt2", "64 steps", 128, 70.0, tokens_per_second=914.0, cache_bytes=123, peer="x 1"),
    ]
    benchmark.write_rows(tmp_path / "new/rows.csv", rows)
    assert benchmark.read_rows(tmp_path / "new/rows.csv") == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.csv"]


def test_new_rows_replace_old_ones_of_the_same_measurement():
    old = [make_row("op", "ours", "forward", 64, 1.0), make_row("op", "ours", "forward", 128, 2.0)]
    new = [
        make_row("op", "ours", "forward", 64, 3.0),
        make_row("op", "ours", "forward", 64, 4.0, allocator="kept-heap"),
    ]
    assert [row.median for row in benchmark.merged(old, new)] == [3.0, 2.0, 4.0]


def test_a_context_stays_as_long_as_it_is():
    model = models.gpt2(24)
    tokens = torch.zeros(1, 16, dtype=torch.long)
    cache = model(tokens, use_cache=True).past_key_values
    for _ in range(2):
        models._step_call(model, cache, tokens[:, -1:], 8, True)()
        assert cache.get_seq_length() == 16


def test_targets_judge_ratios():
    def verdicts(**changes):
        rows = [
            make_row("linear_attention_causal", "ours", "forward", 4096, 10.0, peak_mib=1.0),
            make_row("linear_attention_causal", "performer-pytorch", "forward", 4096, 70.0, peak_mib=19.0),
            make_row("linear_attention_causal", "sdpa", "forward", 4096, 10.0),
            # Minutes later, so not what the time at 4k is compared with.
            make_row("linear_attention_causal", "ours", "forward", 16384, 60.0),
            make_row("linear_attention_causal_growth", "ours", "forward", 4096, 10.0),
            make_row("linear_attention_causal_growth", "ours", "forward", 16384, 44.0),
            make_row("generate", "ours", "64+192", 256, 1.0, tokens_per_second=299.0),
            make_row("generate", "performer-pytorch", "64+192", 256, 1.0, tokens_per_second=10.0),
        ]
        rows = [dataclasses.replace(row, **changes) for row in rows]
        return {line[0]: line[2:4] for line in targets.report(rows)}

    found = verdicts()
    assert found["causal forward at 4k: times faster than performer-pytorch"] == ("7.00", "pass")
    assert found["causal forward at 4k: performer-pytorch's peak memory over ours"] == ("19.00", "MISS")
    assert found["causal forward at 4k: times faster than SDPA"] == ("1.00", "pass")
    assert found["causal forward: time at 16k over time at 4k"] == ("4.40", "pass")
    assert found["generate 64+192: times faster than performer-pytorch"] == ("29.90", "MISS")
    assert found["causal forward at 16k: times faster than SDPA"] == ("", "not measured")
    # Under the second setting only what was measured is listed.
    assert set(verdicts(allocator="kept-heap")) == {name for name, (figure, _) in found.items() if figure}


def test_tables_come_from_the_rows(tmp_path):
    rows = [
        make_row("linear_attention_causal", "ours", "forward", 4096, 91.4, peak_mib=12.2, sizes="B1", threads=2),
        make_row("linear_attention_causal", "sdpa", "forward", 4096, 123.0, peak_mib=8.0, sizes="B1", threads=2),
    ]
    benchmark.write_rows(tmp_path / "rows.csv", rows)
    document = tmp_path / "README.md"
    document.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    for _ in range(2):
        run_python("scripts/benchmark_table.py", tmp_path / "rows.csv", "--document", document)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "91 (12)" in text and "123 (8)" in text and "1.35" in text and text.count("Causal attention") == 1
    document.write_text("no markers\n")
    with pytest.raises(AssertionError, match="needs the lines"):
        run_python("scripts/benchmark_table.py", tmp_path / "rows.csv", "--document", document)
    assert document.read_text() == "no markers\n"


def test_time_rounds_calls_in_turns():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    times = measure.time_rounds(functions, repeats=3)
    assert "".join(calls[:14]) == "ab" + "aabb" * 3  # one round to warm up, and a call at each turn
    assert all(len(samples) >= 3 for samples in times.values())


def test_a_long_call_needs_no_other_before_it(monkeypatch):
    monkeypatch.setattr(measure, "WARM_UP_LIMIT", 0.01)
    monkeypatch.setattr(measure, "SHORT", 0)
    calls = []
    functions = {"a": lambda: calls.append("a"), "b": lambda: [calls.append("b"), time.sleep(0.02)]}
    assert [len(samples) for samples in measure.time_rounds(functions, repeats=3).values()] == [3, 3]
    assert "".join(calls) == "ab" + "aab" * 2 + "aa"


def test_summary_is_of_the_samples():
    assert measure.summary([5.0, 1.0, 3.0, 2.0, 4.0]) == {"median": 3.0, "p20": 2.0, "p80": 5.0, "repeats": 5}


def test_peak_memory_sees_what_a_call_takes():
    def allocate(mib):
        return lambda: torch.ones(mib * 2**18).sum()

    if measure.peak_memory(lambda: None) is None:
        pytest.skip("this system keeps no high-water mark of a process")
    allocate(300)()  # a block that was used before must not hide the next one
    assert 95 < measure.peak_memory(allocate(100)) < 130
    assert measure.peak_memory(allocate(1)) < 20


def test_peak_memory_is_that_of_most_calls(monkeypatch):
    peaks = iter([7.0, 900.0, 5.0, 8.0, 6.0, 230.0, 1440.0, 4.0])
    times = iter([0.0, 1.0, 2.0, 3.0, 4.0] + [10.0, 19.0, 21.0] + [30.0, 50.0] + [60.0])
    monkeypatch.setattr(measure, "peak_memory", lambda function: next(peaks))
    monkeypatch.setattr(measure, "time", types.SimpleNamespace(perf_counter=lambda: next(times)))
    assert measure.typical_peak_memory(lambda: None) == 7.0
    assert measure.typical_peak_memory(lambda: None) == 230.0
    assert measure.typical_peak_memory(lambda: None) == 4.0  # one call at least, however long it takes
    monkeypatch.setattr(measure, "peak_memory", lambda function: None)
    assert measure.typical_peak_memory(lambda: None) is None


def test_cache_bytes_counts_everything_once():
    class Layer:
        def __init__(self):
            tensor = torch.zeros(10)
            self.keys, self.view, self.more = tensor, tensor[2:], {"x": [torch.zeros(3, dtype=torch.int64)]}

    class Cache:
        layers = [Layer(), Layer()]

    assert models.cache_bytes(Cache()) == 2 * (40 + 24)
