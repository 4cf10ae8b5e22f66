"""Model cards with a Trainer's figures.

    class Trainer(WritesModelCard, transformers.Trainer):
        pass

Without it, `Trainer.push_to_hub` writes its own summary over whatever README.md is in the output folder. (A saved or
pushed model has its card anyway: see configuration/model_card.py, which also stands in every checkpoint.)
"""

import copy
import os
import re

from huggingface_hub import ModelCard

from .configuration.model_card import TrainingFacts, is_replaceable, make_card, write_card


# The sections of Trainer's card that say something; the others ask for more information.
_BEFORE_THE_SECTIONS = re.compile(r"\A.*?^# [^\n]*\n+(.*?)(?=^## )", re.DOTALL | re.MULTILINE)
_PROCEDURE = re.compile(r"^## Training procedure\n+(.*)\Z", re.DOTALL | re.MULTILINE)
_BY_TRAINER = "generated automatically according to the information the Trainer had access to"


class WritesModelCard:
    """For a Trainer's bases, in front: `create_model_card` writes one card with what the model and the Trainer know.

    A README.md that somebody has written in stays as it is.
    """

    def create_model_card(self, **kwargs) -> None:
        """As in transformers; `license`, `dataset_tags`, `language` and so on go into the metadata.

        `tasks` is the model's `pipeline_tag` as well, where what it was trained for is more than its class says.
        """
        if not self.is_world_process_zero():
            return
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        config = copy.copy(model.config)
        # Until it is saved, the configuration may name the head of the checkpoint that was fine-tuned, or none.
        config.architectures = [type(model).__name__.removeprefix("FSDP")]
        if getattr(config, "architecture_facts", None) is None:
            return super().create_model_card(**kwargs)
        path = os.path.join(self.args.output_dir, "README.md")
        before = None
        if os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                before = file.read()
            if not is_replaceable(before) and _BY_TRAINER not in before:
                return
            os.remove(path)  # or Trainer takes over its tags
        super().create_model_card(**kwargs)
        summary = ModelCard.load(path)
        with open(path, encoding="utf-8") as file:
            training = training_facts(summary, file.read(), kwargs.get("tasks"))
        os.remove(path)
        write_card(self.args.output_dir, make_card(config, self.hub_model_id, training))


def training_facts(summary: ModelCard, text: str, tasks: str | list[str] | None = None) -> TrainingFacts:
    """What Trainer's own card says, without the sections in which it asks for more information; `tasks`, or the first
    of them, as its `pipeline_tag`."""
    metadata = summary.data.to_dict()
    metadata.pop("library_name", None)
    if tasks:
        metadata["pipeline_tag"] = tasks if isinstance(tasks, str) else tasks[0]
    intro, procedure = _BEFORE_THE_SECTIONS.search(summary.text), _PROCEDURE.search(text)
    parts = [match[1].strip() for match in (intro, procedure) if match is not None]
    return TrainingFacts(metadata, "\n\n".join(parts))
