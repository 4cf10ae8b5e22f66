"""The table of tasks: one row for each --objective of train.py. Nothing else in scripts/ lists them."""

from dataclasses import dataclass, field

from task_captioning import Captioning
from task_image_classification import ImageClassification
from task_language_model import CausalLanguageModel, MaskedLanguageModel
from task_sequence_to_sequence import SequenceToSequence
from task_span_corruption import SpanCorruption
from training_task import TrainingTask
from transformers import PreTrainedConfig


# The first row that suits a model trained from scratch is the default.
TASKS: dict[str, type[TrainingTask]] = {
    "causal": CausalLanguageModel,
    "masked": MaskedLanguageModel,
    "span_corruption": SpanCorruption,
    "sequence_to_sequence": SequenceToSequence,
    "image_classification": ImageClassification,
    "captioning": Captioning,
}


@dataclass
class ObjectiveArguments:
    """Which of them."""

    objective: str | None = field(
        default=None,
        metadata={
            "help": "What to learn; default: what the checkpoint was trained for, else the first of these that the "
            "architecture has a head for.",
            "choices": list(TASKS),
        },
    )


def task_argument_classes() -> list[type]:
    """The dataclasses of arguments that tasks add, each once."""
    return list(dict.fromkeys(kind for task in TASKS.values() for kind in task.argument_classes))


def resolve_objective(config: PreTrainedConfig, wish: str | None) -> str:
    """The objective asked for, or what the checkpoint was trained for, or else the first the architecture has.

    Raises:
        ValueError: no head for the objective, or for any.
    """
    kind = config.model_type
    heads = [name for name, task in TASKS.items() if task.accepts(config)]
    if not heads:
        family = "encoder-decoder" if config.is_encoder_decoder else "architecture"
        raise ValueError(f"train.py has the objectives {list(TASKS)}, got the {family} {kind!r} with a head for none")
    trained_for = next(
        (
            name
            for name in heads
            if any(model.endswith(TASKS[name].head_suffixes) for model in config.architectures or [])
        ),
        None,
    )
    objective = wish or trained_for or heads[0]
    if objective not in heads:
        raise ValueError(f"--objective must be one that {kind!r} has a head for ({heads}), got {objective!r}")
    return objective
