"""Each example of docs/colt5_blocks.md, at the sizes of CoLT5-attention's README, runs on a CPU within 8 GiB."""

import re

import pytest
from helpers import ROOT, run_warm_python


pytestmark = pytest.mark.slow

PAGE = (ROOT / "docs/colt5_blocks.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"\n## ([^\n]+)\n(?:(?!\n## |```).)*```python\n(.*?)```", PAGE, re.S))
LIMIT = 8 * 2**30


def test_every_example_is_run():
    assert len(EXAMPLES) == PAGE.count("```python") == PAGE.count("\n## ") == 9


@pytest.mark.parametrize("name", EXAMPLES)
def test_example(name):
    """In a process of its own, which is the only way to see its peak of memory."""
    measure = "import resource\nprint(1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    code = f"import torch\ntorch.set_grad_enabled(False)\n{EXAMPLES[name]}\n{measure}"
    peak = int(run_warm_python("-c", code))
    print(f"{peak / 2**30:.2f} GiB")
    assert peak < LIMIT, "bytes at the peak"


def test_links_lead_somewhere():
    for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
