"""The documentation: its commands exist and parse, its Python runs, its links lead somewhere, its figures are true."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
TARGETS = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
# Commands of other programs that a page may show; what they do is theirs to test.
OTHERS = {
    "cd",
    "vllm",
    "lm_eval",
    "guidellm",
    "source",
    "git",
    "pip",
    "curl",
    "wandb",
    "export",
    "sbatch",
    "srun",
    "torchrun",
    "tensorboard",
    "pre-commit",
    "kubectl",
    "nginx",
    "ray",
}


def fenced(page: Path, language: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """Every shell command of a page as words: continued lines joined, comments and leading assignments dropped."""
    found = []
    for block in fenced(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                words.pop(0)
            if words:
                found.append(words)
    return found


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_exists_and_parses(page: Path) -> None:
    for words in commands(page):
        check(words)


def check(words: list[str]) -> None:
    """Fails unless a documented command is one that exists, with arguments that its program accepts."""
    program, *rest = words
    if program == "make":
        assert {word for word in rest if "=" not in word} <= TARGETS, words
    elif program == "accelerate":
        assert rest[0] == "launch", words
        check_launch(rest[1:])
    elif program in ("python", "heed-train", "heed-lm", "heed-serve"):
        if program != "python":
            rest = ["-m", program.removeprefix("heed-"), *rest]
        check_python(rest)
    elif program.startswith(".venv/bin/"):
        check([program.removeprefix(".venv/bin/"), *rest])
    else:
        assert program in OTHERS, f"{shlex.join(words)}: neither a command of ours nor one in OTHERS"


def check_launch(arguments: list[str]) -> None:
    """`accelerate launch [its flags] -m train ...`: the launcher's own parser takes its flags, ours the rest."""
    from accelerate.commands.launch import launch_command_parser

    parsed = launch_command_parser().parse_args(arguments)
    assert parsed.module, arguments
    if parsed.config_file:
        assert (ROOT / parsed.config_file).exists(), parsed.config_file
    check_python(["-m", parsed.training_script, *parsed.training_script_args])


def check_python(arguments: list[str]) -> None:
    if arguments[0] != "-m":
        assert (ROOT / arguments[0]).exists(), arguments
        return
    module, *rest = arguments[1:]
    if module == "train" and rest and rest[0].endswith(".yaml"):
        from train.config import RecipeError, load

        try:
            load(ROOT / rest[0], [word for word in rest[1:] if not word.startswith("--")])
        except RecipeError as error:  # the model that it continues from is one that another command makes
            (problem,) = error.problems
            assert re.match("model.from is .* is not a folder", problem), problem
        assert {word for word in rest[1:] if word.startswith("--")} <= {"--dry-run"}, rest
    elif module == "train":
        assert (ROOT / "train" / f"{rest[0]}.py").exists(), rest
    elif module == "lm":
        assert (ROOT / "lm" / f"{rest[0]}.py").exists(), rest
    elif module == "serve" and "vllm" in rest:
        from serve.on_vllm.flags import read, translate

        assert translate(read(rest), {}), rest  # tests/on_vllm asks vLLM itself about its flags
    elif module == "serve":
        known = subprocess.run(
            [sys.executable, "-m", "serve", "--help"], cwd=ROOT, capture_output=True, text=True
        ).stdout
        flags = {word.split("=")[0] for word in rest if word.startswith("--")}
        assert flags <= set(re.findall(r"--[a-z][a-z-]*", known)), rest
    else:
        import_module(module)


@pytest.mark.parametrize("page", [page for page in PAGES if page.parent.name == "docs"], ids=lambda page: page.name)
def test_python_examples_run(page: Path, tmp_path: Path) -> None:
    for example in fenced(page, "python"):
        if "127.0.0.1:8000" in example or "runs/" in example:
            compile(example, str(page), "exec")  # it needs a server or a run; test_readme has one
            continue
        command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{example}"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:|#", link):
            assert (page.parent / link.split("#")[0]).exists(), f"{page.name}: {link}"


def test_what_the_article_points_at_is_there() -> None:
    """`file.py::name` or `file.py::Class.name`: the class, function or test is defined in that file."""
    references = re.findall(r"`([\w/]+\.py)::([\w.]+)`", (ROOT / "docs" / "article.md").read_text(encoding="utf-8"))
    assert len(references) > 40
    for file, name in references:
        within: ast.AST = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        for part in name.split("."):
            kinds = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            inside = {node.name: node for node in ast.iter_child_nodes(within) if isinstance(node, kinds)}
            assert part in inside, f"{file}::{name}"
            within = inside[part]


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index, page.name


