"""What fixes the answers of an evaluation: code and options of its arms; and how transformers is asked for a model."""

from __future__ import annotations

import ast
import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

import lowbit.conformance.evals
from lowbit.conformance.evals.answers import EvalError, claim_folder
from lowbit.conformance.evals.arms import ReferenceArm
from lowbit.conformance.evals.backend_arm import BackendArm
from lowbit.conformance.evals.faults import FaultyArm
from lowbit.conformance.evals.identity import about, code_digest, identity, same_backend

FOLDER = Path(lowbit.conformance.evals.__file__).parent
DOOR = """
class Backend:
    name = target = "mine"
    def describe(self): return {"device": "none"}
    def supports(self, problem): return None
    def declare(self, problem, tactic): return None
    def run(self, *given): return "k%d"
"""


def door(folder: Path, number: int, name: str = "door.py") -> BackendArm:
    path = folder / name
    path.write_text(DOOR % number, encoding="utf-8")
    return BackendArm(f"python:{path}:Backend")


def settings(arm: object) -> dict[str, object]:
    return {f"backend_{key}": value for key, value in identity(arm).items()}


def test_another_kernel_in_the_same_file_is_another_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    claim_folder(run, settings(door(tmp_path, 1)))
    claim_folder(run, settings(door(tmp_path, 1)))
    with pytest.raises(EvalError, match="holds answers of another run: backend_code was "):
        claim_folder(run, settings(door(tmp_path, 2)))


def test_options_and_the_arms_inside_are_part_of_an_arm(tmp_path: Path) -> None:
    door(tmp_path, 1)
    text = f"python:{tmp_path / 'door.py'}:Backend"
    arms = [
        BackendArm(text), BackendArm(text, tactic="t"), BackendArm(text, per_rows=True), BackendArm(text, quantises=True),
        FaultyArm(BackendArm(text), "alpha", "l"), FaultyArm(BackendArm(text, tactic="t"), "alpha", "l"),
        ReferenceArm(), ReferenceArm("reference", 2, True),
    ]
    found = [json.dumps(identity(arm), sort_keys=True) for arm in arms]
    assert len(set(found)) == len(arms)
    assert identity(arms[0])["describe"] == {"device": "none"}
    assert about(arms[0]) == ({"device": "none"}, "executed")
    assert about(arms[-1]) == ({}, "executed")


def test_a_file_that_only_names_a_backend_is_code_too(tmp_path: Path) -> None:
    path = tmp_path / "alias.py"
    found = set()
    for note in ("# one", "# two"):
        path.write_text(f"from lowbit.kernels.cpu import backend  {note}", encoding="utf-8")
        found.add(str(identity(BackendArm(f"python:{path}:backend"))["code"]))
    assert len(found) == 2


def test_every_file_of_the_package_is_code_of_a_registered_backend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "room_of_kernels"
    package.mkdir()
    (package / "__init__.py").write_text("", encoding="utf-8")
    (package / "door.py").write_text(DOOR % 1, encoding="utf-8")
    (package / "kernel.cu").write_text("a", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    backend = importlib.import_module("room_of_kernels.door").Backend()
    first = code_digest("mine", backend)
    assert code_digest("mine", backend) == first
    (package / "kernel.cu").write_text("b", encoding="utf-8")
    assert code_digest("mine", backend) != first
    wrapper = SimpleNamespace(inner=backend, run=lambda *given: backend.run(*given))
    wrapped = code_digest("", wrapper)
    (package / "kernel.cu").write_text("a", encoding="utf-8")
    assert code_digest("", wrapper) != wrapped
    del sys.modules["room_of_kernels"], sys.modules["room_of_kernels.door"]


def test_a_backend_is_not_its_own_judge(tmp_path: Path) -> None:
    one = door(tmp_path, 1)
    assert same_backend(one, door(tmp_path, 1))
    assert same_backend(one, door(tmp_path, 1, "copy.py"))
    assert not same_backend(one, door(tmp_path, 2, "other.py"))
    (tmp_path / "alias.py").write_text("from lowbit.kernels.cpu import backend", encoding="utf-8")
    cpu = BackendArm("cpu")
    assert same_backend(cpu, BackendArm(f"python:{tmp_path / 'alias.py'}:backend"))
    assert same_backend(cpu, BackendArm("cpu", tactic="t"))
    assert not same_backend(cpu, BackendArm("ascend"))  # of the same package
    names = ("mutant:a", "mutant:a", "mutant:b")
    made, again, other = (SimpleNamespace(name=name, backend=SimpleNamespace(run=lambda name=name: name)) for name in names)
    assert same_backend(made, again)
    assert not same_backend(made, other)


def test_no_code_of_a_model_folder_is_run() -> None:
    calls = [
        (path.name, node.lineno, node) for path in sorted(FOLDER.glob("*.py"))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("from_pretrained", "from_config")
    ]
    assert len(calls) >= 4
    for name, line, node in calls:
        said = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
        assert len(said) == 1, (name, line)
        assert isinstance(said[0], ast.Constant)
        assert said[0].value is False, (name, line)


class Model(SimpleNamespace):
    """As much of a model as is asked for."""

    def to(self, device: str) -> Model:
        """Stays."""
        return self

    def eval(self) -> Model:
        """Stays."""
        return self


def test_the_full_model_decodes_as_the_arms(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(folder: Path, **options: object) -> object:
        raise KeyError("no such file")

    fake = ModuleType("transformers")
    vars(fake).update(
        AutoModelForCausalLM=SimpleNamespace(from_pretrained=lambda *given, **named: Model(config="own", generation_config="x")),
        GenerationConfig=SimpleNamespace(from_model_config=lambda config: f"of {config}"),
        AutoConfig=SimpleNamespace(from_pretrained=broken), AutoTokenizer=SimpleNamespace(from_pretrained=broken),
    )
    monkeypatch.setitem(sys.modules, "transformers", fake)
    name = "lowbit.conformance.evals.models"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(lowbit.conformance.evals, "models", None, raising=False)
    models = importlib.import_module(name)
    del sys.modules[name]
    embedded = FOLDER / "embedded"
    assert models.load_full(embedded, torch.bfloat16, "cpu").model.generation_config == "of own"
    assert models.load_full(embedded, torch.bfloat16, "cpu", "arms").model.generation_config == "of arms"
    with pytest.raises(models.EvalError, match=r"cannot read its configuration \(KeyError: 'no such file'\)"):
        models.config_of(tmp_path)
    with pytest.raises(models.EvalError, match=r"cannot read its tokenizer .*; put tokenizer\.json and"):
        models.tokenizer_of(tmp_path)
