"""The choice between Triton and eager: kernels/backend.py."""

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers import run_python
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from hf_efficient.kernels import backend
from hf_efficient.kernels.backend import (
    device_guard,
    gpu_architecture,
    is_observed,
    multiprocessor_count,
    resolve_backend,
)


@pytest.fixture(autouse=True)
def nothing_explained_yet(monkeypatch):
    monkeypatch.setattr(backend, "_explained", set())


def on_gpu(kind="cuda"):
    """What resolve_backend looks at in a tensor, on a machine without a GPU."""
    return SimpleNamespace(device=torch.device(kind, 0))


class Driver:
    def __init__(self, target):
        self.get_current_target = target

    def get_current_device(self):
        return 0


def live_triton(target=lambda: "cuda:90"):
    return SimpleNamespace(runtime=SimpleNamespace(driver=SimpleNamespace(active=Driver(target))))


@pytest.mark.parametrize("name", ["cuda", "Triton", "", None])
def test_unknown_backend_is_refused(name):
    with pytest.raises(ValueError, match=r"backend must be one of 'auto', 'triton', 'eager', got"):
        resolve_backend(name, torch.ones(1))


def test_tensors_on_several_devices_are_refused():
    with pytest.raises(ValueError, match="one device, got cpu, cuda:0"):
        resolve_backend("eager", torch.ones(1), on_gpu())
    with pytest.raises(ValueError, match="got no tensor"):
        resolve_backend("auto")


def test_eager_is_always_eager():
    assert resolve_backend("eager", on_gpu()) == "eager"


@pytest.mark.parametrize("interpret", ["0", "1"])
def test_auto_on_a_cpu_is_eager_whatever_the_interpreter(monkeypatch, interpret):
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    assert resolve_backend("auto", torch.ones(1)) == "eager"


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(backend, "triton", live_triton())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert resolve_backend("triton", torch.ones(1)) == "triton"
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(RuntimeError, match="the tensors are on 'cpu', not on a GPU"):
        resolve_backend("triton", torch.ones(1))


def test_auto_on_a_gpu_takes_triton(monkeypatch):
    monkeypatch.setattr(backend, "triton", live_triton())
    assert resolve_backend("auto", on_gpu(), on_gpu()) == "triton"
    assert resolve_backend("auto", on_gpu("xpu")) == "triton"


def no_driver():
    raise RuntimeError("0 active drivers")


@pytest.mark.parametrize(
    ("installed", "unsupported", "reason"),
    [
        pytest.param(None, None, "Triton is not installed", id="no-triton"),
        pytest.param(live_triton(no_driver), None, "no live GPU driver .RuntimeError: 0 active", id="no-driver"),
        pytest.param(live_triton(), "an_op has no kernel for float64", "an_op has no kernel for float64", id="op"),
    ],
)
def test_auto_says_once_why_a_gpu_is_not_used_and_triton_raises_it(
    monkeypatch, caplog, installed, unsupported, reason
):
    monkeypatch.setattr(backend, "triton", installed)
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        for _ in range(3):
            assert resolve_backend("auto", on_gpu(), unsupported_reason=unsupported) == "eager"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    with pytest.raises(RuntimeError, match=reason) as raised:
        resolve_backend("triton", on_gpu(), unsupported_reason=unsupported)
    assert record.message.partition(": ")[2] in str(raised.value)


def test_eager_on_a_cpu_is_no_reason_to_warn(caplog):
    with caplog.at_level(logging.INFO, logger=backend.__name__):
        resolve_backend("auto", torch.ones(1))
    assert [record.levelno for record in caplog.records] == [logging.INFO]


def test_the_choice_does_not_break_a_compiled_graph():
    def double(tensor):
        assert resolve_backend("auto", tensor, unsupported_reason="doubling has no kernels") == "eager"
        return 2 * tensor

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    assert compiled(torch.ones(2)).tolist() == [2, 2]


@pytest.mark.parametrize(
    ("kind", "arch", "architecture"),
    [
        ("cuda", 80, "sm_80"),
        ("cuda", 86, "sm_80"),
        ("cuda", 90, "sm_90"),
        ("cuda", 100, "sm_90"),
        ("cuda", 120, "sm_80"),  # a consumer card: newer, with the small shared memory of the older ones
        ("hip", "gfx942", "gfx942"),
        ("hip", "gfx90a", "gfx942"),
    ],
)
def test_every_gpu_has_launch_tables(monkeypatch, kind, arch, architecture):
    monkeypatch.setattr(backend, "triton", live_triton(lambda: SimpleNamespace(backend=kind, arch=arch)))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert gpu_architecture() == architecture
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu_architecture() == "interpreter"


def test_a_launch_happens_on_the_gpu_of_its_tensors(monkeypatch):
    entered = []

    class Guard:
        def __init__(self, device):
            self.device = device

        def __enter__(self):
            entered.append(self.device)

        def __exit__(self, *_):
            entered.append(None)

    properties = SimpleNamespace(multi_processor_count=17)
    module = SimpleNamespace(device=Guard, get_device_properties=lambda device: properties)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    tensor = SimpleNamespace(device=torch.device("cuda", 1))
    with device_guard(tensor):
        assert entered == [torch.device("cuda", 1)]
    assert entered == [torch.device("cuda", 1), None]
    assert multiprocessor_count(tensor) == 17
    with device_guard(torch.ones(1)):
        assert len(entered) == 2
    assert multiprocessor_count(torch.ones(1)) == 2


def test_who_looks_on():
    """Compiler, tracers, function transforms, dispatch modes and subclasses; an autograd graph alone does not."""
    seen = []

    def look(tensor):
        seen.append(is_observed(tensor))
        return tensor * 2

    leaf = torch.ones(3, requires_grad=True)
    look(leaf).sum().backward()
    look(torch.nn.Parameter(torch.ones(3)))
    assert seen == [False, False]
    torch.compile(look, backend="eager")(torch.ones(3))
    torch.jit.trace(look, torch.ones(3), check_trace=False)
    torch.func.grad(lambda x: look(x).sum())(torch.ones(3))
    torch.func.vmap(look)(torch.ones(3, 2))
    make_fx(look)(torch.ones(3))
    make_fx(look, tracing_mode="fake")(torch.ones(3))
    with FakeTensorMode() as mode:
        look(mode.from_tensor(torch.ones(3)))
    look(mode.from_tensor(torch.ones(3)))
    assert seen[2:] == [True] * 8


FIRST_CALL = """
import torch

import hf_efficient.kernels.backend

torch.set_num_threads(2)
torch.manual_seed(0)
rows, columns = torch.randn(8, 128, 64), 0.3 * torch.randn(8, 64, 266)


def exponentials():
    torch.softmax(torch.bmm(rows, columns), dim=-1)
    logits = torch.bmm(rows, columns)
    return logits.sub_(logits.amax(dim=-1, keepdim=True)).exp_()


assert torch.equal(exponentials(), exponentials())
"""


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")
def test_the_first_exponentials_of_a_process_are_as_good_as_the_next():
    """Without the first call in backend.py some processes get them wrong, hence four: five of five runs failed."""
    for _ in range(4):
        run_python("-c", FIRST_CALL)
