"""Nothing that is read makes code run, but for the code of a checkpoint whose user said trust_remote_code=True.

docs/security.md says what that means.
"""

import ast
import dataclasses
import json
import pickle
import sys

import pytest
import torch
from helpers import ROOT, run_warm_python, subprocess_without_package
from hub_stub import running_hub
from process_with_torch import run_python_with_torch
from test_remote_code import config_for

from hf_efficient import PerformerForCausalLM
from hf_efficient.registry import ARCHITECTURES
from hf_efficient.remote_code import travelling


SHIPPED = ("hf_efficient", "configuration", "modeling", "kernels")
SOURCES = sorted(path for folder in SHIPPED for path in (ROOT / folder).rglob("*.py"))
# demo.py's second process, which loads what the first has written a moment before.
SCRIPTS_THAT_TRUST = {"demo_load.py"}
sources = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))


def trusts(tree) -> list[int]:
    """The lines that decide for somebody to trust code, whatever way: argument, default, assignment or dict entry."""
    lines = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):
            pairs = [(node.arg, node.value)]
        elif isinstance(node, ast.Dict):
            pairs = [(getattr(key, "value", None), value) for key, value in zip(node.keys, node.values, strict=True)]
        elif isinstance(node, ast.Assign):
            targets = [part for target in node.targets for part in ast.walk(target)]
            pairs = [(getattr(t, "id", getattr(t, "attr", getattr(t, "value", None))), node.value) for t in targets]
        elif isinstance(node, ast.arguments):
            named = [*node.posonlyargs, *node.args][-len(node.defaults) or None :] if node.defaults else []
            pairs = [(a.arg, d) for a, d in zip(named, node.defaults, strict=True)]
            pairs += [(a.arg, d) for a, d in zip(node.kwonlyargs, node.kw_defaults, strict=True)]
        else:
            continue
        lines += [
            value.lineno
            for name, value in pairs
            if name == "trust_remote_code" and isinstance(value, ast.Constant) and value.value
        ]
    return lines


@sources
def test_the_package_trusts_no_code_for_anybody(path):
    assert not trusts(ast.parse(path.read_text(encoding="utf-8")))


def test_of_the_scripts_one_trusts_and_it_says_so():
    found = {path.name for path in (ROOT / "scripts").glob("*.py") if trusts(ast.parse(path.read_text()))}
    assert found == SCRIPTS_THAT_TRUST


@pytest.mark.parametrize(
    "source",
    [
        "f(trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "kwargs['trust_remote_code'] = True",
        "self.trust_remote_code = True",
        "def f(x, trust_remote_code=True): pass",
        "def f(*, trust_remote_code=True): pass",
    ],
)
def test_the_check_for_trust_sees(source):
    assert trusts(ast.parse(source))


@sources
def test_the_package_reads_no_pickle_and_executes_no_text(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "dill", "cloudpickle", "joblib", "subprocess", "marshal"} & set(names), node.lineno
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "compile", "__import__", "os.system", "torch.load"}, node.lineno


ALLOWED = {"torch", "transformers", "numpy", "safetensors", "huggingface_hub"} | sys.stdlib_module_names


