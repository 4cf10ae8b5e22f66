"""Freezes a tiny checkpoint of every architecture as this version writes it, for test_old_checkpoints.py to load.

    python tests/checkpoints/write.py            # those of this version that are not there yet

Run it before a release; a folder that is there stays, old ones are the point. Each holds the configuration,
the weights, inputs with the logits they gave in float64, and the code in one archive.
"""

import argparse
import io
import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file


HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent))

import hf_efficient  # noqa: E402  (found by the line above)
from hf_efficient.registry import ARCHITECTURES  # noqa: E402


AUTO_CLASS = "AutoModelForCausalLM"
SIZES = {
    "performer": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "nb_features": 6},
    "x_transformer": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
    "perceiver_flash": {
        "hidden_size": 8,
        "num_latents": 4,
        "num_self_attention_layers": 1,
        "num_attention_heads": 2,
        "num_cross_attention_heads": 2,
        "max_position_embeddings": 16,
    },
    "colt5": {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 4,
        "intermediate_size": 8,
        "routing_window": 4,
    },
}


def write(model_type: str, folder: Path) -> None:
    torch.manual_seed(0)
    config = ARCHITECTURES[model_type].config_class()(vocab_size=16, **SIZES[model_type])
    model = ARCHITECTURES[model_type].model_classes()[AUTO_CLASS](config).eval()
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".new-") as temporary:
        saved, target = Path(temporary) / "saved", Path(temporary) / "frozen"
        model.save_pretrained(saved)
        target.mkdir()
        for name in ("config.json", "model.safetensors"):
            shutil.copyfile(saved / name, target / name)
        input_ids = torch.arange(20).reshape(2, 10) * 7 % 16
        attention_mask = torch.ones_like(input_ids)
        attention_mask[0, :3] = 0
        with torch.no_grad():
            logits = model.double()(input_ids=input_ids, attention_mask=attention_mask).logits
        tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "logits": logits.contiguous()}
        save_file(tensors, target / "expected.safetensors")
        with tarfile.open(target / "code.tar.xz", "w:xz") as archive:
            for path in sorted(saved.glob("*.py")):
                entry = tarfile.TarInfo(path.name)  # without times and owners, so that it is the same for everybody
                entry.size = path.stat().st_size
                archive.addfile(entry, io.BytesIO(path.read_bytes()))
        target.rename(folder)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for model_type in ARCHITECTURES:
        folder = HERE / f"{model_type}-{hf_efficient.__version__}"
        if not folder.exists():
            write(model_type, folder)
            print(folder, f"{sum(path.stat().st_size for path in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
