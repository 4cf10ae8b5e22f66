"""A routed block on disk: its weights as safetensors, its constructor's arguments as JSON. Nothing that is code.

    block = load_routed_block("converted")    # a folder that scripts/convert.py --source colt5_attention wrote

Whole models have `from_pretrained`; this is for the blocks one puts into a model of one's own.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..modeling.routed_attention import RoutedAttention, RoutedCrossAttention
from ..modeling.routed_autoregressive_attention import RoutedAutoregressiveAttention
from ..modeling.routed_block import RoutedTransformerBlock
from ..modeling.routed_feed_forward import RoutedFeedForward
from ..modeling.routed_image_attention import RoutedImageAttention
from ..modeling.token_router import RouterOptions


BLOCKS = {
    block.__name__: block
    for block in (
        RoutedFeedForward,
        RoutedAttention,
        RoutedCrossAttention,
        RoutedAutoregressiveAttention,
        RoutedImageAttention,
        RoutedTransformerBlock,
    )
}
DESCRIPTION, WEIGHTS = "block.json", "block.safetensors"


class BlockDescription(NamedTuple):
    """The name of a block's class, one of `BLOCKS`, its width and its other arguments."""

    name: str
    hidden_size: int
    options: dict[str, Any]

    def build(self) -> nn.Module:
        return BLOCKS[self.name](self.hidden_size, **self.options)


def save_routed_block(block: nn.Module, description: BlockDescription, folder: str | Path) -> None:
    """Write both files to a folder that exists."""
    folder = Path(folder)
    save_file({name: tensor.contiguous() for name, tensor in block.state_dict().items()}, folder / WEIGHTS)
    (folder / DESCRIPTION).write_text(json.dumps(_plain(description._asdict()), indent=2) + "\n", encoding="utf-8")


def load_routed_block(folder: str | Path) -> nn.Module:
    """The block that `save_routed_block` wrote, in evaluation mode, in the dtype it was saved in.

    Raises:
        ValueError: no such folder, a file that is not whole, or one that is about something else.
    """
    path = Path(folder) / DESCRIPTION
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        description = BlockDescription(found["name"], found["hidden_size"], _with_router_options(found["options"]))
        block, weights = description.build(), load_file(Path(folder) / WEIGHTS)
        for tensor in weights.values():
            block.to(tensor.dtype)
        block.load_state_dict(weights)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise ValueError(
            f"folder must hold {DESCRIPTION} and {WEIGHTS} of one routed block, got {str(folder)!r}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return block.eval()


def _plain(value):
    """`value` with dicts in the place of `RouterOptions`."""
    if isinstance(value, RouterOptions):
        return value._asdict()
    return {key: _plain(item) for key, item in value.items()} if isinstance(value, dict) else value


def _with_router_options(options: dict) -> dict:
    found = {}
    for key, value in options.items():
        if key == "router_options":
            found[key] = RouterOptions(**value)
        else:
            found[key] = _with_router_options(value) if isinstance(value, dict) else value
    return found
