"""Converts an outside checkpoint to a folder that AutoModel loads, or refuses and leaves nothing behind.

    python scripts/convert.py --source performer_pytorch --input model.pt --arguments arguments.json --output_dir out
    python scripts/convert.py --source flash_perceiver --input model.pt --arguments arguments.json --output_dir out
    python scripts/convert.py --source x_transformers --input model.pt --arguments arguments.json --output_dir out
    python scripts/convert.py --source transformers --input bert-base-uncased --output_dir out
    python scripts/convert.py --source transformers --input deepmind/language-perceiver --output_dir out
    python scripts/convert.py --source transformers --input google/t5-v1_1-base --output_dir out
    python scripts/convert.py --source colt5_attention --input block.pt --arguments arguments.json --output_dir out

All but the last take a state dict saved with torch.save (or safetensors) and a JSON object with the arguments that the
model was constructed with; for all but performer_pytorch it names the "class" too, such as PerceiverIO,
ConditionalRoutedViT or TransformerWrapper, whose "attn_layers" holds the arguments and the "class" of its stack. A
block of colt5_attention, which is no model, becomes a folder for
hf_efficient.conversion.routed_block_files.load_routed_block. transformers takes a folder or a name on the Hub: a BERT,
GPT-2 or Llama keeps its weights and gets linear attention, a Perceiver becomes a PerceiverFlash with the same results,
a T5 v1.1 or LongT5 a CoLT5 whose heavy branch it is. Its tokenizer or image processor comes along.
"""

import json
import os
import pickle
import shutil
import sys
import tempfile
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import torch
import transformers
from output_folder import require_writable
from safetensors import SafetensorError
from safetensors.torch import load_file
from training_model import check_override_names, parse_config_overrides
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer, HfArgumentParser, PreTrainedModel

from hf_efficient import CoLT5Config, PerformerConfig
from hf_efficient.conversion.colt5_attention import convert_colt5_attention, describe, original_module
from hf_efficient.conversion.colt5_attention_vit import convert_colt5_vit
from hf_efficient.conversion.flash_perceiver import convert_flash_perceiver
from hf_efficient.conversion.performer_pytorch import convert_performer_pytorch
from hf_efficient.conversion.routed_block_files import save_routed_block
from hf_efficient.conversion.softmax_transformers import convert_softmax_transformer
from hf_efficient.conversion.transformers_perceiver import PERCEIVERS, convert_transformers_perceiver
from hf_efficient.conversion.upcycled_t5 import SOURCES as UPCYCLED
from hf_efficient.conversion.upcycled_t5 import upcycle_t5
from hf_efficient.conversion.weight_transfer import ConversionReport
from hf_efficient.conversion.x_transformers import LATEST, convert_x_transformers
from hf_efficient.conversion.x_transformers_continuous import convert_continuous
from hf_efficient.conversion.x_transformers_images import convert_image_classifier


# Under which people keep a state dict in a file that holds more than that.
NESTED = ("state_dict", "model_state_dict", "model")
Source = Literal["performer_pytorch", "flash_perceiver", "colt5_attention", "x_transformers", "transformers"]
X_TRANSFORMERS = {
    "TransformerWrapper": convert_x_transformers,
    "XTransformer": convert_x_transformers,
    "ViTransformerWrapper": convert_image_classifier,
    "ContinuousTransformerWrapper": convert_continuous,
}


