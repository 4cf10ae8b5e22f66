"""The README.md of a saved model: what it is, how to load it and what that executes, and whose idea it is.

A card that a person wrote, or changed, is never replaced: a card made here carries a digest of its own text.
"""

import hashlib
import os
import re
import tempfile
from typing import NamedTuple

from huggingface_hub import ModelCard, ModelCardData


class ArchitectureFacts(NamedTuple):
    """What a card says of every model of an architecture."""

    description: str
    limits: str
    arxiv: str
    citation: str


class TrainingFacts(NamedTuple):
    """What a card says of the training of one model."""

    metadata: dict  # of a model card: license, datasets, metrics, model-index, …
    text: str  # markdown, headings from level 3 on


# End of a class's name -> (task of the Hub, what it is for).
USES = {
    "ForCausalLM": ("text-generation", "continuing text, and fine-tuning for that"),
    "ForMaskedLM": ("fill-mask", "filling in masked tokens, and fine-tuning as an encoder"),
    "ForConditionalGeneration": (
        "text2text-generation",
        "turning one text into another, such as its summary or translation",
    ),
    "ForSequenceClassification": ("text-classification", "labelling sequences"),
    "ForTokenClassification": ("token-classification", "labelling tokens"),
    "ForQuestionAnswering": ("question-answering", "finding answers inside a text"),
    "ForImageClassification": ("image-classification", "labelling images"),
    "ForImageTextToText": ("image-text-to-text", "writing text about images"),
    "ForContinuousPrediction": ("time-series-forecasting", "predicting vectors of numbers"),
}
FEATURES = ("feature-extraction", "hidden states, to put a head on")

_MARK = "<!-- written by hf_efficient; as soon as you edit it, it is yours and stays. {} -->"
_UNTRAINED = "Nothing is known here about how these weights were trained."
_MARK_PATTERN = re.compile(re.escape(_MARK).replace(r"\{\}", "([0-9a-f]{16})"))
# Cards that transformers makes of nothing.
_OF_TRANSFORMERS = re.compile(
    r"model card of a .{0,3}transformers model that has been pushed on the Hub. This model card has been automatically"
)


def is_replaceable(card: str) -> bool:
    """Whether nobody has written in this card: it is as it was made here, or by transformers of nothing."""
    text = _text_of(card)
    mark = _MARK_PATTERN.search(text)
    if mark is None:
        return _OF_TRANSFORMERS.search(text) is not None
    return mark[1] == _digest(_MARK_PATTERN.sub("", text))


def make_card(config, repository: str | None = None, training: TrainingFacts | None = None, tags=()) -> str:
    """The card of the model that `config` describes (its class by `config.architectures`).

    Args:
        repository: "user/name", if known.
        training: figures of its training.
        tags: further tags.
    """
    facts = config.architecture_facts
    model_class = (config.architectures or [""])[0]
    task, use = next((USES[end] for end in USES if model_class.endswith(end)), FEATURES)
    entries = {
        auto_class: reference.rpartition("--")[2]
        for auto_class, reference in (getattr(config, "auto_map", None) or {}).items()
        if isinstance(reference, str)
    }
    auto_class = next((auto for auto in entries if entries[auto].endswith(f".{model_class}")), "AutoModel")
    own_tags = ["hf_efficient", config.model_type, "custom_code", f"arxiv:{facts.arxiv}"]
    metadata = {"library_name": "transformers", "pipeline_tag": task}
    metadata |= {} if training is None else training.metadata
    metadata["tags"] = list(dict.fromkeys([*own_tags, *(metadata.get("tags") or []), *tags]))
    entry_file = entries.get(auto_class, "").partition(".")[0]
    name = repository or "user/name"
    figures = _UNTRAINED if training is None else training.text
    text = f"""
# {name.rpartition("/")[2] if repository else model_class or config.model_type}

{facts.description}

## Intended use

`{model_class or type(config).__name__}` is for {use}. What it says or decides is what its training data taught it.

## Limits

{facts.limits}

## How to load it

```python
from huggingface_hub import model_info
from transformers import {auto_class}

name = "{name}"
revision = model_info(name).sha  # read the code of this commit, then write its id here
model = {auto_class}.from_pretrained(name, revision=revision, trust_remote_code=True)
```

`trust_remote_code=True` executes Python files of this repository: `{entry_file or "the entry in config.json"}.py` and
those it imports, which say in their first line where they come from. They need torch and transformers; Triton is used
where it is installed. A commit's id as `revision` makes sure that the code that runs is the code that was read. Where
hf_efficient is installed, its own classes are used, and no code of this repository. The weights are safetensors, which
execute nothing.

## Training

{figures}

## Citation

```bibtex
{facts.citation.strip()}
```
"""
    text = f"\n{_MARK.format(_digest(text))}{text}"
    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n{text}"


def write_card(folder, card: str) -> None:
    """Put `card` into a folder as README.md, if there is none that somebody has written in or that says more."""
    path = os.path.join(folder, "README.md")
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            there = file.read()
        says_more = _UNTRAINED in card and _UNTRAINED not in there and _MARK_PATTERN.search(there)
        if there == card or says_more or not is_replaceable(there):
            return
    with tempfile.NamedTemporaryFile("w", dir=folder, delete=False, encoding="utf-8", newline="") as file:
        file.write(card)
    os.replace(file.name, path)


class DescribesItself:
    """For what has `push_to_hub`: right before an upload transformers makes a card of nothing; here it is filled."""

    def _upload_modified_files(self, working_dir, repo_id, *args, **kwargs):
        path = os.path.join(working_dir, "README.md")
        if os.path.exists(path):
            made = ModelCard.load(path)
            config = getattr(self, "config", self)
            write_card(working_dir, make_card(config, repo_id, tags=made.data.tags or ()))
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)


def _text_of(card: str) -> str:
    """What stands behind the metadata, to which transformers adds tags."""
    return ModelCard(card, ignore_metadata_errors=True).text


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:16]
