"""Where the tests of kernels run them: on a GPU, by the interpreter, or as compiled code on a CPU (`ptx_driver`)."""

import os

import torch


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small tiles of their own, numpy's arithmetic. Otherwise the tiles and the arithmetic of a GPU, wherever that is.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
