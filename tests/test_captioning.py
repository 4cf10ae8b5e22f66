"""scripts/train.py --objective captioning: images of shapes whose captions are true, or a folder of one's own."""

import json

import numpy as np
import PIL.Image
import pytest
from load_script import load_script
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline


train = load_script("train")
captioned_shapes = load_script("captioned_shapes")
plot_captions = load_script("plot_captions")

TINY = "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,patch_size=8"


def command(output, *more, steps=4):
    return [
        *("--model_type", "x_transformer", "--objective", "captioning", "--config_overrides", TINY),
        *("--do_train", "--do_eval", "--max_steps", str(steps), "--per_device_train_batch_size", "8"),
        *("--max_train_samples", "40", "--max_eval_samples", "6", "--output_dir", str(output), "--report_to", "none"),
        *("--use_cpu", "true", "--disable_tqdm", "true", "--save_strategy", "no", *map(str, more)),
    ]


def made(count, held_out=False, seed=0):
    return list(captioned_shapes.captioned_shapes(count, held_out=held_out, seed=seed))


def test_no_held_out_caption_is_trained_on_and_a_tenth_is_held_out():
    training, held_out = ({caption for _, caption in made(400, part)} for part in (False, True))
    assert not training & held_out and len(held_out) > 200
    everything = [f"a {size} {colour} {shape} {place} on a {ground} background" for size in captioned_shapes.SIZES
                  for colour in captioned_shapes.COLOURS for shape in captioned_shapes.SHAPES
                  for place in captioned_shapes.PLACES for ground in captioned_shapes.BACKGROUNDS]  # fmt: skip
    assert 0.06 < np.mean([captioned_shapes.is_held_out(caption) for caption in everything]) < 0.14


def test_the_same_seed_makes_the_same_images_and_no_two_are_alike():
    first, again = made(30), made(30)
    assert [caption for _, caption in first] == [caption for _, caption in again]
    assert all(np.array_equal(*pair) for pair in zip((i for i, _ in first), (i for i, _ in again), strict=True))
    assert len({image.tobytes() for image, _ in first}) == 30


def test_captions_are_true():
    """Colours, places, sizes and numbers, measured in the pixels."""
    seen = set()
    for image, caption in made(300):
        words, pixels = caption.split(), np.asarray(image, dtype=float)
        ground = captioned_shapes.BACKGROUNDS[words[-2]]
        assert abs(np.median(pixels[[0, -1]]) - ground) < 12
        for colour, value in captioned_shapes.COLOURS.items():
            near = np.abs(pixels - value).max(axis=-1) < 30
            assert (near.sum() >= 5) == (colour in words), caption
        colours = [word for word in words if word in captioned_shapes.COLOURS]
        inked = [np.argwhere(np.abs(pixels - captioned_shapes.COLOURS[name]).max(axis=-1) < 30) for name in colours]
        if len(set(colours)) == 2:
            axis = 0 if "above" in words else 1
            assert inked[0].mean(axis=0)[axis] + 6 < inked[1].mean(axis=0)[axis], caption
        elif "row" in words or "column" in words:
            axis = 1 if "row" in words else 0
            spread = np.ptp(inked[0], axis=0)
            assert spread[axis] > 8 + (9 if "three" in words else 0) > spread[1 - axis], caption
        elif len(colours) == 1:
            width = np.ptp(inked[0], axis=0).max()
            assert (width > 8) == ("large" in words), caption
        seen.update(words)
    assert {"left", "above", "three", "column", "centre", "crosses"} <= seen


def test_it_trains_measures_what_generate_writes_and_is_saved_whole(tmp_path):
    metrics = train.main(command(tmp_path / "model"))
    assert {"eval_exact_match", "eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_loss"} <= metrics.keys()
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "model")
    assert model.config.image_size == 32 and model.config.decoder_start_token_id == processor.tokenizer.bos_token_id
    images = [image for image, _ in made(3, held_out=True)]
    written = plot_captions.write_captions(model, processor, images)
    describe = pipeline("image-text-to-text", model=str(tmp_path / "model"))
    for image, caption in zip(images, written, strict=True):
        (answer,) = describe(images=image, text="", max_new_tokens=model.generation_config.max_length - 1)
        assert answer["generated_text"].strip() == caption.strip()
    plotted = plot_captions.main(
        ["--model_name_or_path", str(tmp_path / "model"), "--output", str(tmp_path / "a.png"), "--num_images", "3"]
    )
    assert len(plotted) == 3 and PIL.Image.open(tmp_path / "a.png").width > 300
    # And a second run goes on with it.
    again = command(tmp_path / "tuned", "--learning_rate", "0", steps=1)
    again[:6] = ["--model_name_or_path", str(tmp_path / "model"), "--objective", "captioning"]
    assert train.main(again)["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)


def test_a_folder_of_captioned_images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as metadata:
        for index, (image, caption) in enumerate(made(12)):
            image.resize((40, 24)).save(folder / f"{index}.png")
            metadata.write(json.dumps({"file_name": f"{index}.png", "text": caption}) + "\n")
    more = ("--captioned_folder", folder, "--validation_split_percentage", "25", "--config_overrides",
            f"{TINY},image_size=16")  # fmt: skip
    metrics = train.main(command(tmp_path / "model", *more, steps=2))
    assert 0 <= metrics["eval_rougeL"] <= 100
    written = [json.loads(line) for line in (tmp_path / "model/generated_predictions.jsonl").read_text().splitlines()]
    assert [row["target"] for row in written] and len(written) == 3
    assert json.loads((tmp_path / "model/config.json").read_text())["image_size"] == 16


REFUSED = {
    "text": (["--train_file", "a.txt"], "--train_file is for text"),
    "two sources": (["--captioned_folder", "a", "--dataset_name", "b"], "at most one of"),
    "a source text": (["--config_overrides", f"{TINY},image_fusion=prepended"], "must be 'cross_attention'"),
    "another objective's": (["--block_size", "8"], "--block_size belongs to"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_go_together_is_refused(name, tmp_path):
    more, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        train.main(command(tmp_path / "model", *more))
