"""transformers' pipelines run every head from its saved folder, in a process that has never heard of hf_efficient.

(transformers' own tests of pipelines need models on the Hub.) What a pipeline says has to be what the model itself
says about the tokens, text by text and in a batch, which has padding. transformers 5 has no pipeline for question
answering, summarisation and translation any more, and says so.
"""

import json

import numpy
import pytest
import torch
from helpers import subprocess_without_package
from PIL import Image
from tiny_heads import HEADS
from training_tasks import IMAGE_SIZE, TOKENIZER
from transformers import ViTImageProcessor, pipeline


TASKS = {
    "AutoModel": "feature-extraction",
    "AutoModelForTextEncoding": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForImageClassification": "image-classification",
}
# T5Model neither: the pipeline gives no inputs to a decoder.
WITHOUT = {"CoLT5Model"}
PIPED = [name for name, head in HEADS.items() if head.auto_class in TASKS and name not in WITHOUT]
TEXTS = ["Gold is where.", "Yes."]
MASKED = [f"Gold {TOKENIZER.mask_token}s where.", f"Y{TOKENIZER.mask_token}s."]
TOKENIZER_OPTIONS = {"pad_token_id": 0, "eos_token_id": 1, "vocab_size": len(TOKENIZER)}

# What is compared, made of a pipeline's answer about one text: lists of numbers.
IN_THE_OTHER_PROCESS = """
import json, sys
from pathlib import Path
import transformers

OPTIONS = {
    "text-generation": {"max_new_tokens": 6, "do_sample": False, "return_tensors": True},
    "fill-mask": {"top_k": 5},
    "text-classification": {"top_k": None},
    "token-classification": {"ignore_labels": []},
    "image-classification": {"top_k": 3},
}
def numbers(task, answer):
    if task == "feature-extraction": return answer[0]
    if task == "text-generation": return answer[0]["generated_token_ids"][-6:]
    if task == "fill-mask": return [[choice["token"], choice["score"]] for choice in answer]
    if task == "token-classification": return [float(entity["score"]) for entity in answer]
    return [[int(label["label"][-1]), label["score"]] for label in answer]

folder, answers = Path(sys.argv[1]), {}
# All folders have one name: those with the same code are then one module for transformers, imported once.
for saved in sorted(folder.glob("*/saved")):
    auto_class, task, inputs = json.loads((saved / "task").read_text())
    model = str(saved)
    if auto_class == "AutoModelForTextEncoding":  # the pipeline itself would load AutoModel
        model = transformers.AutoModelForTextEncoding.from_pretrained(saved, trust_remote_code=True)
    beside = "image_processor" if "image" in task else "tokenizer"
    run = transformers.pipeline(task, model=model, trust_remote_code=True, **{beside: str(saved)})
    assert type(run.model).__module__.startswith("transformers_modules."), type(run.model)
    options = OPTIONS.get(task, {})
    answers[saved.parent.name] = [
        [numbers(task, answer) for answer in run(inputs, batch_size=2, **options)],
        [numbers(task, run(one, **options)) for one in inputs],
    ]
(folder / "answers").write_text(json.dumps(answers))
"""


def make(head):
    """With weights that spread what the model says, so that numbers can differ."""
    torch.manual_seed(0)
    row = HEADS[head]
    # The pipeline opens every picture as RGB.
    channels = {"num_channels": 3} if row.auto_class == "AutoModelForImageClassification" else {}
    model = row.model_class(row.config(**TOKENIZER_OPTIONS, **channels, tie_word_embeddings=False)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.normal_(std=1.0 if "embed" in name else 2 * weight.shape[-1] ** -0.5)
    return model


def images():
    generator = torch.Generator().manual_seed(5)
    size = (2, IMAGE_SIZE, IMAGE_SIZE, 3)
    return [Image.fromarray(image.numpy()) for image in torch.randint(256, size, generator=generator).byte()]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """By head: the model, what its pipeline said about all inputs at once, and about each by itself."""
    folder = tmp_path_factory.mktemp("saved")
    models = {name: make(name) for name in PIPED}
    processor = ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})
    for name, model in models.items():
        auto_class, saved = HEADS[name].auto_class, folder / name / "saved"
        model.save_pretrained(saved)
        inputs = MASKED if TASKS[auto_class] == "fill-mask" else TEXTS
        if TASKS[auto_class] == "image-classification":
            processor.save_pretrained(saved)
            inputs = [str(saved / f"{index}.png") for index in range(2)]
            for path, image in zip(inputs, images(), strict=True):
                image.save(path)
        else:
            TOKENIZER.padding_side = "left" if TASKS[auto_class] == "text-generation" else "right"
            TOKENIZER.save_pretrained(saved)
            TOKENIZER.padding_side = "right"
        (saved / "task").write_text(json.dumps([auto_class, TASKS[auto_class], inputs]))
    subprocess_without_package(IN_THE_OTHER_PROCESS, folder)
    said = json.loads((folder / "answers").read_text())
    tasks = {name: json.loads((folder / name / "saved/task").read_text()) for name in PIPED}
    return {name: (models[name], *said[name], tasks[name][2]) for name in PIPED}


@torch.no_grad()
def by_the_model(task, model, text):
    """What the model says about the tokens of one text, or about one image."""
    if task == "image-classification":
        pixels = torch.from_numpy(numpy.array(Image.open(text))).permute(2, 0, 1)[None] / 127.5 - 1
        scores = model(pixel_values=pixels).logits.softmax(-1)[0]
        return [[label, scores[label].item()] for label in scores.argsort(descending=True).tolist()]
    inputs = TOKENIZER(text, return_tensors="pt")
    if task == "text-generation":
        return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    output = model(**inputs)
    if task == "feature-extraction":
        return output[0][0].tolist()
    scores = output.logits.softmax(-1)[0]
    if task == "fill-mask":
        place = (inputs["input_ids"][0] == TOKENIZER.mask_token_id).nonzero().item()
        best = scores[place].topk(5)
        return [[token, score] for score, token in zip(best.values.tolist(), best.indices.tolist(), strict=True)]
    if task == "token-classification":
        special = TOKENIZER.get_special_tokens_mask(inputs["input_ids"][0], already_has_special_tokens=True)
        return [row.max().item() for row, is_special in zip(scores, special, strict=True) if not is_special]
    return [[label, scores[label].item()] for label in scores.argsort(descending=True).tolist()]


@pytest.mark.matrix("pipeline")
@pytest.mark.parametrize("head", PIPED)
def test_a_pipeline_says_what_the_model_says(head, answers):
    model, together, alone, inputs = answers[head]
    task = TASKS[HEADS[head].auto_class]
    for batched, single, one in zip(together, alone, inputs, strict=True):
        expected = torch.tensor(by_the_model(task, model, one), dtype=torch.float64)
        torch.testing.assert_close(torch.tensor(single, dtype=torch.float64), expected, rtol=1e-4, atol=1e-5)
        batched = batched[: len(expected)] if task == "feature-extraction" else batched  # padding has features too
        torch.testing.assert_close(torch.tensor(batched, dtype=torch.float64), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["question-answering", "summarization", "text2text-generation", "translation"])
def test_pipelines_that_transformers_has_no_more(task):
    with pytest.raises(KeyError, match="has been removed from transformers"):
        pipeline(task)
