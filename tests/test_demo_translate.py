"""`make demo-translate` end to end on recipes of seconds: trainings, translations, pictures, servers, a clean end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import psutil
import yaml

from scripts.demo_translate import RECIPES, TRIALS

ROOT = Path(__file__).resolve().parent.parent
SMALL = {
    "RNNsearch": {"hidden": 8, "embedding": 8, "maxout": 8},
    "Transformer": {"encoder_layers": 1, "decoder_layers": 1, "width": 16, "heads": 2, "mlp_width": 16},
}


def small(name: str, folder: Path) -> Path:
    """The demo's recipe for a model of seconds, in a folder of its own."""
    recipe = yaml.safe_load((ROOT / RECIPES[name]).read_text(encoding="utf-8"))
    recipe["run"] = {"dir": str(folder / name)}
    recipe["data"] |= {"rows": 200, "validation": 0.1, "cache": str(folder / "cache")}
    recipe["model"] |= SMALL[name]
    recipe["schedule"] |= {"warmup": 1}
    recipe["train"] |= {"steps": 3, "batch_tokens": 128}
    recipe["eval"] |= {"every": 3, "bleu": 2}
    recipe["checkpoint"] |= {"every": 3}
    recipe["log"] |= {"every": 1}
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


def test_once_trains_translates_draws_and_serves_both(tmp_path: Path) -> None:
    recipes = {name: str(small(name, tmp_path)) for name in RECIPES}
    program = (
        f"import sys; from scripts import demo_translate as demo; demo.RECIPES = {recipes!r}; sys.exit(demo.main())"
    )
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    done = subprocess.run(
        [sys.executable, "-c", program, "--once"], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in RECIPES:
        assert f"== {name} reverses" in done.stdout
        assert f"{name} over HTTP:" in done.stdout
        assert (tmp_path / name / "attention.png").read_bytes().startswith(b"\x89PNG")
        assert (tmp_path / name / "model" / "model.safetensors").exists()
    assert done.stdout.count(f"of {TRIALS} sequences of 1 to 25 numbers come out exactly reversed.") == len(RECIPES)
    assert "Traceback" not in done.stdout + done.stderr
    assert {child.pid for child in psutil.Process().children(recursive=True)} <= before  # no server is left


def test_a_wrong_key_is_one_sentence_and_exit_status_2() -> None:
    command = [sys.executable, "scripts/demo_translate.py", "--once", "train.stepz=3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "train.stepz" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
