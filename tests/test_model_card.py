"""README.md of a saved model: valid, true for its head, with a Trainer's figures, and never over a person's own."""

import re

import pytest
import torch
import transformers
from hub_repositories import card_problems
from huggingface_hub import ModelCard
from load_script import load_script
from test_remote_code import config_for, rows

from hf_efficient import PerformerConfig, PerformerForSequenceClassification
from hf_efficient.configuration.model_card import is_replaceable, make_card, write_card
from hf_efficient.model_card import WritesModelCard


# What the Hub calls the tasks.
PIPELINE_TAGS = {
    "AutoModel": "feature-extraction",
    "AutoModelForTextEncoding": "feature-extraction",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSeq2SeqLM": "text2text-generation",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForImageTextToText": "image-text-to-text",
    "AutoModelForTimeSeriesPrediction": "time-series-forecasting",
}
WITHOUT_PIPELINE = {"text2text-generation", "question-answering", "time-series-forecasting"}


@pytest.mark.parametrize(("auto_class", "tag"), PIPELINE_TAGS.items())
def test_a_tag_is_the_pipeline_that_transformers_has_for_the_auto_class(auto_class, tag):
    tasks = transformers.pipelines.SUPPORTED_TASKS
    assert (tag in tasks) == (tag not in WITHOUT_PIPELINE)
    if tag in tasks and auto_class != "AutoModelForTextEncoding":
        assert auto_class in [found.__name__ for found in tasks[tag]["pt"]]


@pytest.mark.parametrize("objective", load_script("task_table").TASKS)
def test_what_is_trained_by_the_script_has_the_same_tags(objective):
    task = load_script("task_table").TASKS[objective]
    assert task.pipeline_tag == PIPELINE_TAGS[task.auto_class.__name__]


@pytest.mark.parametrize(("model_type", "auto_class"), rows)
def test_every_saved_head_has_a_card_that_is_valid_and_its_own(model_type, auto_class, tmp_path):
    config = config_for(model_type, auto_class)
    model = getattr(transformers, auto_class).from_config(config)
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert not card_problems(text.encode())
    card = ModelCard(text)
    assert card.data.library_name == "transformers" and {"hf_efficient", model_type, "custom_code"} <= {
        *card.data.tags
    }
    assert card.data.pipeline_tag == PIPELINE_TAGS[auto_class]
    assert f"`{type(model).__name__}` is for" in text
    for heading in ("Intended use", "Limits", "How to load it", "Training", "Citation"):
        assert f"\n## {heading}\n" in text
    loading = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    compile(loading, "README.md", "exec")
    assert f"{auto_class}.from_pretrained(name, revision=revision, trust_remote_code=True)" in loading
    arxiv = next(tag for tag in card.data.tags if tag.startswith("arxiv:"))[6:]
    assert f"https://arxiv.org/abs/{arxiv}" in text and "@inproceedings{" in text
    (entry,) = re.findall(r"executes Python files of this repository: `(\w+\.py)`", text)
    assert (tmp_path / entry).is_file()


def tiny():
    return PerformerConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=2)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda card: "# My own\n", id="another"),
        pytest.param(lambda card: card.replace("## Limits", "## Limits\n\nIt cannot count."), id="edited"),
        pytest.param(lambda card: re.sub("<!--.*-->", "", card), id="mark removed"),
    ],
)
def test_what_a_person_wrote_stays(change, tmp_path):
    model = PerformerForSequenceClassification(tiny())
    model.save_pretrained(tmp_path)
    made = (tmp_path / "README.md").read_text()
    (tmp_path / "README.md").write_text(change(made))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == change(made)
    trainer_of(model, tmp_path).create_model_card()
    assert (tmp_path / "README.md").read_text() == change(made)


def test_what_was_made_here_is_made_anew_also_after_the_hub_added_tags(tmp_path):
    config = tiny()
    config.architectures = ["PerformerForMaskedLM"]
    card = ModelCard(make_card(config))
    card.data.tags.append("mine")
    assert is_replaceable(str(card))
    card.save(tmp_path / "README.md")
    config.architectures = ["PerformerForCausalLM"]
    write_card(tmp_path, make_card(config, "me/name", tags=card.data.tags))
    again = ModelCard.load(tmp_path / "README.md")
    assert again.data.pipeline_tag == "text-generation" and again.data.tags == card.data.tags
    assert 'name = "me/name"' in again.text


def trainer_of(model, folder, **options):
    class Trainer(WritesModelCard, transformers.Trainer):
        pass

    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.tensor(i % 2)} for i in range(8)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=2, eval_strategy="steps", eval_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", logging_steps=1, **options
    )  # fmt: skip

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, compute_metrics=accuracy)


def test_a_trainers_figures_are_in_the_card_and_stay_there(tmp_path):
    model = PerformerForSequenceClassification(tiny())
    trainer = trainer_of(model, tmp_path, learning_rate=1e-3)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card(
        license="apache-2.0", dataset_tags="someone/reviews", dataset="Reviews", tasks="text-classification",
        dataset_args="default", language="en",
    )  # fmt: skip
    text = (tmp_path / "README.md").read_text()
    assert not card_problems(text.encode()) and is_replaceable(text)
    data = ModelCard(text).data
    assert (data.license, data.datasets, data.metrics, data.language) == (
        "apache-2.0", ["someone/reviews"], ["accuracy"], ["en"],
    )  # fmt: skip
    assert data.pipeline_tag == "text-classification" and {"generated_from_trainer", "performer"} <= {*data.tags}
    (result,) = data.eval_results
    assert (result.task_type, result.dataset_name, result.metric_type) == (
        "text-classification",
        "Reviews",
        "accuracy",
    )
    last = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry][-1]
    assert result.metric_value == last and f"- Accuracy: {round(last, 4)}" in text
    assert "- learning_rate: 0.001" in text and "| Training Loss |" in text
    assert "More information needed" not in text and "## How to load it" in text
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == text


@pytest.mark.parametrize(("model_type", "auto_class"), rows)
def test_a_trainers_card_names_the_task_also_of_a_model_that_was_never_saved(model_type, auto_class, tmp_path):
    config = config_for(model_type, auto_class)
    config.architectures = ["SomethingForCausalLM"]  # as of the checkpoint that is fine-tuned
    model = getattr(transformers, auto_class).from_config(config)
    trainer = trainer_of(model, tmp_path)
    trainer.create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.pipeline_tag == PIPELINE_TAGS[auto_class]
    assert f"`{type(model).__name__}` is for" in card.text
    trainer.create_model_card(tasks="image-to-text")  # the task knows more than the class
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "image-to-text"


def test_another_architectures_card_is_trainers(tmp_path):
    config = transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, num_labels=2, pad_token_id=0)
    trainer = trainer_of(transformers.GPT2ForSequenceClassification(config), tmp_path)
    trainer.create_model_card()
    assert "generated automatically according to" in (tmp_path / "README.md").read_text()
