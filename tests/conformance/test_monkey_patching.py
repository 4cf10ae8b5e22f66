"""transformers' tests of its class-replacing patches, with our package registered, which must not disturb them."""

from .harness import MonkeyPatchTest  # noqa: F401
