"""The arguments that train.py has beside those of `TrainingArguments`, and those that several tasks share.

What a single task needs stands with the task. Each class checks its own values; what contradicts something else is
refused in `train_command_line.py`.
"""

from dataclasses import dataclass, field
from typing import TypeVar

from transformers import Seq2SeqTrainingArguments


T = TypeVar("T")


def require_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")


@dataclass
class ModelArguments:
    """Which model: a checkpoint to fine-tune, or an architecture to train from random weights."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Checkpoint to fine-tune: a folder or a name on the Hub."}
    )
    model_type: str | None = field(
        default=None,
        metadata={"help": "Architecture to train from scratch: performer, or any that the Auto classes know."},
    )
    config_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub name whose config a model trained from scratch takes."}
    )
    config_overrides: str | None = field(
        default=None,
        metadata={
            "help": 'Config fields to set: "hidden_size=256,num_hidden_layers=4", lists in brackets, or a JSON object.'
        },
    )
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Folder or Hub name; default: the checkpoint's own, else bytes (ByT5's)."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a checkpoint on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for private Hub repositories."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that stands beside a checkpoint. Only for authors you trust."}
    )
    dtype: str | None = field(
        default=None, metadata={"help": "Load weights as float32, bfloat16, float16 or auto; default: float32."}
    )


@dataclass
class DataArguments:
    """Which data: at most one source; without one, something real that the machine itself has."""

    train_file: str | None = field(
        default=None, metadata={"help": "Text file (one document), or .jsonl, .json, .csv with a text column."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Held-out data, of the same kinds."})
    dataset_name: str | None = field(default=None, metadata={"help": "For datasets.load_dataset; paths work too."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Share of the data held out where the source has no validation part."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "At most so many training examples."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "At most so many held-out examples."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that prepare the data."})

    def __post_init__(self):
        require_positive(
            max_train_samples=self.max_train_samples,
            max_eval_samples=self.max_eval_samples,
            preprocessing_num_workers=self.preprocessing_num_workers,
        )


@dataclass
class TextArguments:
    """What is common to the tasks that read running text in blocks of tokens."""

    text_folder: str | None = field(
        default=None, metadata={"help": "Folder of text files, one document each; held out by file."}
    )
    text_column_name: str = field(default="text", metadata={"help": "Column that holds the text."})
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens per block: documents are joined and cut; default: 1024, or what the model allows."},
    )
    parse_special_tokens: bool = field(
        default=False, metadata={"help": 'Read "</s>" and the like in the text as tokens rather than as text.'}
    )

    def __post_init__(self):
        if self.block_size is not None and self.block_size < 2:
            raise ValueError(f"--block_size must be at least 2, got {self.block_size}")


@dataclass
class OptimizerArguments:
    """What `TrainingArguments` has no name for."""

    matrix_learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "Train the matrices between embedding and head with Muon at this rate (on AdamW's scale), and "
            "everything else with AdamW at --learning_rate. A short training from scratch gets much further with it."
        },
    )

    def __post_init__(self):
        if self.matrix_learning_rate is not None and not self.matrix_learning_rate > 0:
            raise ValueError(f"--matrix_learning_rate must be above 0, got {self.matrix_learning_rate}")


@dataclass
class OutputArguments:
    """What `TrainingArguments` no longer holds since transformers 5."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Write into a folder that is not empty; removes the checkpoint-* folders in it."},
    )


@dataclass
class Arguments:
    """One command line, parsed: what every task has, and `of_tasks`, one object for each class that a task adds."""

    objective: str | None
    model: ModelArguments
    data: DataArguments
    optimizer: OptimizerArguments
    output: OutputArguments
    training: Seq2SeqTrainingArguments
    of_tasks: tuple[object, ...]

    def of(self, kind: type[T]) -> T:
        """The arguments of a class that a task lists in its `argument_classes`."""
        return next(arguments for arguments in self.of_tasks if type(arguments) is kind)
