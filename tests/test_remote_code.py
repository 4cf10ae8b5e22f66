"""A saved Performer loads, runs and saves again where hf_efficient cannot be imported."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from helpers import WITHOUT_THE_PACKAGE, subprocess_without_package
from process_with_torch import run_with_torch_and_without_package
from tiny_heads import ENCODER_DECODERS, TINY

from hf_efficient.registry import ARCHITECTURES
from hf_efficient.remote_code import travelling


pytestmark = pytest.mark.slow  # most of the time goes into starting processes that import transformers

# Shared by the processes below: loads, compares and saves every head found in a folder of folders.
IN_THE_OTHER_PROCESS = """
import json, os, sys
from pathlib import Path
import torch, transformers

ENCODER_DECODERS = ("AutoModelForSeq2SeqLM", "AutoModelForImageTextToText")

def load(folder, auto_class):
    model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    assert not any(name.partition(".")[0] == "hf_efficient" for name in sys.modules)
    return model.eval()

def outputs(model, auto_class):
    tokens = torch.arange(3, 27).reshape(2, 12)
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = tokens[:, :5]
    if "Image" in auto_class:
        images = {"pixel_values": torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8)}
        inputs = inputs | images if "Text" in auto_class else images
    if "TimeSeries" in auto_class:
        inputs = {"input_features": torch.linspace(-1, 1, 72).reshape(2, 12, 3)}
    with torch.no_grad():
        result = model(**inputs)
    return {name: value for name, value in result.items() if isinstance(value, torch.Tensor)}

def check(model, auto_class, expected):
    got, expected = outputs(model, auto_class), torch.load(expected)
    assert got.keys() == expected.keys() and got
    assert all(torch.equal(got[name], expected[name]) for name in got), auto_class
"""
_shared = {}
exec(IN_THE_OTHER_PROCESS, _shared)  # the same inputs and outputs on this side
outputs = _shared["outputs"]

rows = [(model_type, auto_class) for model_type, row in ARCHITECTURES.items() for auto_class in row.models]
CLASS_NAMES = [reference.rpartition(":")[2] for row in ARCHITECTURES.values() for reference in row.models.values()]


def config_for(model_type, auto_class):
    encoder_decoder = {"is_encoder_decoder": True} if auto_class in ENCODER_DECODERS else {}
    return ARCHITECTURES[model_type].config_class()(**TINY[model_type], **encoder_decoder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Every head of every architecture, saved from the package, in <model type>/<Auto class>, and its outputs."""
    folder = tmp_path_factory.mktemp("saved")
    for model_type, auto_class in rows:
        torch.manual_seed(0)
        model = getattr(transformers, auto_class).from_config(config_for(model_type, auto_class)).eval()
        target = folder / model_type / auto_class
        model.save_pretrained(target)
        torch.save(outputs(model, auto_class), target.with_suffix(".outputs"))
    return folder


def code(folder):
    return {path.name: path.read_text() for path in Path(folder).glob("*.py")}


def beside(model_type, auto_class):
    """The Auto classes of the models that travel with this one."""
    class_name = ARCHITECTURES[model_type].models[auto_class].rpartition(":")[2]
    return list(travelling(ARCHITECTURES[model_type], [class_name])[0])


@pytest.mark.parametrize(("model_type", "auto_class"), rows)
def test_the_folder_holds_code_safetensors_and_every_head(saved, model_type, auto_class):
    folder = saved / model_type / auto_class
    assert {path.suffix for path in folder.iterdir()} == {".py", ".json", ".safetensors", ".md"}
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert set(auto_map) == {"AutoConfig", *beside(model_type, auto_class)}
    for reference in auto_map.values():
        module, _, name = reference.partition(".")
        assert f"class {name}(" in code(folder)[f"{module}.py"]


