"""The Hub, there and back: huggingface_hub's own client pushes to and pulls from the server of hub_stub.py, over HTTP.

Each process has its own settings and an empty cache; those that pull cannot import hf_efficient.
"""

import json
import re

import pytest
from helpers import ROOT
from hub_stub import Hub, running_hub
from huggingface_hub import ModelCard
from process_with_torch import run_python_with_torch, run_with_torch_and_without_package
from test_model_card import PIPELINE_TAGS
from test_remote_code import CLASS_NAMES, IN_THE_OTHER_PROCESS, rows

from hf_efficient.configuration.model_card import is_replaceable


pytestmark = pytest.mark.slow

NAMES = [f"me/{model_type}-{auto_class}" for model_type, auto_class in rows]

PUSH_EVERY_HEAD = (
    IN_THE_OTHER_PROCESS
    + f"""
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_remote_code import config_for, rows
import hf_efficient
for model_type, auto_class in rows:
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config_for(model_type, auto_class)).eval()
    model.push_to_hub(f"me/{{model_type}}-{{auto_class}}")
    torch.save(outputs(model, auto_class), Path(sys.argv[1]) / f"{{model_type}}-{{auto_class}}")
"""
)
# argv: the outputs' folder, then each repository as name@commit. transformers parses every file of every repository
# for the packages that it imports; of files that several repositories share, the answer to the first is kept.
PULL_EVERY_HEAD = (
    IN_THE_OTHER_PROCESS
    + """
from transformers import dynamic_module_utils
check_imports, checked = dynamic_module_utils.check_imports, {}
def check_imports_once(path):
    content = Path(path).read_bytes()
    if content not in checked:
        checked[content] = check_imports(path)
    return checked[content]
dynamic_module_utils.check_imports = check_imports_once
for argument in sys.argv[2:]:
    name, _, commit = argument.partition("@")
    auto_class = name.partition("-")[2]
    auto = getattr(transformers, auto_class)
    model = auto.from_pretrained(name, trust_remote_code=True, revision=commit).eval()
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    check(model, auto_class, Path(sys.argv[1]) / name.rpartition("/")[2])
dynamic_module_utils.check_imports = check_imports
assert not any(module.partition(".")[0] == "hf_efficient" for module in sys.modules)
"""
)
TRAIN = """
def train(model, folder, trainer_class=transformers.Trainer, **options):
    rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
    arguments = transformers.TrainingArguments(
        folder, max_steps=2, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True, push_to_hub=True, **options
    )
    trainer = trainer_class(
        model, arguments, train_dataset=rows, processing_class=transformers.ByT5Tokenizer()
    )
    trainer.train()
    return trainer
"""
FINE_TUNE_AND_PUSH_ON = (
    TRAIN
    + """
name = "performer-AutoModelForCausalLM"
model = transformers.AutoModelForCausalLM.from_pretrained("me/" + name, trust_remote_code=True)
train(model, "run", hub_model_id="me/tuned-AutoModelForCausalLM").push_to_hub()
torch.save(outputs(model.eval(), "AutoModelForCausalLM"), Path(sys.argv[1]) / "tuned-AutoModelForCausalLM")
model.push_to_hub("me/again-AutoModelForCausalLM")
torch.save(outputs(model, "AutoModelForCausalLM"), Path(sys.argv[1]) / "again-AutoModelForCausalLM")
transformers.AutoConfig.from_pretrained("me/" + name, trust_remote_code=True).push_to_hub("me/config")
"""
)
PULL_WHAT_WAS_TUNED = """
for name in ("tuned-AutoModelForCausalLM", "again-AutoModelForCausalLM"):
    model = load("me/" + name, "AutoModelForCausalLM")
    check(model, "AutoModelForCausalLM", Path(sys.argv[1]) / name)
    assert model.generate(torch.arange(4)[None], max_new_tokens=3, do_sample=False).shape == (1, 7)
tokenizer = transformers.AutoTokenizer.from_pretrained("me/tuned-AutoModelForCausalLM", trust_remote_code=True)
assert tokenizer("a")["input_ids"] == [100, 1]
"""


def code(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.endswith(".py")}


