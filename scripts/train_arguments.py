"""The arguments of train.py, read as Hugging Face's example scripts read theirs, and checked before any work."""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import is_tensorboard_available, is_trackio_available


EXPONENT_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


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
    objective: str | None = field(
        default=None,
        metadata={
            "help": "causal or masked; default: what the checkpoint was trained for, else causal if it has the head",
            "choices": ["causal", "masked"],
        },
    )


@dataclass
class DataArguments:
    """Which text: at most one source; without one, the Python standard library's own sources."""

    train_file: str | None = field(
        default=None, metadata={"help": "Text file (one document), or .jsonl, .json, .csv with a text column."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "Held-out text, of the same kinds."})
    text_folder: str | None = field(
        default=None, metadata={"help": "Folder of text files, one document each; held out by file."}
    )
    dataset_name: str | None = field(default=None, metadata={"help": "For datasets.load_dataset; paths work too."})
    dataset_config_name: str | None = field(default=None, metadata={"help": "Configuration of that dataset."})
    text_column_name: str = field(default="text", metadata={"help": "Column that holds the text."})
    validation_split_percentage: float = field(
        default=5.0, metadata={"help": "Share of the documents held out where the source has no validation part."}
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens per block: documents are joined and cut; default: 1024, or what the model allows."},
    )
    mlm_probability: float | None = field(
        default=None, metadata={"help": "Share of tokens hidden by the masked objective; default 0.15."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "At most so many training blocks."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "At most so many held-out blocks."})
    parse_special_tokens: bool = field(
        default=False, metadata={"help": 'Read "</s>" and the like in the text as tokens rather than as text.'}
    )
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenise."})


@dataclass
class OutputArguments:
    """What `TrainingArguments` no longer holds since transformers 5."""

    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Write into a folder that is not empty; removes the checkpoint-* folders in it."},
    )


Arguments = tuple[ModelArguments, DataArguments, OutputArguments, TrainingArguments]


def installed_trackers() -> list[str]:
    """Where to log unless --report_to says: local trackers only. Nothing leaves the machine unasked."""
    available = {"tensorboard": is_tensorboard_available(), "trackio": is_trackio_available()}
    return [name for name, installed in available.items() if installed] or ["none"]


def read_argument_file(path: Path) -> dict:
    try:
        text = path.read_text(encoding="utf-8")
        values = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} must be a readable JSON or YAML file of arguments, got: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold a mapping of argument names to values, got {type(values).__name__}")
    # YAML 1.1 takes 1e-3 for text, which is how everybody writes a learning rate.
    return {
        name: float(value) if isinstance(value, str) and EXPONENT_NUMBER.fullmatch(value) else value
        for name, value in values.items()
    }


def parse_arguments(arguments: list[str] | None = None) -> Arguments:
    """Reads the command line, or the JSON or YAML file that is its only word."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = HfArgumentParser((ModelArguments, DataArguments, OutputArguments, TrainingArguments))
    defaults = {"report_to": installed_trackers()}
    if len(arguments) == 1 and Path(arguments[0]).suffix in (".json", ".yaml", ".yml"):
        parsed = parser.parse_dict({**defaults, **read_argument_file(Path(arguments[0]))})
    else:
        parser.set_defaults(**defaults)
        parsed = parser.parse_args_into_dataclasses(arguments)
    check_arguments(*parsed)
    return parsed


def require_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")


def check_arguments(
    model: ModelArguments, data: DataArguments, output: OutputArguments, training: TrainingArguments
) -> None:
    """Refuses arguments that contradict each other (what needs the model or the text is checked with those)."""
    if not (training.do_train or training.do_eval):
        raise ValueError("--do_train or --do_eval must be given, got neither: nothing to do")
    if model.model_name_or_path and (model.model_type or model.config_name):
        other = "--model_type" if model.model_type else "--config_name"
        raise ValueError(f"--model_name_or_path and {other} exclude each other, got both")
    if model.model_type and model.config_name:
        raise ValueError("--model_type and --config_name exclude each other, got both")
    if not (model.model_name_or_path or model.model_type or model.config_name):
        raise ValueError("--model_name_or_path, --model_type or --config_name must name a model, got none of them")
    if data.mlm_probability is not None:
        if model.objective == "causal":
            raise ValueError("--mlm_probability belongs to --objective masked, got it with --objective causal")
        if not 0 < data.mlm_probability < 1:
            raise ValueError(f"--mlm_probability must lie between 0 and 1, got {data.mlm_probability}")
    if data.block_size is not None and data.block_size < 2:
        raise ValueError(f"--block_size must be at least 2, got {data.block_size}")
    require_positive(
        max_train_samples=data.max_train_samples,
        max_eval_samples=data.max_eval_samples,
        preprocessing_num_workers=data.preprocessing_num_workers,
    )
    if training.resume_from_checkpoint and not training.do_train:
        raise ValueError("--resume_from_checkpoint goes on with a training, got it without --do_train")
    if output.overwrite_output_dir and str(training.resume_from_checkpoint).lower() not in ("none", "false"):
        raise ValueError("--overwrite_output_dir and --resume_from_checkpoint exclude each other, got both")
