"""Draws where the latents of a PerceiverFlash look: a cross-attention's weights over images, latent by latent.

    python scripts/plot_latents.py --model_name_or_path outputs/digits --output outputs/latents.png
    python scripts/plot_latents.py --model_name_or_path me/model --images cat.jpg dog.jpg --output latents.png

Without images it takes the first of scikit-learn's held-out digits. Of the latents it shows those whose weights are
the least spread out over the images (by entropy, mean over heads); each map has a colour scale of its own.
"""

import sys
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import numpy as np
import PIL.Image
import torch
from image_sources import digits
from task_image_classification import MODES, ImageCollator
from transformers import AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser, PreTrainedModel

import hf_efficient  # noqa: F401  (registers our architectures with the Auto classes)


@dataclass
class PlotArguments:
    """What to draw."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a PerceiverFlash image classifier."})
    output: str = field(metadata={"help": "File for the figure; the suffix says the format."})
    images: list[str] | None = field(default=None, metadata={"help": "Image files; default: held-out digits."})
    num_images: int = field(default=5, metadata={"help": "How many digits without --images."})
    num_latents: int = field(default=8, metadata={"help": "How many latents to show."})
    cross_attention: int = field(default=0, metadata={"help": "Which cross-attention, counted from 0."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that stands beside a checkpoint."})

    def __post_init__(self):
        for name, least in (("num_images", 1), ("num_latents", 1), ("cross_attention", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")


def read_images(files: list[str] | None, count: int) -> list[PIL.Image.Image]:
    if files is None:
        return digits().held_out[:count]["image"]
    try:
        return [PIL.Image.open(name) for name in files]
    except OSError as error:
        raise ValueError(f"--images must be readable image files: {error}") from error


@torch.no_grad()
def latent_maps(model: PreTrainedModel, pixel_values: torch.Tensor, cross_attention: int = 0) -> torch.Tensor:
    """Weights `[B, M, rows, columns]` of M latents on a grid of inputs, mean over heads; each map sums to 1.

    Learned tokens in front of the input are left out.

    Raises:
        ValueError: a model of another kind, or no such cross-attention.
    """
    config = model.config
    if config.model_type != "perceiver_flash" or config.modality != "image":
        raise ValueError(f"the model must be a perceiver_flash of images, got {config.model_type!r}")
    places = [place for place, (_, is_cross) in enumerate(config.layer_schedule) if is_cross]
    if cross_attention >= len(places):
        raise ValueError(f"--cross_attention must be below {len(places)}, got {cross_attention}")
    model.set_attn_implementation("eager")  # the only one that gives out its weights
    model.model.config.cross_attention_chunk_size = None  # an explicit size refuses maps
    weights = model.eval()(pixel_values=pixel_values, output_attentions=True).attentions[places[cross_attention]]
    weights = weights.mean(dim=1)[..., config.num_zero_tokens :]
    size = pixel_values.shape[1:3] if config.channels_last else pixel_values.shape[2:]
    maps = weights / weights.sum(dim=-1, keepdim=True)
    return maps.unflatten(-1, config.image_grid(*size))


def most_focused(maps: torch.Tensor, count: int) -> list[int]:
    """Numbers of the latents whose maps `[B, M, rows, columns]` have the least entropy, mean over images."""
    entropy = -(maps * maps.clamp(min=1e-12).log()).sum(dim=(-2, -1)).mean(dim=0)
    return entropy.argsort()[:count].sort().values.tolist()


def draw(images: list[PIL.Image.Image], maps: torch.Tensor, names: list[str], latents: list[int], path: str) -> None:
    """One row for each image: the image with what it was taken for, then the map of each latent."""
    figure, axes = plt.subplots(
        len(images), 1 + len(latents), figsize=(1.2 * (1 + len(latents)), 1.3 * len(images)), squeeze=False
    )
    for row, (image, name) in enumerate(zip(images, names, strict=True)):
        pixels = np.asarray(image)
        axes[row, 0].imshow(pixels, cmap="gray" if pixels.ndim == 2 else None)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
        for column, latent in enumerate(latents, start=1):
            # Maps are stretched over the image, as the image processor stretches the image.
            axes[row, column].imshow(
                maps[row, latent], cmap="magma", extent=(0, image.width, image.height, 0), aspect="equal"
            )
    for column, latent in enumerate(latents, start=1):
        axes[0, column].set_title(f"latent {latent}", fontsize=8)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[int]:
    """Runs one command line; returns the numbers of the latents that are shown."""
    (options,) = HfArgumentParser(PlotArguments).parse_args_into_dataclasses(arguments)
    hub = {"trust_remote_code": options.trust_remote_code}
    model = AutoModelForImageClassification.from_pretrained(options.model_name_or_path, **hub)
    processor = AutoImageProcessor.from_pretrained(options.model_name_or_path, **hub)
    images = read_images(options.images, options.num_images)
    mode = MODES[model.config.num_channels]
    batch = ImageCollator(processor, mode, model.config.channels_last)([{"image": i, "label": 0} for i in images])
    maps = latent_maps(model, batch["pixel_values"], options.cross_attention)
    latents = most_focused(maps, options.num_latents)
    with torch.no_grad():
        found = model(pixel_values=batch["pixel_values"]).logits.argmax(dim=-1)
    names = [model.config.id2label[index] for index in found.tolist()]
    draw([image.convert(mode) for image in images], maps, names, latents, options.output)
    print(f"saved to {options.output}")
    return latents


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"plot_latents.py: {error}")
