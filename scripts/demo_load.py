"""The other machine of the demo: loads a saved folder where hf_efficient does not exist.

    python -I scripts/demo_load.py FOLDER PROBE.safetensors --prompt "def " [--max_new_tokens 200]

Imports nothing of this project and hides hf_efficient even where it is installed. The folder's own code runs
(`trust_remote_code=True`): demo.py has just written it. Ends with an error unless the logits equal the saved ones to
the bit.
"""

import argparse
import sys
import time


class HidingFinder:
    """An import finder that knows everything the wrapped one does, except one package."""

    def __init__(self, finder, hidden: str):
        self.finder = finder
        self.hidden = hidden

    def __getattr__(self, name):
        return getattr(self.finder, name)

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.hidden:
            return None
        return self.finder.find_spec(name, path, target)


def hide_package(name: str) -> None:
    """Makes a package impossible to import in this process, and proves it."""
    sys.meta_path[:] = [HidingFinder(finder, name) for finder in sys.meta_path]
    try:
        __import__(name)
    except ModuleNotFoundError:
        return
    raise SystemExit(f"{name} was to be hidden, and can still be imported")


def require_equal_logits(model, input_ids, expected) -> None:
    """Ends the process unless the model's logits are the expected ones, every bit of them."""
    import torch

    with torch.no_grad():
        logits = model(input_ids=input_ids).logits
    if logits.shape != expected.shape:
        raise SystemExit(
            f"  logits have shape {tuple(logits.shape)}, the training process had {tuple(expected.shape)}"
        )
    if not torch.equal(logits, expected):
        difference = (logits - expected).abs().max().item()
        raise SystemExit(f"  logits differ from those of the training process by up to {difference:.3g}")
    print(f"  all {logits.numel():,} logits equal those of the training process to the bit")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("probe", help="safetensors file with input_ids and the logits the training process had")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max_new_tokens", type=int, default=200)
    parser.add_argument("--threads", type=int, help="as in the training process: sums split the same way")
    arguments = parser.parse_args()
    hide_package("hf_efficient")
    print("  import hf_efficient: ModuleNotFoundError, as it should be here")

    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.folder, trust_remote_code=True)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder, trust_remote_code=True)
    print(f"  {type(model).__name__} from {type(model).__module__.split('.')[0]}, {type(tokenizer).__name__}")

    probe = load_file(arguments.probe)
    require_equal_logits(model, probe["input_ids"], probe["logits"])

    print(f"  its continuation of a prompt it has never seen:\n{'-' * 80}")
    set_seed(0)
    prompt = tokenizer(arguments.prompt, add_special_tokens=False, return_tensors="pt")
    started = time.perf_counter()
    output = model.generate(
        **prompt,
        streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        max_new_tokens=arguments.max_new_tokens,
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
    )
    seconds = time.perf_counter() - started
    count = output.shape[1] - prompt["input_ids"].shape[1]
    print(f"{'-' * 80}\n  {count} bytes in {seconds:.1f} s ({count / seconds:.0f} per second)")


if __name__ == "__main__":
    main()