def test_figures_are_those_of_the_results() -> None:
    done = subprocess.run([sys.executable, "scripts/figures.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_figures_are_made_from_the_raw_samples() -> None:
    figures = import_module("scripts.figures")
    result = {
        "benchmark": "speed",
        "machine": "two cores",
        "command": "make bench-speed",
        "date": "2026-01-01",
        "statistic": "median",
        "sides": {
            "ours": {"samples": [3000.0, 5000.0], "unit": "tokens/s"},
            "theirs": {"samples": [2000], "unit": "tokens/s"},
        },
        "ratio": 2.0,
    }
    page = "a\n<!-- figures: summary -->\nold\n<!-- /figures -->\nb\n<!-- figures: full -->\n<!-- /figures -->\n"
    made = figures.rewrite(page, [result])
    assert "old" not in made
    assert "ours 4,000 tokens/s; theirs 2,000 tokens/s | 2.00 | two cores" in made
    assert "3,000, 5,000" in made
    assert "make bench-speed" in made
    assert figures.rewrite(made, [result]) == made
    assert figures.rewrite(made, []).count(figures.NONE) == 2


def test_a_table_is_made_from_its_rows() -> None:
    figures = import_module("scripts.figures")
    result = {
        "name": "models",
        "machine": "a machine",
        "date": "2026-01-01",
        "command": "make bench-models",
        "columns": ["model", "BLEU", "loss"],
        "rows": [{"model": "one", "BLEU": [40.0, 42.0], "loss": 1.25}, {"model": "two", "BLEU": [30.5]}],
    }
    page = "<!-- figures: table models -->\n<!-- /figures -->\n<!-- figures: table other -->\n<!-- /figures -->\n"
    made = figures.rewrite(page, [result])
    assert "| one | 41 (40, 42) | 1.25 |\n| two | 30.5 | n/a |\n" in made
    assert made.count(figures.NONE) == 1
    assert figures.rewrite(made, [result]) == made


def test_every_reference_into_the_source_leads_to_a_definition() -> None:
    """`path/file.py::Class.method` and `path/test_file.py::test_name`, as pytest writes them."""
    found = 0
    for page in PAGES:
        for path, name in re.findall(r"`([\w/]+\.py)::([\w.]+)`", page.read_text(encoding="utf-8")):
            body = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
            for part in name.split("."):
                inner = [node for node in body if getattr(node, "name", None) == part]
                assert inner, f"{page.name}: {path} has no {name}"
                body = getattr(inner[0], "body", [])
            found += 1
    assert found >= 40


def requirement_names(lines: list[str]) -> list[str]:
    return [re.split(r"[<>=!;\[ ]", line)[0] for line in lines]


def test_every_dependency_has_its_reason_and_is_installed_within_its_range() -> None:
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    page = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    always, extras = page.split("## Extras")
    assert re.findall(r"^\| ([A-Za-z][\w-]*) \| (?!what)", always, re.MULTILINE) == requirement_names(
        project["dependencies"]
    )
    wanted = [
        (extra, name) for extra, lines in project["optional-dependencies"].items() for name in requirement_names(lines)
    ]
    assert re.findall(r"^\| (\w+) \| ([\w-]+) \| (?!what)", extras, re.MULTILINE) == wanted
    for line in project["dependencies"]:
        needed = Requirement(line)
        if needed.marker is None or needed.marker.evaluate():
            assert needed.specifier.contains(version(needed.name)), f"{line}: {version(needed.name)} is installed"


def test_the_ranges_contain_what_vllm_accepts() -> None:
    """vLLM 0.32's own pins, as far as they name what we name: each of our ranges must contain one of these."""
    from packaging.requirements import Requirement

    accepted = {
        "torch": "2.13.0",
        "transformers": "5.19.0",
        "tokenizers": "0.23.3",
        "safetensors": "0.8.0",
        "fastapi": "0.136.3",
        "pydantic": "2.14.3",
        "openai": "2.25.0",
        "prometheus-client": "0.26.0",
        "llguidance": "1.7.6",
    }
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ours = {Requirement(line).name: Requirement(line).specifier for line in project["dependencies"]}
    for name, release in accepted.items():
        assert ours[name].contains(release), name
