"""What a task is to train.py: the Auto class of its models, and what `Trainer` is given for it.

A task is a class derived from `TrainingTask` in a file `task_<name>.py`, and a row in `task_table.py`. `train.py` asks
for everything below in the order in which it stands here.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

from datasets import Dataset
from train_arguments import Arguments
from transformers import PreTrainedConfig, PreTrainedModel, Trainer, TrainerCallback


class TaskData(NamedTuple):
    """What `Trainer` is given; datasets that were not asked for (`--do_train`, `--do_eval`) are None.

    Attributes:
        description: what the data is, for the log and the model card.
        compute_metrics: called for each batch, the last time with `compute_result=True`.
    """

    train_dataset: Dataset | None
    eval_dataset: Dataset | None
    description: str
    data_collator: Callable[[list], dict]
    compute_metrics: Callable[..., dict[str, float]] | None = None
    preprocess_logits_for_metrics: Callable[..., Any] | None = None
    callbacks: tuple[TrainerCallback, ...] = ()


class TrainingTask(ABC):
    """One objective. An instance belongs to one run.

    Class attributes:
        auto_class: `AutoModelFor…`, which makes the models of the task.
        head_suffixes: how the names of such models end, by which a checkpoint says what it was trained for.
        argument_classes: dataclasses of command-line arguments that the task understands beside those of every task.
            Arguments of classes that it does not list are refused if they are given.
        trainer_class: `Trainer`, or `Seq2SeqTrainer` for a task that is measured on what `generate` writes.
        pipeline_tag: the task on the model card, a name of the Hub's (None: the model is for none of them).
        examples: what the examples are called in the log.
    """

    auto_class: ClassVar[type]
    head_suffixes: ClassVar[tuple[str, ...]]
    argument_classes: ClassVar[tuple[type, ...]] = ()
    trainer_class: ClassVar[type[Trainer]] = Trainer
    pipeline_tag: ClassVar[str | None] = None
    examples: ClassVar[str] = "examples"

    def __init__(self, arguments: Arguments):
        self.arguments = arguments

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """Whether there is a model of this architecture for the task."""
        return type(config) in cls.auto_class._model_mapping or cls.auto_class.__name__ in (
            getattr(config, "auto_map", None) or {}
        )

    @abstractmethod
    def check(self, config: PreTrainedConfig) -> None:
        """Raises a ValueError for whatever can be refused before any data is read."""

    @abstractmethod
    def load_processor(self):
        """The tokenizer, image processor or the like that `Trainer` saves beside the weights."""

    @abstractmethod
    def config_fields(self, processor) -> dict[str, Any]:
        """Config fields that follow from processor and data (vocabulary, labels) for a model trained from scratch.

        Names that the architecture does not have are passed over; `--config_overrides` come first.
        """

    def checkpoint_fields(self, processor) -> dict[str, Any]:
        """The same for a checkpoint that is fine-tuned: as a rule it has them."""
        return {}

    @abstractmethod
    def prepare_model(self, model: PreTrainedModel, processor) -> None:
        """Fits the model to the processor, and refuses one that cannot learn the task."""

    @abstractmethod
    def load_data(self, model: PreTrainedModel, processor) -> TaskData:
        """Everything that is made of the data. Called in each process, in the main one first."""

    def training_arguments(self) -> dict[str, Any]:
        """Fields of `TrainingArguments` that the task needs as they are here."""
        return {}
