"""Python processes to which torch is known, and all else that transformers imports, but nothing of Hugging Face's.

transformers and huggingface_hub read their environment variables when they are imported, and hf_efficient looks at
what of transformers was imported before: a test about either needs processes that import them anew. These do, as forks
of one that has imported the rest, which is three quarters of the work.
"""

import tempfile
from pathlib import Path

from helpers import HIDING, ROOT, WITHOUT_THE_PACKAGE, output_of, variables_of
from warm_process import WarmProcess


HUGGING_FACE = ("accelerate", "datasets", "huggingface_hub", "peft", "safetensors", "tokenizers", "transformers")
# The parts of torch that transformers imports.
TORCH = "import torch._dynamo, torch.distributed.checkpoint, torch.distributed.fsdp, torch.distributed.tensor.parallel"
THE_REST = f"""
import contextlib, importlib, sys
{TORCH}
import fsspec, httpx2, jinja2, numpy, psutil, regex, tqdm.auto, yaml
for optional in ("pandas", "PIL.Image", "pyarrow", "scipy.stats", "sentencepiece"):
    with contextlib.suppress(ImportError):  # transformers does without what is not installed
        importlib.import_module(optional)
known = {{name.partition(".")[0] for name in sys.modules}}
assert not known & {{*{HUGGING_FACE!r}, "hf_efficient"}}, known
"""


class ProcessWithTorch(WarmProcess):
    def fits(self, environment: dict[str, str]) -> bool:
        return True


_warm = ProcessWithTorch(imports=THE_REST)


def run_python_with_torch(
    *arguments: object,
    cwd: Path | str = ROOT,
    environment: dict[str, str | None] | None = None,
    timeout: float = 300,
    **options,
) -> str:
    """As `helpers.run_python`; the variables may be others than those of the tests, if torch does not read them."""
    words = tuple(map(str, arguments))
    return output_of(*_warm.start(words, str(cwd), variables_of(environment), **options).wait(timeout))


def run_with_torch_and_without_package(
    code: str, *arguments: object, environment: dict[str, str] | None = None, timeout: float = 300
) -> str:
    """As `helpers.subprocess_without_package`, in an environment of its own."""
    hide = HIDING.format(hidden=set(WITHOUT_THE_PACKAGE))
    with tempfile.TemporaryDirectory() as empty:
        return run_python_with_torch(
            "-c", code, *arguments, cwd=empty, environment=environment, timeout=timeout, before=hide, isolated=True
        )