@dataclass
class ConversionArguments:
    """What to convert, and where to."""

    source: Source = field(metadata={"help": "Where the checkpoint comes from."})
    input: str = field(metadata={"help": "A file with a state dict; transformers: a folder or a name on the Hub."})
    output_dir: str = field(metadata={"help": "Folder for the converted checkpoint, new or empty."})
    arguments: str | None = field(
        default=None, metadata={"help": "JSON object, or a file with one: constructor arguments (of a state dict)."}
    )
    rotary: bool = field(
        default=False, metadata={"help": "performer_pytorch: a bare Performer that is called with pos_emb."}
    )
    x_transformers_version: str = field(
        default=LATEST, metadata={"help": "x_transformers: the release that trained the weights."}
    )
    layer_types: str = field(
        default="linear_attention",
        metadata={"help": "transformers: linear_attention, full_attention, or one per layer, parted by commas."},
    )
    config_overrides: str | None = field(
        default=None,
        metadata={"help": "transformers: fields of the attention, 'num_random_features=256,feature_map=relu'."},
    )
    light_branch: Literal["zero", "copy"] = field(
        default="zero", metadata={"help": "transformers, T5 or LongT5: how the light branches start."}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for private Hub repositories."})

    def __post_init__(self):
        own = {
            "arguments": ("performer_pytorch", "flash_perceiver", "colt5_attention", "x_transformers"),
            "rotary": ("performer_pytorch",),
            "x_transformers_version": ("x_transformers",),
            "layer_types": ("transformers",),
            "config_overrides": ("transformers",),
            "light_branch": ("transformers",),
        }
        defaults = {option.name: option.default for option in fields(self)}
        for name, sources in own.items():
            if self.source not in sources and getattr(self, name) != defaults[name]:
                raise ValueError(f"--{name} belongs to --source {' or '.join(sources)}, got --source {self.source}")
        if self.source in own["arguments"] and self.arguments is None:
            raise ValueError(f"--arguments must hold the constructor's arguments for --source {self.source}")


def read_constructor_arguments(text: str) -> dict:
    """A JSON object, given as such or as the name of a file that holds one."""
    content = text
    if not text.lstrip().startswith("{"):
        try:
            content = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--arguments must be a JSON object or a readable file, got {text!r}: {error}") from error
    try:
        arguments = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"--arguments must be valid JSON, got {text!r}: {error}") from error
    if not isinstance(arguments, dict):
        raise ValueError(f"--arguments must be a JSON object, got {type(arguments).__name__}")
    return arguments


def read_state_dict(path: str) -> Mapping[str, torch.Tensor]:
    """The tensors of a file; nothing in it is run.

    Raises:
        ValueError: no such file, a broken one, or one that holds more than tensors and plain containers.
    """
    try:
        if path.endswith(".safetensors"):
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"--input must hold a state dict, which loads without running code, got {path!r}: save it with "
            f"torch.save(model.state_dict(), ...). ({str(error).splitlines()[0]})"
        ) from error
    except (OSError, RuntimeError, EOFError, SafetensorError) as error:
        raise ValueError(f"--input must be a whole file with a state dict, got {path!r}: {error}") from error
    for name in NESTED:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    if not isinstance(state, Mapping):
        raise ValueError(f"--input must hold a state dict, got a {type(state).__name__} in {path!r}")
    return state


def class_of_original(options: ConversionArguments) -> type[PreTrainedModel]:
    """The class of transformers that the checkpoint was saved with.

    Raises:
        ValueError: no checkpoint, or no class of transformers.
    """
    name, hub = options.input, {"revision": options.model_revision, "token": options.token}
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"--input must hold a checkpoint, got the folder {name!r} without a config.json")
    config = AutoConfig.from_pretrained(name, **hub)
    heads = config.architectures or []
    model_class = getattr(transformers, heads[0], None) if len(heads) == 1 else None
    if model_class is None:
        raise ValueError(f"--input must name one class of transformers in its config, got architectures={heads}")
    return model_class


def load_original(options: ConversionArguments, model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """The model of transformers, with the head it was saved with.

    Raises:
        ValueError: broken weights, or weights that the class needs and that are not there.
    """
    name, hub = options.input, {"revision": options.model_revision, "token": options.token}
    try:
        model, loading = model_class.from_pretrained(name, **hub, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"--input must hold whole weights, got {name!r}: {error}") from error
    lacking = sorted(map(str, (*loading["missing_keys"], *loading["mismatched_keys"])))
    if lacking:
        raise ValueError(
            f"--input must hold every weight of {model_class.__name__}, got {name!r} without {', '.join(lacking)}"
        )
    return model


def layer_types_option(text: str) -> str | list[str]:
    kinds = [kind.strip() for kind in text.split(",")]
    return kinds[0] if len(kinds) == 1 else kinds


@contextmanager
def finished_or_nothing(output_dir: str):
    """A folder to write to, which becomes `output_dir` if all goes well and disappears otherwise.

    Raises:
        ValueError: `output_dir` is taken or cannot be written.
    """
    target = Path(output_dir).absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"--output_dir must be a new or empty folder, got {output_dir!r}, which holds something")
    made = [folder for folder in (target.parent, *target.parent.parents) if not folder.exists()]
    require_writable(str(target.parent))
    working = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield working
        mask = os.umask(0)
        os.umask(mask)
        working.chmod(0o777 & ~mask)  # mkdtemp lets nobody else in
        if target.exists():
            target.rmdir()
        working.rename(target)
    except BaseException:
        shutil.rmtree(working, ignore_errors=True)
        for folder in made:
            folder.rmdir()
        raise


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model")
IMAGE_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def save_processor(options: ConversionArguments, folder: Path, reads_images: bool) -> str:
    """Copies the tokenizer or image processor where there is one; returns what happened, for the summary."""
    kind, auto_class, known = "tokenizer", AutoTokenizer, TOKENIZER_FILES
    if reads_images:
        kind, auto_class, known = "image processor", AutoImageProcessor, IMAGE_PROCESSOR_FILES
    local = Path(options.input)
    # From a folder without one, transformers would make an empty tokenizer.
    if local.is_dir() and not any((local / name).is_file() for name in known):
        return f"no {kind} beside the weights"
    try:
        processor = auto_class.from_pretrained(options.input, revision=options.model_revision, token=options.token)
    except (OSError, ValueError) as error:
        return f"no {kind} could be loaded ({str(error).splitlines()[0]})"
    processor.save_pretrained(folder)
    return f"{kind} copied ({type(processor).__name__})"


