"""The house rules that a machine can check: folders, imports, room signs, sizes, words."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = [ROOT / "operator" / "osft_operator", ROOT / "trainer_image" / "osft_trainer"]
MODULES = sorted(path for package in PACKAGES for path in package.rglob("*.py"))
FORBIDDEN = frozenset(
    (
        *("pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"),
        *("torch.load", "joblib.load", "eval", "exec", "os.system", "os.popen"),
        *("allow_pickle", "shell"),
    )
)
"""Modules, calls and arguments that turn data into code."""

CONTRACT = ("arguments", "config", "parameters", "report")
"""What of the trainer the operator may import."""

LONGEST_FUNCTION_LINES = 80
LONGEST_FILE_LINES = 400


def test_operator_folder_does_not_shadow_the_standard_library() -> None:
    assert not (ROOT / "operator" / "__init__.py").exists()
    code = "import operator, os; assert 'operator.py' in operator.__file__, operator.__file__"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("module", ["osft_operator.cli", "osft_operator.handlers", "osft_trainer"])
def test_import_leaves_torch_out(module: str) -> None:
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'liger_kernel'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def _imports(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_imports_keep_to_their_rooms(path: Path) -> None:
    imports = _imports(path)
    if "osft_operator" in path.parts:
        contract = {f"osft_trainer.{each}" for each in CONTRACT}
        foreign = {name for name in imports if name.startswith("osft_trainer")} - contract
        assert not foreign, f"{path.name} reaches past the contract: {foreign}"
        if any(name.split(".")[0] == "kubernetes" for name in imports):
            # the operator's client, and that of a user who watches
            assert path.name in ("cluster.py", "remote.py")
        if any(name.split(".")[0] == "kopf" for name in imports):
            assert path.name in ("handlers.py", "__main__.py")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_every_room_has_a_sign_and_a_size(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path} opens without a docstring"
    assert len(text.splitlines()) <= LONGEST_FILE_LINES
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LONGEST_FUNCTION_LINES, f"{path.name}:{node.name} has {lines} lines"


def test_import_rules() -> None:
    """The layers of pyproject's import-linter contracts."""
    linter = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([linter, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def _forbidden(tree: ast.AST) -> list[str]:
    """Imports and calls that run or load code from data, with their lines."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        elif isinstance(node, ast.Call):
            names = [ast.unparse(node.func)]
            # A value of False is what says that it is off.
            names += [
                word.arg
                for word in node.keywords
                if word.arg and not (isinstance(word.value, ast.Constant) and not word.value.value)
            ]
        else:
            continue
        found += [f"{node.lineno}: {name}" for name in names if name in FORBIDDEN]
    return found


def test_no_forbidden_mechanism_in_the_product() -> None:
    """No pickle and no shell: what is loaded is data, what is run is a list of arguments."""
    for path in MODULES:
        found = _forbidden(ast.parse(path.read_text(encoding="utf-8")))
        assert not found, f"{path.name}: {found}"


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "torch.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(command, shell=True)",
        "eval(text)",
        "os.system(text)",
    ],
)
def test_forbidden_mechanisms_are_found(code: str) -> None:
    assert _forbidden(ast.parse(code))


def test_prose_and_look_alikes_are_allowed() -> None:
    code = '"""Never: pickle."""\nmodel.eval()  # eval(x)\nnp.load(path, allow_pickle=False)'
    assert not _forbidden(ast.parse(code))