def absolute_imports(node, guarded=False):
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from ((alias.name.partition(".")[0], guarded) for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and not child.level:
            yield child.module.partition(".")[0], guarded
        yield from absolute_imports(child, guarded or isinstance(child, ast.Try))


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_exported_code_imports_what_every_user_has_and_triton_in_a_try(model_type):
    files = travelling(ARCHITECTURES[model_type])[1]
    imports = {found for text in files.values() for found in absolute_imports(ast.parse(text))}
    assert ("torch", False) in imports
    assert {name for name, guarded in imports if not guarded} <= ALLOWED
    assert {name for name, guarded in imports if guarded} <= ALLOWED | {"triton"}


# --- configurations

# argv: the folder of evil_module.py. Reads one JSON per line: {"model_type", "auto_class", "values"}.
FUZZ = """
import json, os, sys
from pathlib import Path
home = Path(sys.argv[1])
sys.path[:0] = [str(home)]
os.chdir(home)
import torch, transformers, hf_efficient
transformers.logging.set_verbosity(transformers.logging.CRITICAL)
seen = []
def watch(event, arguments):
    if event == "import" and "evil" in str(arguments[0]):
        seen.append(f"import {arguments[0]}")
    elif event == "open" and "evil" in str(arguments[0]):
        seen.append(f"open {arguments[0]}")
    elif event in ("socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system", "os.exec"):
        seen.append(f"{event} {arguments}")
sys.addaudithook(watch)
read = built = 0
for line in sys.stdin:
    case = json.loads(line)
    folder = home / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case["values"]))
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        read += 1
        getattr(transformers, case["auto_class"]).from_config(config)
        built += 1
    except Exception as error:  # whatever it is refused with: what counts is what it did
        assert not isinstance(error, (MemoryError, SystemError)), error
    if seen:
        raise SystemExit(f"{case['field']} = {case['value']!r} did: {seen}")
print(read, built)
"""
EVIL = (
    "evil_org/evil_repo",
    "evil_module",
    "evil_module.Evil",
    "evil_org/evil_repo--evil_module.Evil",
    "./evil_module.py",
    "../evil_path/../../etc/passwd",
    "https://evil.example/evil_repo",
    "{evil_module}",
)
# Beyond the fields: names that transformers itself looks for in a config.json.
FIELDS_OF_TRANSFORMERS = (
    "_name_or_path", "_attn_implementation", "attn_implementation", "_attn_implementation_internal", "auto_map",
    "architectures", "quantization_config", "tokenizer_class", "custom_pipelines", "custom_generate", "base_model",
    "dtype", "torch_dtype", "experts_implementation", "use_kernels", "kernel_config", "adapter", "generation_config",
)  # fmt: skip


def evil_configs():
    for model_type, row in ARCHITECTURES.items():
        auto_class = "AutoModelForCausalLM"
        plain = config_for(model_type, auto_class).to_dict() | {"model_type": model_type}
        fields = [field.name for field in dataclasses.fields(row.config_class())]
        for name in dict.fromkeys([*fields, *FIELDS_OF_TRANSFORMERS]):
            if name in ("model_type", "transformers_version"):
                continue
            values = list(EVIL)
            if name == "auto_map":
                values += [{"AutoConfig": EVIL[3], auto_class: EVIL[3]}, {"AutoConfig": EVIL[2], auto_class: EVIL[2]}]
            elif name in ("architectures", "layer_types"):
                values += [[value] for value in EVIL]
            elif isinstance(plain.get(name), dict) or name.endswith(("_config", "pipelines")):
                values += [{"quant_method": value, "impl": value, "type": value} for value in EVIL[:3]]
            for value in values:
                yield {
                    "auto_class": auto_class,
                    "field": f"{model_type}.{name}",
                    "value": value,
                    "values": plain | {name: value},
                }


def run_fuzz(cases, folder, environment):
    (folder / "evil_module.py").write_text(
        "from pathlib import Path\nPath('evil_was_here').touch()\nclass Evil: pass\n"
    )
    (folder / "cases").write_text("\n".join(map(json.dumps, cases)))
    program = FUZZ.replace("for line in sys.stdin:", "for line in open(home / 'cases').read().splitlines():")
    printed = run_python_with_torch("-c", program, folder, environment=environment | {"PYTHONPATH": str(ROOT)})
    assert not (folder / "evil_was_here").exists()
    return map(int, printed.split())


@pytest.mark.slow
def test_no_value_of_a_configuration_makes_code_or_a_repository_load(tmp_path):
    """The package is installed, nobody said trust_remote_code: every field with names of modules, files and repos."""
    cases = list(evil_configs())
    assert len(cases) > 1500
    with running_hub() as hub:
        read, built = run_fuzz(cases, tmp_path, hub.environment(tmp_path / "home"))
        assert hub.requests == []
    assert 0 < built <= read < len(cases)  # some fields hold any text, most refuse it


@pytest.mark.slow
def test_a_callers_false_wins(tmp_path):
    PerformerForCausalLM(config_for("performer", "AutoModelForCausalLM")).save_pretrained(tmp_path / "saved")
    loads = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
for auto_class in (AutoConfig, AutoModelForCausalLM):
    try:
        auto_class.from_pretrained(sys.argv[1], trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code" in str(error) or "does not recognize" in str(error), error
    else:
        raise SystemExit(f"{auto_class.__name__} loaded it")
assert not [name for name in sys.modules if "performer" in name and name.startswith("transformers_modules")]
"""
    subprocess_without_package(loads, tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.py"):
        path.write_text("raise SystemExit('code of the checkpoint was executed')")
    run_warm_python(
        "-c",
        "import sys, hf_efficient\nfrom transformers import AutoModelForCausalLM\n"
        "for trust in (False, None):\n"
        "    AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trust)",
        tmp_path / "saved",
    )


# --- weights and checkpoints


class Bomb:
    def __reduce__(self):
        return (open, ("exploded", "w"))


def test_weights_are_safetensors_or_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = PerformerForCausalLM(config_for("performer", "AutoModelForCausalLM"))
    model.save_pretrained(tmp_path / "saved")
    assert [path.name for path in (tmp_path / "saved").iterdir() if path.suffix in (".bin", ".pt", ".pth")] == []
    (tmp_path / "saved/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "saved/pytorch_model.bin")
    with pytest.raises(OSError, match=r"no file named .*model\.safetensors"):
        PerformerForCausalLM.from_pretrained(tmp_path / "saved")
    # Whoever asks for it by name gets the tensors, and nothing that executes.
    again = PerformerForCausalLM.from_pretrained(tmp_path / "saved", use_safetensors=False)
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)
    torch.save(model.state_dict() | {"bomb": Bomb()}, tmp_path / "saved/pytorch_model.bin")
    with pytest.raises((pickle.UnpicklingError, RuntimeError, OSError, ValueError)):
        PerformerForCausalLM.from_pretrained(tmp_path / "saved", use_safetensors=False)
    assert not (tmp_path / "exploded").exists()


RESUME = """
import pickle, sys, torch, transformers, hf_efficient
from pathlib import Path
config = hf_efficient.PerformerConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
rows = [{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i} for i in range(8)]
def trainer(steps):
    arguments = transformers.TrainingArguments(
        sys.argv[1], max_steps=steps, save_steps=1, report_to=[], use_cpu=True, disable_tqdm=True
    )
    return transformers.Trainer(hf_efficient.PerformerForCausalLM(config), arguments, train_dataset=rows)
trainer(1).train()
checkpoint = Path(sys.argv[1]) / "checkpoint-1"
class Bomb:
    def __reduce__(self):
        return (open, (str(Path(sys.argv[1]) / "exploded"), "w"))
pickled = sorted(path.name for path in checkpoint.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
print("\\npickled:", *pickled)
torch.save(Bomb(), checkpoint / "training_args.bin")  # is not read
resuming = trainer(2)
found = []
watching = [True]
sys.addaudithook(lambda event, arguments: found.append(arguments) if event == "pickle.find_class" and watching else 0)
resuming.train(resume_from_checkpoint=str(checkpoint))
assert resuming.state.global_step == 2 and not found, found
watching.clear()
for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
    kept = (checkpoint / name).read_bytes()
    torch.save(Bomb(), checkpoint / name)
    try:
        trainer(2).train(resume_from_checkpoint=str(checkpoint))
    except Exception as error:
        assert "weights_only" in str(error) or "Weights only" in str(error), (name, error)
    else:
        raise SystemExit(f"{name} was not refused")
    (checkpoint / name).write_bytes(kept)
assert not (Path(sys.argv[1]) / "exploded").exists()
"""


@pytest.mark.slow
def test_resuming_reads_no_pickle_but_tensors(tmp_path):
    printed = run_warm_python("-c", RESUME, tmp_path / "run", environment={"PYTHONPATH": str(ROOT)})
    (pickled,) = [line.split()[1:] for line in printed.splitlines() if line.startswith("pickled:")]
    assert pickled == ["optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"]