def convert_original(options: ConversionArguments) -> tuple[PreTrainedModel, ConversionReport]:
    """A model of transformers: a Perceiver as it is, T5s with a light branch, others with the attention asked for."""
    overrides = parse_config_overrides(options.config_overrides)
    model_class = class_of_original(options)
    name = model_class.__name__
    if name not in UPCYCLED and options.light_branch != "zero":
        raise ValueError(f"--light_branch is for T5 and LongT5, got one with a {name}")
    if name in (*UPCYCLED, *PERCEIVERS) and options.layer_types != "linear_attention":
        raise ValueError(f"--layer_types is for Performers, got one with a {name}")
    if name in PERCEIVERS and overrides:
        raise ValueError(f"--config_overrides is for Performers and CoLT5s, got one with a {name}")
    check_override_names(CoLT5Config if name in UPCYCLED else PerformerConfig, overrides)
    original = load_original(options, model_class)
    if name in UPCYCLED:
        return upcycle_t5(original, light=options.light_branch, **overrides)
    if name in PERCEIVERS:
        return convert_transformers_perceiver(original)
    kinds = layer_types_option(options.layer_types)
    return convert_softmax_transformer(original, layer_types=kinds, **overrides)


def convert_routed_module(state: Mapping[str, torch.Tensor], arguments: dict, folder: Path) -> ConversionReport:
    """A module of CoLT5-attention, in `folder`: its ViT as a model, a block as a block."""
    original = original_module(state, arguments)
    if arguments["class"] == "ConditionalRoutedViT":
        model, report = convert_colt5_vit(original, arguments["image_size"])
        model.save_pretrained(folder)
    else:
        block, report = convert_colt5_attention(original)
        save_routed_block(block, describe(original), folder)
        report.notes.append("a block is no model: load it with conversion.routed_block_files.load_routed_block")
    return report


def convert_x_transformers_module(
    state: Mapping[str, torch.Tensor], arguments: dict, version: str
) -> tuple[PreTrainedModel, ConversionReport]:
    """A module of x-transformers, by the "class" among its arguments.

    Raises:
        ValueError: none of the classes that can be converted.
    """
    name = arguments.pop("class", None)
    if name not in X_TRANSFORMERS:
        raise ValueError(f'--arguments must hold "class", one of {", ".join(X_TRANSFORMERS)}, got {name!r}')
    return X_TRANSFORMERS[name](state, arguments, version=version)


def convert(options: ConversionArguments, folder: Path) -> ConversionReport:
    if options.source == "transformers":
        model, report = convert_original(options)
        reads_images = model.main_input_name == "pixel_values"
        report.notes.append(save_processor(options, folder, reads_images))
    else:
        arguments = read_constructor_arguments(options.arguments)
        state = read_state_dict(options.input)
        if options.source == "colt5_attention":
            return convert_routed_module(state, arguments, folder)
        if options.source == "performer_pytorch":
            model, report = convert_performer_pytorch(state, arguments, rotary=options.rotary)
        elif options.source == "x_transformers":
            model, report = convert_x_transformers_module(state, arguments, options.x_transformers_version)
        else:
            model, report = convert_flash_perceiver(state, arguments)
    model.save_pretrained(folder)
    return report


def main(arguments: list[str] | None = None) -> ConversionReport:
    """Runs one command line; returns what became of every weight."""
    (options,) = HfArgumentParser(ConversionArguments).parse_args_into_dataclasses(arguments)
    with finished_or_nothing(options.output_dir) as folder:
        report = convert(options, folder)
    print(report)
    print(f"saved to {options.output_dir}")
    return report


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"convert.py: {error}")
