"""Images as inputs of a Perceiver: a stem, patches, and positions that are appended to the channels."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init

from .image_patches import resized_positions


class DownsamplingConvolution(nn.Module):
    """7×7 convolution of stride 2, batch norm, ReLU, and 3×3 maximum of stride 2 (arXiv 2107.14795, section H)."""

    def __init__(self, channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        images = self.conv(images)
        return F.max_pool2d(F.relu(self.norm(images)), kernel_size=3, stride=2)


class PerceiverFlashImagePositions(nn.Module):
    """Positions of a grid of rows and columns, in [-1, 1] along each axis.

    `"fourier"` (arXiv 2103.03206): the two coordinates, sines and cosines of π f x for f linear from 1 to half of the
    resolution. `"gaussian_fourier"` (arXiv 2006.10739): sines of 2π x·f for fixed random f. `"nerf"`
    (arXiv 2003.08934): sines and cosines of π 2^i x. `"learned"`: a table, interpolated for other sizes. `"none"`.
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.kind = config, config.image_position_encoding
        if self.kind == "learned":
            rows, columns = config.image_grid(*config.image_size)
            self.table = nn.Parameter(torch.empty(rows * columns, config.position_channels))
        elif self.kind == "gaussian_fourier":
            # Saved with the weights, which were trained with these frequencies.
            self.register_buffer("frequencies", torch.empty(2, config.num_frequency_bands))
        self.projection = None
        if config.project_positions and self.kind != "none":
            self.projection = nn.Linear(config.position_channels, config.position_size or config.position_channels)

    def reset(self) -> None:
        """Initial values, for `_init_weights`."""
        if self.kind == "learned":
            init.trunc_normal_(self.table, std=self.config.initializer_range)
        elif self.kind == "gaussian_fourier":
            init.normal_(self.frequencies, std=self.config.fourier_scale)

    def forward(self, rows: int, columns: int, like: torch.Tensor) -> torch.Tensor | None:
        """`[rows * columns, C]` in the dtype and on the device of `like`; None for no positions."""
        if self.kind == "none":
            return None
        if self.kind == "learned":
            known = self.config.image_grid(*self.config.image_size)
            positions = resized_positions(self.table, known, (rows, columns))
        else:
            axes = [torch.linspace(-1, 1, count, device=like.device) for count in (rows, columns)]
            grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
            positions = getattr(self, f"_{self.kind}")(grid).to(like.dtype)
        return positions if self.projection is None else self.projection(positions)

    def _fourier(self, grid):
        bands = self.config.num_frequency_bands
        frequencies = torch.stack(
            [
                torch.linspace(1.0, resolution / 2, bands, device=grid.device)
                for resolution in self.config.image_max_resolution
            ]
        )
        angles = math.pi * (grid[..., None] * frequencies).flatten(1)
        return torch.cat([grid, angles.sin(), angles.cos()], dim=-1)

    def _gaussian_fourier(self, grid):
        return torch.sin(2 * math.pi * grid @ self.frequencies.to(grid.dtype))

    def _nerf(self, grid):
        frequencies = 2.0 ** torch.arange(self.config.num_frequency_bands, device=grid.device)
        angles = math.pi * grid[..., None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)


class PerceiverFlashImageAdapter(nn.Module):
    """`pixel_values` of any height and width to inputs `[B, rows * columns, input_size]`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.stem = nn.Identity()
        if config.image_stem == "conv1x1":
            self.stem = nn.Conv2d(config.num_channels, config.image_stem_channels, kernel_size=1)
        elif config.image_stem == "conv":
            self.stem = DownsamplingConvolution(config.num_channels, config.image_stem_channels)
        self.positions = PerceiverFlashImagePositions(config)
        self.projection = nn.Identity()
        if config.project_image:
            channels, size = config.image_channels, config.input_size
            norms = [nn.LayerNorm(width, eps=config.layer_norm_eps) for width in (channels, size)]
            self.projection = nn.Sequential(norms[0], nn.Linear(channels, size), norms[1])

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """`[B, C, H, W]`, or `[B, H, W, C]` with `channels_last`, floating point.

        Raises:
            ValueError: another shape or dtype, or sides that are no multiple of the patch.
        """
        config = self.config
        axis = 3 if config.channels_last else 1
        shape = tuple(pixel_values.shape)
        if len(shape) != 4 or shape[axis] != config.num_channels or not pixel_values.is_floating_point():
            order = "height, width, channels" if config.channels_last else "channels, height, width"
            raise ValueError(
                f"pixel_values must be floating point [batch, {order}] with {config.num_channels} channels, got "
                f"{pixel_values.dtype} of shape {shape}"
            )
        images = self.stem(pixel_values.permute(0, 3, 1, 2) if config.channels_last else pixel_values)
        side = config.patch_size
        (height, width), channels = images.shape[2:], images.shape[1]
        if height % side or width % side:
            raise ValueError(f"height and width must be multiples of patch_size ({side}), got {height} and {width}")
        rows, columns = height // side, width // side
        patches = images.reshape(-1, channels, rows, side, columns, side).permute(0, 2, 4, 3, 5, 1)
        inputs = patches.reshape(-1, rows * columns, side * side * channels)
        positions = self.positions(rows, columns, inputs)
        if positions is not None:
            inputs = torch.cat([inputs, positions.expand(inputs.shape[0], -1, -1)], dim=-1)
        return self.projection(inputs)
