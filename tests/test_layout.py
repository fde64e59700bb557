"""What keeps the house in order: imports point one way, light commands stay light, every recipe loads."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import tkit
from tkit.cli.main import COMMANDS
from tkit.files import from_mapping, read_yaml
from tkit.specs.recipe import Recipe

PACKAGE = Path(tkit.__file__).parent
LAYERS = [  # a package imports from the layers after its own, never from its own layer's other packages
    {"cli"},
    {"stages"},
    {"backends"},
    {"runtime"},
    {
        "architectures",
        "checkpoints",
        "quantize",
        "planner",
        "triton",
        "gateway",
        "loadgen",
        "report",
        "cluster",
        "demo",
    },
    {"specs"},
    {"files", "units", "cores"},
    {"errors"},
]
NO_TORCH = [
    "architectures",
    "specs",
    "planner",
    "loadgen",
    "report",
    "cli",
    "errors",
    "units",
    "files",
    "cores",
    "checkpoints",
]


def layer_of(package: str) -> int:
    return next(index for index, packages in enumerate(LAYERS) if package in packages)


def imports(path: Path) -> set[str]:
    """Every module that a file imports anywhere, as written."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
            if node.module == "tkit":
                names.update(f"tkit.{alias.name}" for alias in node.names)
    return names


def files_of(package: str) -> list[Path]:
    return sorted((PACKAGE / package).rglob("*.py")) or [PACKAGE / f"{package}.py"]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if package in ("__init__", "__main__"):
        return
    for name in imports(path):
        target = name.split(".")[1] if name.startswith("tkit.") else None
        if target in (None, package, "__version__"):
            continue
        assert layer_of(target) > layer_of(package), f"{path}: {package} must not import {target}"


@pytest.mark.parametrize(
    "package", [name for name in NO_TORCH if (PACKAGE / name).exists() or (PACKAGE / f"{name}.py").exists()]
)
def test_packages_of_the_base_install_import_no_torch(package):
    for path in files_of(package):
        heavy = {name.split(".")[0] for name in imports(path)} & {"torch", "transformers"}
        assert not heavy, f"{path} imports {heavy}"


def loaded_modules(*arguments: str) -> set[str]:
    code = (
        f"import sys; sys.argv = ['tkit', *{arguments!r}]\n"
        "from tkit.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('\\n'.join(sys.modules), file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in result.stderr.split()}


def test_help_loads_nothing_heavy():
    assert not loaded_modules("--help") & {
        "torch",
        "transformers",
        "numpy",
        "pandas",
        "pyarrow",
        "rich",
        "grpc",
        "yaml",
    }


@pytest.mark.parametrize("command", ["sweep", "report", "stop", "serve", "build", "doctor"])
def test_help_of_a_command_loads_no_torch(command):
    assert not loaded_modules(command, "--help") & {"torch", "transformers"}


def test_doctor_needs_no_torch():
    assert not loaded_modules("doctor", "plan") & {"torch", "transformers"}


def test_plain_build_needs_no_torch(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not loaded_modules("build", "--tp", "2") & {"torch", "transformers"}
    assert list((tmp_path / "engines").glob("demo-none-tp2-*/engine.json"))


@pytest.mark.parametrize("path", sorted((PACKAGE.parent / "model_configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    recipe = from_mapping(Recipe, read_yaml(path), str(path))
    assert recipe.description


def test_every_command_has_a_module_and_a_docstring():
    import importlib

    for name, (module, _) in COMMANDS.items():
        command = importlib.import_module(module).command
        assert command.name == name
        assert command.help
