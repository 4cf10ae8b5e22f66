"""What the weights of a release of x-transformers mean: it changed that without a mark in its files."""

from .weight_transfer import ConversionError


class Era:
    """The rules of one release, from its version number such as `"2.31.10"`."""

    def __init__(self, version: str):
        try:
            self.version = tuple(int(part) for part in version.split("."))
        except ValueError:
            raise ConversionError(f"version must look like '2.31.10', got {version!r}") from None
        self.text = version
        before = self._before
        self.norm_bias = self.head_bias = before(1, 27)
        self.norm_weight = "weight" if before(1, 30, 17) else "gamma"
        self.unit_offset = not before(1, 31, 3)
        self.interleaved_rotary = not before(1, 30)
        self.smallest_rotary_dim = 32 if before(1, 42, 18) else 0
        self.residual_talking_heads = not before(1, 39)
        self.rotated_values = before(1, 20)
        self.biased_value_gate = before(2, 26)
        self.scaled_tied_head = not before(2, 31)

    def _before(self, *version: int) -> bool:
        return self.version < version

    def __str__(self):
        return self.text
