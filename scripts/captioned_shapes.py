"""Images of shapes with captions: drawn and worded by a small grammar, so that what is true of an image is known.

    caption    = scene "on a" ("black" | "grey" | "white") "background"
    scene      = "a" object place
               | "a" object ("left of" | "above") "a" object
               | ("two" | "three") objects ("in a row" | "in a column")
    object     = ("small" | "large") colour shape
    colour     = "red" | "green" | "blue" | "yellow" | "purple" | "orange"
    shape      = "circle" | "square" | "triangle" | "cross"
    place      = "in the centre" | "at the top" | "at the bottom" | "on the left" | "on the right"

A pair is always told from left to right or from top to bottom, so that each image has one caption. Places and sizes
tremble by a pixel or two, and every image has noise: no two are alike. 14,832 captions are possible. One in ten of
them, by a hash of its words, is held out: no image of a held-out combination is ever trained on.
"""

import hashlib
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw


SIZES = {"small": 3.2, "large": 6.2}  # half of the width of a shape, in pixels
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 170),
    "orange": (240, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
BACKGROUNDS = {"black": 10, "grey": 128, "white": 245}
PLACES = {
    "in the centre": (0.0, 0.0),
    "at the top": (0.0, -1.0),
    "at the bottom": (0.0, 1.0),
    "on the left": (-1.0, 0.0),
    "on the right": (1.0, 0.0),
}
RELATIONS = {"left of": (1.0, 0.0), "above": (0.0, 1.0)}  # from the first object to the second
NUMBERS = {"two": 2, "three": 3}
DIRECTIONS = {"in a row": (1.0, 0.0), "in a column": (0.0, 1.0)}
SIDE = 32  # pixels
HELD_OUT_ONE_IN = 10

# What is drawn: size, colour, shape, and the place of its middle, in pixels.
Drawn = tuple[str, str, str, float, float]


def is_held_out(caption: str) -> bool:
    """Whether images with this caption are for evaluation, the same ones everywhere and always."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:4]) % HELD_OUT_ONE_IN == 0


def captioned_shapes(count: int, *, held_out: bool, seed: int) -> Iterator[tuple[Image.Image, str]]:
    """`count` images of 32×32 pixels and their captions, all of them held out or none."""
    random = np.random.default_rng(seed)
    made = 0
    while made < count:
        caption, drawn, background = _scene(random)
        if is_held_out(caption) == held_out:
            made += 1
            yield _draw(drawn, background, random), caption


def _scene(random: np.random.Generator) -> tuple[str, list[Drawn], str]:
    def choose(options):
        options = list(options)
        return options[random.integers(len(options))]

    def thing():
        return choose(SIZES), choose(COLOURS), choose(SHAPES)

    background = choose(BACKGROUNDS)
    middle = SIDE / 2
    kind = random.choice(["one", "pair", "several"], p=[0.2, 0.55, 0.25])
    if kind == "one":
        object_, place = thing(), choose(PLACES)
        across, down = PLACES[place]
        words = f"a {' '.join(object_)} {place}"
        drawn = [(*object_, middle + 8 * across, middle + 8 * down)]
    elif kind == "pair":
        first, second, relation = thing(), thing(), choose(RELATIONS)
        across, down = RELATIONS[relation]
        words = f"a {' '.join(first)} {relation} a {' '.join(second)}"
        drawn = [(*first, middle - 8 * across, middle - 8 * down), (*second, middle + 8 * across, middle + 8 * down)]
    else:
        number, direction = choose(NUMBERS), choose(DIRECTIONS)
        object_ = ("small", *thing()[1:])  # three large ones have no room
        across, down = DIRECTIONS[direction]
        plural = "crosses" if object_[2] == "cross" else f"{object_[2]}s"
        words = f"{number} {object_[0]} {object_[1]} {plural} {direction}"
        steps = np.arange(NUMBERS[number]) - (NUMBERS[number] - 1) / 2
        drawn = [(*object_, middle + 9 * step * across, middle + 9 * step * down) for step in steps]
    return f"{words} on a {background} background", drawn, background


def _draw(drawn: list[Drawn], background: str, random: np.random.Generator) -> Image.Image:
    """Drawn at four times the size and made smaller, so that edges are smooth."""
    scale = 4
    image = Image.new("RGB", (SIDE * scale, SIDE * scale), (BACKGROUNDS[background],) * 3)
    pen = ImageDraw.Draw(image)
    for size, colour, shape, across, down in drawn:
        half = SIZES[size] * random.uniform(0.9, 1.1) * scale
        x, y = (scale * (middle + random.uniform(-1, 1)) for middle in (across, down))
        box = (x - half, y - half, x + half, y + half)
        if shape == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif shape == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        elif shape == "triangle":
            pen.polygon([(x, y - half), (x - half, y + half), (x + half, y + half)], fill=COLOURS[colour])
        else:
            pen.rectangle((x - half, y - half / 3, x + half, y + half / 3), fill=COLOURS[colour])
            pen.rectangle((x - half / 3, y - half, x + half / 3, y + half), fill=COLOURS[colour])
    pixels = np.asarray(image.resize((SIDE, SIDE), Image.Resampling.BOX), dtype=np.float32)
    noisy = pixels + random.normal(0, 6, pixels.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
