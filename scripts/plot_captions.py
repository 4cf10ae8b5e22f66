"""Draws images with what a captioner writes about them; what is wrong is red, with what would have been right.

    python scripts/plot_captions.py --model_name_or_path outputs/captioner --output outputs/captions.png
    python scripts/plot_captions.py --model_name_or_path me/model --images cat.jpg dog.jpg --output captions.png

Without images it takes generated ones whose captions were held out from training (`captioned_shapes.py`).
"""

import sys
import textwrap
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import PIL.Image
import torch
from captioned_shapes import captioned_shapes
from transformers import AutoModelForImageTextToText, AutoProcessor, HfArgumentParser

import hf_efficient  # noqa: F401  (registers our architectures with the Auto classes)


@dataclass
class PlotArguments:
    """What to draw."""

    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a captioner."})
    output: str = field(metadata={"help": "File for the figure; the suffix says the format."})
    images: list[str] | None = field(default=None, metadata={"help": "Image files; default: held-out shapes."})
    num_images: int = field(default=12, metadata={"help": "How many shapes without --images."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run the code that stands beside a checkpoint."})

    def __post_init__(self):
        if self.num_images < 1:
            raise ValueError(f"--num_images must be at least 1, got {self.num_images}")


def read_images(files: list[str] | None, count: int) -> list[tuple[PIL.Image.Image, str | None]]:
    """Images, and captions where they are known."""
    if files is None:
        return list(captioned_shapes(count, held_out=True, seed=2))
    try:
        return [(PIL.Image.open(name).convert("RGB"), None) for name in files]
    except OSError as error:
        raise ValueError(f"--images must be readable image files: {error}") from error


@torch.no_grad()
def write_captions(model, processor, images: list[PIL.Image.Image]) -> list[str]:
    """What the model writes about each image, greedily."""
    pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.device, model.dtype)
    return processor.tokenizer.batch_decode(model.generate(pixel_values=pixels), skip_special_tokens=True)


def draw(rows: list[tuple[PIL.Image.Image, str | None]], captions: list[str], output: str) -> None:
    columns = min(4, len(rows))
    lines = -(-len(rows) // columns)
    figure, axes = plt.subplots(lines, columns, figsize=(2.6 * columns, 2.9 * lines), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, (image, wanted), caption in zip(axes.flat, rows, captions, strict=False):
        wrong = wanted is not None and caption != wanted
        text = textwrap.fill(caption, 30) + (f"\n({textwrap.fill(wanted, 30)})" if wrong else "")
        axis.imshow(image, interpolation="nearest")
        axis.set_title(text, fontsize=7, color="firebrick" if wrong else "black")
    figure.tight_layout()
    figure.savefig(output, dpi=110)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> list[str]:
    """Runs one command line; returns the captions."""
    (parsed,) = HfArgumentParser([PlotArguments]).parse_args_into_dataclasses(
        sys.argv[1:] if arguments is None else arguments
    )
    options = {"trust_remote_code": parsed.trust_remote_code}
    model = AutoModelForImageTextToText.from_pretrained(parsed.model_name_or_path, **options).eval()
    processor = AutoProcessor.from_pretrained(parsed.model_name_or_path, **options)
    rows = read_images(parsed.images, parsed.num_images)
    captions = write_captions(model, processor, [image for image, _ in rows])
    draw(rows, captions, parsed.output)
    return captions


if __name__ == "__main__":
    main()
