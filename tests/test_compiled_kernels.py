"""The compiled code of the Triton kernels, run without a GPU: a few of their tests, with the tiles of sm_80 and sm_90.

`make compiled` runs them all. Run: pytest tests/test_compiled_kernels.py
"""

import re

import pytest
from helpers import run_python


pytest.importorskip("triton")
# Each kernel at least once, products in half precision and float32, and what an interpreter has no eye for.
CHOSEN = {
    "test_large_tensors_triton.py": "many and not bidirectional and not relu",
    "test_flash_attention_triton.py": "one-sided and half or steep_slopes or definition and (encoder or decoder)",
    "test_linear_attention_triton.py": "low_precision and softmax or decoding and softmax and not epsilon or beyond",
    "test_linear_attention_triton_gradients.py": "test_every_map and causal and (optimal or squared)",
    "test_linear_attention_triton_segments.py": "test_output_state_and_gradients and causal",
    "test_soft_topk_triton.py": "test_within_budget and masked and fp16 or test_every_shipped and 16385 and bf16",
}


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
@pytest.mark.parametrize("file", CHOSEN)
def test_as_compiled(file, target):
    environment = {"HF_EFFICIENT_COMPILED_FOR": target, "TRITON_INTERPRET": None}
    arguments = ("-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", f"tests/{file}", "-k", CHOSEN[file])
    printed = run_python(*arguments, environment=environment, timeout=600)
    assert re.search(r"^[1-9]\d* passed, \d+ deselected", printed, re.MULTILINE), printed


def test_an_unknown_target_is_refused():
    with pytest.raises(AssertionError, match="must be one of sm_80, sm_90, got 'sm_75'"):
        run_python("-m", "pytest", "-q", "tests/test_layout.py", environment={"HF_EFFICIENT_COMPILED_FOR": "sm_75"})
