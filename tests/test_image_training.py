"""scripts/train.py --objective image_classification: real scans and folders of images, through an image processor."""

import json

import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import ModelCard
from load_script import load_script
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_efficient import PerceiverFlashConfig, PerceiverFlashForImageClassification


train = load_script("train")
image_sources = load_script("image_sources")
plot_latents = load_script("plot_latents")

TINY = (
    "hidden_size=16,num_latents=4,num_self_attention_layers=1,num_attention_heads=2,num_cross_attention_heads=1,"
    "num_query_attention_heads=1,num_frequency_bands=2,intermediate_size=16,cross_intermediate_size=16,"
    "initializer_range=0.2"
)


def command(output, *more, overrides=TINY, steps=20):
    return [
        *("--model_type", "perceiver_flash", "--objective", "image_classification"),
        *("--config_overrides", overrides, "--do_train", "--do_eval", "--max_steps", str(steps)),
        *("--per_device_train_batch_size", "16", "--output_dir", str(output), "--report_to", "none"),
        *("--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", *more),
    ]


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Colour images of many sizes, none of them square, in folders by class: bright above or bright below."""
    folder, random = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for index in range(48):
        name = ("above", "below")[index % 2]
        height, width = random.integers(10, 30, 2)
        pixels = random.integers(0, 120, (height, width + height, 3), dtype=np.uint8)
        half = slice(None, height // 2) if name == "above" else slice(height // 2, None)
        pixels[half] += 120
        path = folder / name / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(pixels).save(path)
    return folder


def test_digits_are_real_scans_split_by_class():
    splits = image_sources.digits()
    assert (len(splits.train), len(splits.held_out)) == (1437, 360)
    assert splits.size == (8, 8) and splits.labels == [str(digit) for digit in range(10)]
    counts = np.bincount(splits.held_out["label"])
    assert counts.min() >= 35 and counts.max() <= 37
    pixels = np.asarray(splits.train[0]["image"])
    assert pixels.shape == (8, 8) and pixels.max() == 255 and pixels.min() == 0
    # No scan stands on both sides.
    sides = [{np.asarray(image).tobytes() for image in part["image"]} for part in (splits.train, splits.held_out)]
    assert not sides[0] & sides[1]


def test_digits_train_and_load(tmp_path):
    """What is saved gives the accuracy that was measured, through its own processor; and its latents are drawn."""
    metrics = train.main(command(tmp_path / "model", "--max_eval_samples", "90", "--learning_rate", "5e-3", steps=150))
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "model")
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert (model.config.image_size, model.config.num_channels) == ([8, 8], 1)
    assert model.config.id2label[7] == "7" and processor.size["height"] == 8
    rows = image_sources.digits().held_out.select(range(90))
    pixels = processor(list(rows["image"]), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (90, 1, 8, 8) and pixels.min() == -1 and pixels.max() == 1
    found = model(pixel_values=pixels).logits.argmax(dim=-1)
    measured = (found == torch.tensor(rows["label"])).float().mean().item()
    assert measured == pytest.approx(metrics["eval_accuracy"], abs=1e-6) and measured > 0.2
    card = ModelCard.load(tmp_path / "model/README.md").data
    assert (card.pipeline_tag, card.metrics) == ("image-classification", ["accuracy"])
    latents = plot_latents.main(
        ["--model_name_or_path", str(tmp_path / "model"), "--output", str(tmp_path / "a.png"), "--num_latents", "3"]
    )
    assert len(latents) == 3 and PIL.Image.open(tmp_path / "a.png").width > 300


def test_a_folder_of_images_of_all_sizes(photographs, tmp_path):
    options = ["--image_folder", str(photographs), "--validation_split_percentage", "25", "--learning_rate", "1e-2"]
    overrides = TINY + ",image_size=[8,12],patch_size=2"
    metrics = train.main(command(tmp_path / "model", *options, overrides=overrides, steps=60))
    assert metrics["train_images"] == 36 and metrics["eval_accuracy"] > 0.8
    config = json.loads((tmp_path / "model/config.json").read_text())
    assert config["num_channels"] == 3 and config["id2label"] == {"0": "above", "1": "below"}
    # Fine-tuned on, with its own processor.
    more = ["--model_name_or_path", str(tmp_path / "model"), *command(tmp_path / "more", *options, steps=2)[6:]]
    assert train.main(["--objective", "image_classification", *more])["eval_accuracy"] > 0.5


def test_a_folder_that_has_a_test_split(photographs, tmp_path):
    for split, start in (("train", 0), ("test", 40)):
        for name in ("above", "below"):
            (tmp_path / split / name).mkdir(parents=True)
            for path in photographs.glob(f"{name}/*.png"):
                if (int(path.stem) >= 40) == (start == 40):
                    (tmp_path / split / name / path.name).write_bytes(path.read_bytes())
    splits = image_sources.load_images(image_folder=str(tmp_path))
    assert (len(splits.train), len(splits.held_out), splits.size) == (40, 8, None)
    assert "held out: its 'test' split" in splits.description


@pytest.mark.parametrize(
    "words, message",
    [
        (("--image_folder", "nowhere"), "--image_folder must be an existing folder"),
        (("--image_folder", "a", "--dataset_name", "b"), "at most one of --image_folder, --dataset_name"),
        (("--train_file", "a.txt"), "--train_file is for text"),
        (("--block_size", "8"), "--block_size belongs to --objective"),
        (("--validation_split_percentage", "100"), "must lie between 0 and 100"),
    ],
)
def test_what_is_refused(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        train.main(command(tmp_path, *words))


def test_latent_maps_are_the_weights_of_a_grid():
    torch.manual_seed(0)
    config = PerceiverFlashConfig(
        modality="image", image_size=[4, 6], num_channels=1, patch_size=2, hidden_size=16, num_latents=5,
        num_self_attention_layers=1, num_cross_attention_layers=2, num_attention_heads=2, num_query_attention_heads=1,
        num_cross_attention_heads=2, num_zero_tokens=2, num_frequency_bands=2,
    )  # fmt: skip
    model = PerceiverFlashForImageClassification(config)
    maps = plot_latents.latent_maps(model, torch.randn(3, 1, 4, 8), 1)
    assert maps.shape == (3, 5, 2, 4)
    torch.testing.assert_close(maps.sum(dim=(-2, -1)), torch.ones(3, 5))
    with pytest.raises(ValueError, match="--cross_attention must be below 2, got 2"):
        plot_latents.latent_maps(model, torch.randn(3, 1, 4, 8), 2)
    sharp = torch.full((1, 3, 2, 2), 0.25)
    sharp[0, 1] = torch.tensor([[1.0, 0], [0, 0]])
    assert plot_latents.most_focused(sharp, 1) == [1]