def pinned(hub: Hub, *names: str) -> list[str]:
    return [f"{name}@{hub.repositories[name].head.id}" for name in names]


@pytest.mark.matrix("Hub round trip", heads=CLASS_NAMES)
def test_every_head_makes_the_trip_and_goes_on_from_there(tmp_path):
    with running_hub() as hub:
        writer, reader = (hub.environment(tmp_path / name) for name in ("writer", "reader"))
        run_python_with_torch("-c", PUSH_EVERY_HEAD, tmp_path, environment=writer)
        assert set(hub.repositories) == set(NAMES)
        for name in NAMES:
            files = hub.files(name)
            kinds = {path.rpartition(".")[2] for path in files}
            assert kinds == {"py", "json", "safetensors", "md", "gitattributes"}, name
            text = files["README.md"].decode()
            assert f'name = "{name}"' in text and is_replaceable(text)
            assert ModelCard(text).data.pipeline_tag == PIPELINE_TAGS[name.partition("-")[2]]
            large = [path for path, file in hub.repositories[name].head.files.items() if file.is_large]
            assert large == ["model.safetensors"]
            assert len(hub.repositories[name].head.history()) == 2  # the empty repository, and everything at once

        pulled = pinned(hub, *NAMES)
        run_with_torch_and_without_package(
            PULL_EVERY_HEAD + FINE_TUNE_AND_PUSH_ON + PULL_WHAT_WAS_TUNED, tmp_path, *pulled, environment=reader
        )
        for name in ("me/tuned-AutoModelForCausalLM", "me/again-AutoModelForCausalLM", "me/config"):
            assert code(hub.files(name)) == code(hub.files("me/performer-AutoModelForCausalLM")), name
            assert "me/performer" not in hub.files(name)["config.json"].decode()
        for name in ("me/again-AutoModelForCausalLM", "me/config"):  # the card travels as well
            assert f'name = "{name}"' in hub.files(name)["README.md"].decode()

        before = len(hub.requests)
        offline = reader | {"HF_HUB_OFFLINE": "1"}
        run_with_torch_and_without_package(
            PULL_EVERY_HEAD + PULL_WHAT_WAS_TUNED, tmp_path, *pulled, environment=offline
        )
        assert hub.requests[before:] == []


PUSHES_OF_ONE_TRAINING = (
    IN_THE_OTHER_PROCESS
    + TRAIN
    + """
import hf_efficient
from huggingface_hub import HfApi, ModelCard
from hf_efficient.model_card import WritesModelCard

class Trainer(WritesModelCard, transformers.Trainer):
    pass

folder = Path(sys.argv[1])
torch.manual_seed(0)
config = hf_efficient.PerformerConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
model = hf_efficient.PerformerForCausalLM(config)
trainer = train(
    model, folder / "run", Trainer, hub_model_id="me/notes", hub_strategy="every_save"
)
trainer.push_to_hub(license="apache-2.0")
torch.save(outputs(model.eval(), "AutoModelForCausalLM"), folder / "trained")
with torch.no_grad():
    model.lm_head.weight.mul_(2)
torch.save(outputs(model, "AutoModelForCausalLM"), folder / "doubled")
model.push_to_hub("me/notes", commit_message="Second push")
card = ModelCard.load("me/notes")
card.text += "\\nWritten by me.\\n"
card.push_to_hub("me/notes", commit_message="My card")
model.push_to_hub("me/notes", commit_message="Third push", tags=["loud"])
with torch.no_grad():
    model.lm_head.weight.mul_(2)
model.push_to_hub("me/notes", revision="louder", commit_message="To a branch")
torch.save(outputs(model, "AutoModelForCausalLM"), folder / "louder")
transformers.ByT5Tokenizer(extra_ids=50).push_to_hub("me/notes", revision="louder", commit_message="Tokenizer")
"""
)


