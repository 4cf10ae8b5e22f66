"""Continues a prompt with a checkpoint, streaming to the terminal.

    python scripts/generate.py --model_name_or_path out --prompt "def main():" --max_new_tokens 300
    git diff | python scripts/generate.py --model_name_or_path out --temperature 0.7 --top_p 0.95

Takes a folder or a name on the Hub. The prompt comes from --prompt, --prompt_file or standard input; an empty one
starts a new document. Beam search has nothing to stream: its text comes whole.
"""

import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from byte_streamer import streamer_for
from safetensors import SafetensorError
from text_data import separator_token_id
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, PreTrainedModel, set_seed

import hf_efficient  # noqa: F401  (registers our architectures with the Auto classes)


@dataclass
class GenerationArguments:
    """What to continue, with what, and how."""

    model_name_or_path: str = field(metadata={"help": "Checkpoint: a folder or a name on the Hub."})
    prompt: str | None = field(default=None, metadata={"help": "Text to continue."})
    prompt_file: str | None = field(default=None, metadata={"help": "UTF-8 file with the text to continue."})
    max_new_tokens: int = field(default=256, metadata={"help": "At most so many new tokens."})
    temperature: float = field(default=0.8, metadata={"help": "0 always takes the likeliest token."})
    top_p: float = field(default=1.0, metadata={"help": "Sample from the likeliest tokens that hold this share."})
    top_k: int = field(default=0, metadata={"help": "Sample from this many tokens; 0: from all."})
    num_beams: int = field(default=1, metadata={"help": "More than one: beam search, without sampling."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Above 1: repeat less."})
    seed: int = field(default=0, metadata={"help": "The same seed gives the same text."})
    tokenizer_name: str | None = field(default=None, metadata={"help": "Default: the checkpoint's own."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the Hub."})
    token: str | None = field(default=None, metadata={"help": "Access token for private Hub repositories."})
    trust_remote_code: bool = field(
        default=False, metadata={"help": "Run the code that stands beside a checkpoint. Only for authors you trust."}
    )
    dtype: str = field(default="auto", metadata={"help": "auto (as saved), float32, bfloat16 or float16."})
    device: str = field(default="auto", metadata={"help": "auto (the accelerator, if there is one), cpu, cuda:1, ..."})

    def __post_init__(self):
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("--prompt and --prompt_file exclude each other, got both")
        for name, minimum in (("max_new_tokens", 1), ("num_beams", 1), ("top_k", 0), ("temperature", 0)):
            if getattr(self, name) < minimum:
                raise ValueError(f"--{name} must be at least {minimum}, got {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be above 0 and at most 1, got {self.top_p}")
        if self.repetition_penalty <= 0:
            raise ValueError(f"--repetition_penalty must be above 0, got {self.repetition_penalty}")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"--dtype must be auto or a torch dtype, got {self.dtype!r}")


def read_prompt(arguments: GenerationArguments) -> str:
    """The prompt from wherever it comes."""
    if arguments.prompt is not None:
        return arguments.prompt
    if arguments.prompt_file is not None:
        try:
            return Path(arguments.prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"--prompt_file must be a readable UTF-8 file, got {arguments.prompt_file!r}: {error}"
            ) from error
    if sys.stdin.isatty():
        raise ValueError("--prompt, --prompt_file or standard input must hold the prompt, got a terminal")
    return sys.stdin.read()


def resolve_device(name: str) -> torch.device:
    if name != "auto":
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"--device must be one that torch can use here, got {name!r}: {error}") from error
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def load_model(arguments: GenerationArguments, device: torch.device) -> PreTrainedModel:
    name = arguments.model_name_or_path
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        raise ValueError(f"--model_name_or_path must hold a checkpoint, got the folder {name!r} without a config.json")
    options = {
        "revision": arguments.model_revision,
        "token": arguments.token,
        "trust_remote_code": arguments.trust_remote_code,
    }
    config = AutoConfig.from_pretrained(name, **options)
    heads = config.architectures or []
    if heads and not any(head.endswith(("ForCausalLM", "LMHeadModel")) for head in heads):
        # It would load, with a head of random weights.
        raise ValueError(
            f"--model_name_or_path must be a causal language model, got {' and '.join(heads)} in {name!r}"
        )
    try:
        model = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto" if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
            **options,
        )
    except SafetensorError as error:
        raise ValueError(f"--model_name_or_path must hold whole weights, got {name!r}: {error}") from error
    return model.to(device).eval()


def prompt_ids(tokenizer, prompt: str, device: torch.device) -> torch.Tensor:
    """The prompt's tokens as the start of a document: without the end that ByT5 and BERT put behind it."""
    token_ids = tokenizer(prompt, split_special_tokens=True)["input_ids"] if prompt else []
    if token_ids and token_ids[-1] in (tokenizer.eos_token_id, tokenizer.sep_token_id):
        token_ids = token_ids[:-1]
    return torch.tensor([token_ids or [separator_token_id(tokenizer)]], device=device)


def main(arguments: list[str] | None = None) -> str:
    """Runs one command line; returns the new text."""
    (options,) = HfArgumentParser(GenerationArguments).parse_args_into_dataclasses(arguments)
    prompt = read_prompt(options)
    device = resolve_device(options.device)
    model = load_model(options, device)
    tokenizer = AutoTokenizer.from_pretrained(
        options.tokenizer_name or options.model_name_or_path,
        token=options.token,
        trust_remote_code=options.trust_remote_code,
    )
    set_seed(options.seed)
    input_ids = prompt_ids(tokenizer, prompt, device)
    streaming = options.num_beams == 1
    sampling = streaming and options.temperature > 0
    started = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        streamer=streamer_for(tokenizer) if streaming else None,
        max_new_tokens=options.max_new_tokens,
        num_beams=options.num_beams,
        do_sample=sampling,
        repetition_penalty=options.repetition_penalty,
        pad_token_id=separator_token_id(tokenizer) if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **({"temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k} if sampling else {}),
    )
    seconds = time.perf_counter() - started
    new_ids = output[0, input_ids.shape[1] :]
    text = tokenizer.decode(new_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not streaming:
        print(prompt + text)
    print(f"[{len(new_ids)} tokens in {seconds:.1f} s, {len(new_ids) / seconds:.0f} per second]", file=sys.stderr)
    return text


if __name__ == "__main__":
    main()