@pytest.mark.matrix("remote code", heads=CLASS_NAMES)
@pytest.mark.parametrize(
    ("hidden", "environment"),
    [
        pytest.param(WITHOUT_THE_PACKAGE, {}, id="offline"),
        # Nobody listens there: a local folder needs no Hub even when the Hub may be asked.
        pytest.param(
            (*WITHOUT_THE_PACKAGE, "triton"),
            {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"},
            id="online-without-triton",
        ),
    ],
)
def test_every_head_loads_without_the_package_and_saves_itself_again(saved, tmp_path, hidden, environment):
    subprocess_without_package(
        IN_THE_OTHER_PROCESS
        + """
saved, again = map(Path, sys.argv[1:3])
for folder in sorted(path for path in saved.glob("*/*") if path.is_dir()):
    source, target = folder, again / folder.parent.name / folder.name
    if "triton" in sys.argv[3:]:
        # Under one name folders with the same code are one module for transformers, imported once: not so elsewhere.
        source = target / "tiny"
        target.mkdir(parents=True)
        source.symlink_to(folder)
    model = load(source, folder.name)
    check(model, folder.name, folder.with_suffix(".outputs"))
    if source is not folder:
        source.unlink()
    model.save_pretrained(target)
assert ("triton" in sys.argv[3:]) <= ("triton" not in sys.modules)
""",
        saved,
        tmp_path,
        *hidden,
        hidden=hidden,
        environment=environment,
    )
    for model_type, auto_class in rows:
        original, copy = saved / model_type / auto_class, tmp_path / model_type / auto_class
        assert sorted(path.name for path in copy.iterdir()) == sorted(path.name for path in original.iterdir())
        for path in original.iterdir():
            assert path.read_bytes() == (copy / path.name).read_bytes(), path.name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_copy_of_a_copy_needs_neither_the_package_nor_the_folders_before_it(saved, tmp_path, model_type):
    """Configuration alone, model, and a Trainer's checkpoint, each saved by a process without the package."""
    first = shutil.copytree(saved / model_type / "AutoModelForCausalLM", tmp_path / "first")
    train = """
class Data(torch.utils.data.Dataset):
    def __len__(self): return 8
    def __getitem__(self, index): return {"input_ids": torch.arange(index, index + 8), "labels": torch.arange(8)}
def train(model, folder):
    arguments = transformers.TrainingArguments(
        folder, max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, per_device_train_batch_size=2
    )
    transformers.Trainer(model, arguments, train_dataset=Data()).train()
    return Path(folder) / "checkpoint-2"
"""
    subprocess_without_package(
        IN_THE_OTHER_PROCESS
        + train
        + """
import shutil
folder = Path(sys.argv[1])
auto_class = "AutoModelForCausalLM"
config = transformers.AutoConfig.from_pretrained(folder / "first", trust_remote_code=True)
config.save_pretrained(folder / "config_only")
model = load(folder / "first", auto_class)
shutil.rmtree(folder / "first")
model.save_pretrained(folder / "second")
model.config.save_pretrained(folder / "config_of_the_model")
checkpoint = train(model, folder / "run")
torch.save(outputs(model.eval(), auto_class), folder / "trained.outputs")
""",
        tmp_path,
    )
    assert not first.exists()
    original = code(saved / model_type / "AutoModelForCausalLM")
    for name in ("config_only", "second", "config_of_the_model", "run/checkpoint-2"):
        assert code(tmp_path / name) == original, name
        auto_map = json.loads((tmp_path / name / "config.json").read_text())["auto_map"]
        assert set(auto_map) == {"AutoConfig", *beside(model_type, "AutoModelForCausalLM")}, name

    subprocess_without_package(
        IN_THE_OTHER_PROCESS
        + """
folder, expected = map(Path, sys.argv[1:3])
auto_class = "AutoModelForCausalLM"
check(load(folder / "second", auto_class), auto_class, expected)
check(load(folder / "run/checkpoint-2", auto_class), auto_class, folder / "trained.outputs")
for auto_class in sys.argv[3:]:
    kind = {"is_decoder": auto_class == "AutoModelForCausalLM", "is_encoder_decoder": auto_class in ENCODER_DECODERS}
    config = transformers.AutoConfig.from_pretrained(folder / "config_only", trust_remote_code=True, **kind)
    getattr(transformers, auto_class).from_config(config, trust_remote_code=True)
""",
        tmp_path,
        (saved / model_type / "AutoModelForCausalLM").with_suffix(".outputs"),
        *beside(model_type, "AutoModelForCausalLM"),
    )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_trainers_checkpoint_of_the_package_is_self_contained(saved, tmp_path, model_type):
    model = transformers.AutoModelForCausalLM.from_pretrained(saved / model_type / "AutoModelForCausalLM")
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    arguments = transformers.TrainingArguments(
        tmp_path / "run", max_steps=2, save_steps=2, report_to=[], use_cpu=True, disable_tqdm=True
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    checkpoint = tmp_path / "run/checkpoint-2"
    assert code(checkpoint) == code(saved / model_type / "AutoModelForCausalLM")
    torch.save(outputs(model.eval(), "AutoModelForCausalLM"), tmp_path / "expected")
    subprocess_without_package(
        IN_THE_OTHER_PROCESS + "check(load(sys.argv[1], 'AutoModelForCausalLM'), 'AutoModelForCausalLM', sys.argv[2])",
        checkpoint,
        tmp_path / "expected",
    )


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_repository_in_the_hubs_cache_loads_offline_and_saves_itself_again(saved, tmp_path, model_type):
    """The Hub's way differs from a folder's: transformers fetches file after file, following the imports."""
    repository = tmp_path / "home/hub/models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(saved / model_type / "AutoModelForCausalLM", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    run_with_torch_and_without_package(
        IN_THE_OTHER_PROCESS
        + """
auto_class = "AutoModelForCausalLM"
config = transformers.AutoConfig.from_pretrained("someone/tiny", trust_remote_code=True)
config.save_pretrained(sys.argv[2])
model = load("someone/tiny", auto_class)
check(model, auto_class, sys.argv[1])
model.save_pretrained(sys.argv[3])
""",
        (saved / model_type / "AutoModelForCausalLM").with_suffix(".outputs"),
        tmp_path / "config_only",
        tmp_path / "again",
        environment={"HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "home/modules")},
    )
    for name in ("config_only", "again"):
        assert code(tmp_path / name) == code(saved / model_type / "AutoModelForCausalLM")
        # transformers 5.23 notes no repository here; of a map that names one see test_remote_code_writer.py.
        assert "someone/tiny" not in (tmp_path / name / "config.json").read_text()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_where_the_package_is_installed_its_own_classes_are_used(saved, model_type):
    folder = saved / model_type / "AutoModelForCausalLM"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model) is ARCHITECTURES[model_type].model_classes()["AutoModelForCausalLM"]
    assert type(model.config) is ARCHITECTURES[model_type].config_class()


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_tokenizer_beside_the_model_loads_too(saved, tmp_path, model_type):
    """AutoTokenizer reads the model's configuration, and with it the remote code, on its way."""
    folder = shutil.copytree(saved / model_type / "AutoModelForCausalLM", tmp_path / "saved")
    transformers.ByT5Tokenizer().save_pretrained(folder)
    printed = subprocess_without_package(
        "import sys\nfrom transformers import AutoTokenizer\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "print(type(tokenizer).__name__, tokenizer.decode(tokenizer('é')['input_ids'], skip_special_tokens=True))",
        folder,
    )
    assert printed.split() == ["ByT5Tokenizer", "é"]
