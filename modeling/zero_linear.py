"""A linear layer that starts as a constant."""

from torch import nn
from transformers import initialization as init


class ZeroLinear(nn.Linear):
    """A linear layer whose weights start at zero and whose bias, if it has one, starts at `initial_bias`.

    A class of its own because transformers initialises the modules of custom code one by one, and asks only those
    that hold parameters themselves.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, initial_bias: float = 0.0):
        super().__init__(in_features, out_features, bias=bias)
        self.initial_bias = initial_bias

    def set_initial_values(self) -> None:
        init.zeros_(self.weight)
        if self.bias is not None:
            init.constant_(self.bias, self.initial_bias)
