"""Imports point one way, and heavy libraries are loaded only where they are used."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OURS = {"lm", "train", "serve", "bench", "scripts", "tests"}
MAY_IMPORT = {"lm": {"lm"}, "train": {"train", "lm"}, "serve": {"serve", "lm"}}
# What a package may not import at all, and what none may import at the top of a module.
NEVER = {
    "lm": {"fastapi", "uvicorn", "wandb", "datasets", "accelerate"},
    "serve": {"transformers", "wandb", "datasets"},
}
ONLY_WHERE_USED = {"wandb", "wandb_workspaces", "datasets", "transformers", "matplotlib"}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(tree: ast.AST) -> list[tuple[ast.stmt, str]]:
    """Every import statement with the top-level name of what it imports; relative imports are our own."""
    found: list[tuple[ast.stmt, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node, alias.name.split(".")[0]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            found.append((node, node.module.split(".")[0]))
    return found


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_packages_import_one_way(package: str) -> None:
    paths = modules(package)
    assert paths
    for path in paths:
        for node, name in imports(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
            assert name not in OURS or name in MAY_IMPORT[package], where
            assert name not in NEVER.get(package, set()), where


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_heavy_libraries_are_not_imported_at_the_top_of_a_module(package: str) -> None:
    for path in modules(package):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node, name in imports(
            ast.Module(body=[item for item in tree.body if not is_typing(item)], type_ignores=[])
        ):
            if name in ONLY_WHERE_USED:
                assert node.col_offset > 0, f"{path.relative_to(ROOT)}:{node.lineno} imports {name} at the top"


def is_typing(node: ast.stmt) -> bool:
    """`if TYPE_CHECKING:` never runs."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import lm", {"torch", "transformers", "wandb", "datasets", "matplotlib"}),
        (
            "import lm.decoder, lm.pretrained, lm.search, lm.tokenizer",
            {"transformers", "wandb", "datasets", "matplotlib"},
        ),
        ("import train.config", {"transformers", "wandb", "datasets", "matplotlib"}),
        ("import train.tracking, train.plot, train.dashboard", {"torch", "wandb", "matplotlib"}),
    ],
)
def test_what_an_import_loads(statement: str, absent: set[str]) -> None:
    assert not loaded(statement) & absent


def test_the_http_process_never_loads_torch() -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in modules("serve/api")
        if path.name not in ("__init__.py", "__main__.py")
    ]
    assert names
    assert not loaded("import " + ", ".join(names)) & {"torch", "transformers"}


def loaded(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter has after a statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_every_package_says_that_it_is_typed_and_the_versions_agree() -> None:
    import lm

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert lm.__version__ == project["version"]
    for package in MAY_IMPORT:
        assert (ROOT / package / "py.typed").exists()


def test_nothing_loads_pickles() -> None:
    for package in (*MAY_IMPORT, "scripts"):
        for path in modules(package):
            text = path.read_text(encoding="utf-8")
            tree = ast.parse(text)
            assert not {name for _, name in imports(tree)} & {"pickle", "cPickle", "dill", "joblib"}, path
            assert "torch.load(" not in text, path