def test_trainer_second_push_and_branch(tmp_path):
    with running_hub() as hub:
        run_python_with_torch("-c", PUSHES_OF_ONE_TRAINING, tmp_path, environment=hub.environment(tmp_path / "writer"))
        repository = hub.repositories["me/notes"]
        history = repository.head.history()[::-1]
        titles = [commit.title for commit in history]
        assert titles[0] == "initial commit" and titles[-4:] == [
            "End of training",
            "Second push",
            "My card",
            "Third push",
        ]
        # A save that comes while the one before is still being pushed is not pushed.
        assert titles[1] == "Training in progress, step 1" and len(titles) <= 7
        assert [c.title for c in repository.at("louder").history()][:2] == ["Tokenizer", "To a branch"]
        for commit in history[1:]:  # also those that Trainer pushes on its way load by themselves
            module = json.loads(commit.files["config.json"].data)["auto_map"]["AutoModelForCausalLM"].partition(".")[0]
            imported = re.findall(rb"from \.(\w+) import", commit.files[f"{module}.py"].data)
            assert imported and all(f"{name.decode()}.py" in commit.files for name in imported), commit.title
            assert "tokenizer_config.json" in commit.files

        trained, second, mine, third = (ModelCard(commit.files["README.md"].data.decode()) for commit in history[-4:])
        assert trained.data.license == "apache-2.0" and "- learning_rate:" in trained.text
        assert second.text == trained.text  # the figures stay
        assert mine.text.endswith("Written by me.\n") and third.text == mine.text
        assert third.data.tags == [*mine.data.tags, "loud"]

        by_title = {commit.title: commit.id for commit in history}
        run_with_torch_and_without_package(
            IN_THE_OTHER_PROCESS
            + """
for argument in sys.argv[2:]:
    revision, _, expected = argument.partition("=")
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained("me/notes", trust_remote_code=True, revision=revision).eval()
    if expected:
        check(model, "AutoModelForCausalLM", Path(sys.argv[1]) / expected)
""",
            tmp_path,
            f"{by_title['Training in progress, step 1']}=",
            f"{by_title['End of training']}=trained",
            "main=doubled",
            "louder=louder",
            environment=hub.environment(tmp_path / "reader"),
        )


INTERRUPTED = """
import hf_efficient, torch
from huggingface_hub.errors import HfHubHTTPError
from httpx2 import HTTPError
config = hf_efficient.PerformerConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
model = hf_efficient.PerformerForCausalLM(config)
for name in ("lost-connection", "no-room", "no-commit", "dropped-commit"):
    model.push_to_hub(f"me/{name}")
with torch.no_grad():
    model.lm_head.weight.mul_(2)
model.push_to_hub("me/lost-connection", commit_message="Second push")  # the client tries again by itself
for name in ("no-room", "no-commit", "dropped-commit"):
    try:
        model.push_to_hub(f"me/{name}", commit_message="Second push")
    except (HfHubHTTPError, HTTPError, RuntimeError) as error:
        print(name, type(error).__name__)
    else:
        raise SystemExit(f"the push to {name} was not interrupted")
model.push_to_hub("me/no-commit", commit_message="Third push")
"""


def test_an_interrupted_upload_leaves_the_last_whole_commit(tmp_path):
    with running_hub() as hub:
        # Each the second time: first everything arrives.
        hub.break_once(r"PUT /large/me/lost-connection/.*", None, skip=1)
        hub.break_once(r"PUT /large/me/no-room/.*", 507, skip=1)
        hub.break_once(r"POST /api/models/me/no-commit/commit/main", 507, skip=1)
        hub.break_once(r"POST /api/models/me/dropped-commit/commit/main", None, skip=1)
        run_python_with_torch("-c", INTERRUPTED, environment=hub.environment(tmp_path))
        assert not hub.faults
        titles = {
            name: [commit.title for commit in repository.head.history()]
            for name, repository in hub.repositories.items()
        }
        assert titles["me/lost-connection"] == ["Second push", "Upload PerformerForCausalLM", "initial commit"]
        assert titles["me/no-room"] == titles["me/dropped-commit"] == ["Upload PerformerForCausalLM", "initial commit"]
        assert titles["me/no-commit"] == ["Third push", "Upload PerformerForCausalLM", "initial commit"]

        def content(name, revision="main"):
            return {path: data for path, data in hub.files(name, revision).items() if path != "README.md"}

        first = content("me/lost-connection", hub.repositories["me/lost-connection"].head.parent.id)
        assert content("me/no-room") == content("me/dropped-commit") == first
        assert content("me/no-commit") == content("me/lost-connection") != first
