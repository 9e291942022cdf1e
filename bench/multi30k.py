"""Multi30k: BLEU on test_2016_flickr of the recipes in configs/, one run or several seeds each.

    HEED_MULTI30K=DIR make bench-multi30k

DIR holds tok/*.lc.norm.tok.{en,de}.gz and raw/*.{en,de}.gz of the Multi30k data set (task 1). Models train on the
tokenised, lower-cased text. The length penalty is chosen on the validation set. BLEU is told twice: on the tokenised
lower-cased reference, which published figures are on, and as sacreBLEU tells it on the raw text, case left out.
A run that exists is continued or, if it is finished, used as it is. The table has a row for each model that has been
trained: with `--only NAME` one is, and the rows of models that are not here stay as they were.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.record import RESULTS, WORK, machine, save_table, timed, train_command

PENALTIES = (0.6, 1.0, 1.4)  # GNMT's alpha
BEAM = 5
COLUMNS = (
    *("model", "pair", "parameters", "BLEU, tokenised lower-cased", "sacreBLEU, raw text", "BLEU greedy", "goal"),
    *("validation NLL", "alpha", "updates", "training minutes", "seeds", "machine"),
)


@dataclass(frozen=True)
class Case:
    """A recipe, the direction it is trained in, what is published for its kind on this set, and overrides, which go
    with a `variant` of the model's name.
    """

    model: str
    recipe: str
    source: str
    target: str
    goal: str = "none"
    overrides: tuple[str, ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        parts = (Path(self.recipe).stem.removeprefix("translate-multi30k-"), self.source, self.target, self.variant)
        return "-".join(part for part in parts if part)

    @property
    def shown(self) -> tuple[str, str]:
        """The model and the pair, as the table has them."""
        return ", ".join(part for part in (self.model, self.variant) if part), f"{self.source}->{self.target}"


RECIPES = "configs/translate-multi30k-{}.yaml"
CASES = (
    Case("Transformer", RECIPES.format("transformer"), "en", "de", "41.0"),
    Case(
        *("Transformer", RECIPES.format("transformer"), "en", "de", "41.0"),
        overrides=("model.norm=pre", "optim.matrix_lr=0.01"),
        variant="pre-norm",
    ),
    Case("Transformer", RECIPES.format("transformer"), "de", "en", "36.5; 40"),
    Case("RNNsearch", RECIPES.format("rnnsearch"), "de", "en", "28.3; 34"),
    Case("RNNencdec", RECIPES.format("rnnencdec"), "de", "en", "below RNNsearch"),
)


def data() -> Path:
    """The folder that HEED_MULTI30K names; ends the program with a sentence where it is not there."""
    folder = Path(os.environ.get("HEED_MULTI30K", ""))
    if not (folder / "tok").is_dir():
        sys.exit(f"HEED_MULTI30K is {str(folder)!r}; it must be a folder with tok/ and raw/ of Multi30k: see --help.")
    return folder.resolve()


def lines(split: str, language: str, form: str = "tok") -> list[str]:
    """One split in one language; form: tok (tokenised, lower-cased) or raw."""
    with gzip.open(path(split, language, form), "rt", encoding="utf-8") as file:
        return file.read().splitlines()


def path(split: str, language: str, form: str = "tok") -> Path:
    return data() / form / f"{split}.{'lc.norm.tok.' if form == 'tok' else ''}{language}.gz"


def train(case: Case, seed: int, run_dir: Path) -> list[dict[str, Any]]:
    """Trains the case in `run_dir` (or continues, or finds it finished) and returns the rows of its metrics."""
    files = {
        "data.source": path("train", case.source),
        "data.target": path("train", case.target),
        "data.validation_source": path("val", case.source),
        "data.validation_target": path("val", case.target),
    }
    given = {override.partition("=")[0] for override in case.overrides}
    overrides = [f"{key}={value}" for key, value in files.items() if key not in given]
    timed(
        train_command(
            case.recipe, f"run.dir={run_dir}", f"run.seed={seed}", "log.wandb=null", *overrides, *case.overrides
        )
    )
    return read_metrics(run_dir)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def judged_loss(metrics: list[dict[str, Any]]) -> float:
    """Held-out nats a token of the model that is judged, the average of the last checkpoints: it is evaluated last."""
    return [row["validation_loss"] for row in metrics if row.get("validation_loss") is not None][-1]


def bleu(outputs: list[str], references: list[str], tokenize: str = "none", lowercase: bool = False) -> float:
    """sacreBLEU's corpus BLEU."""
    import sacrebleu

    return sacrebleu.corpus_bleu(outputs, [references], tokenize=tokenize, lowercase=lowercase, force=True).score


def translate(folder: Path, sources: list[str], beam: int, alpha: float) -> list[str]:
    """Translations by a model folder."""
    from lm.translate import Translator, translate

    translator = Translator.load(folder)
    found = translate(translator.model, translator.tokenizer, sources, beam=beam, length_penalty=alpha)
    return [translation.text.strip() for translation in found]


def judge(case: Case, folder: Path) -> dict[str, Any]:
    """BLEU of a trained folder on the test set; the length penalty is the validation set's best."""
    source, target = lines("val", case.source), lines("val", case.target)
    best = max(PENALTIES, key=lambda alpha: bleu(translate(folder, source, BEAM, alpha), target))
    source, target = lines("test_2016_flickr", case.source), lines("test_2016_flickr", case.target)
    outputs = translate(folder, source, BEAM, best)
    raw = lines("test_2016_flickr", case.target, "raw")
    return {
        "alpha": best,
        "BLEU, tokenised lower-cased": bleu(outputs, target),
        "sacreBLEU, raw text": bleu(outputs, raw, tokenize="13a", lowercase=True),
        "BLEU greedy": bleu(translate(folder, source, 1, 0.0), target),
    }


def row(case: Case, seeds: range) -> dict[str, Any]:
    """The table's row: a list of a value for each seed, or one value."""
    from lm.pretrained import read_config

    samples: dict[str, list[float]] = {}
    for seed in seeds:
        run_dir = WORK / "multi30k" / f"{case.name}-{seed}"
        metrics = train(case, seed, run_dir)
        found = judge(case, run_dir / "model")
        found["validation NLL"] = judged_loss(metrics)
        last = [r for r in metrics if "seconds" in r][-1]
        found |= {"updates": last["step"], "training minutes": last["seconds"] / 60}
        for key, value in found.items():
            samples.setdefault(key, []).append(value)
        print(f"{case.name}, seed {seed}: {found}", flush=True)
        parameters = read_config(run_dir / "model").parameters()["total"]
    return {
        **dict(zip(("model", "pair"), case.shown, strict=True)),
        "parameters": parameters,
        "goal": case.goal,
        **samples,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1, help="runs of each model (default 1)")
    parser.add_argument("--only", help="train the one case of this name, such as transformer-en-de")
    parser.add_argument("--seed", type=int, default=1, help="the first of them (default 1)")
    options = parser.parse_args()
    data()
    names = [case.name for case in CASES]
    if options.only not in (None, *names):
        parser.error(f"--only is {options.only!r}; it must be one of {', '.join(names)}")
    seeds = range(options.seed, options.seed + options.seeds)
    table = RESULTS / "multi30k.json"
    recorded = json.loads(table.read_text(encoding="utf-8")) if table.is_file() else {"rows": []}
    kept = {(row["model"], row["pair"]): row for row in recorded["rows"]}
    rows = []
    for case in CASES:
        trained = all((WORK / "multi30k" / f"{case.name}-{seed}" / "model-last").is_dir() for seed in seeds)
        if options.only == case.name or options.only is None or trained:
            rows.append(row(case, seeds) | {"seeds": ", ".join(map(str, seeds)), "machine": machine()})
            print(rows[-1], flush=True)
        elif case.shown in kept:
            rows.append({"seeds": "1", "machine": recorded.get("machine")} | kept[case.shown])
    note = (
        f"Beam {BEAM}, length penalty {list(PENALTIES)} chosen on the validation set. sacreBLEU: "
        "nrefs:1, tok none, on the tokenised text; case:lc, tok:13a, on the raw text. Goals: the best published "
        "figure of its kind on this set and, after the semicolon, what we aimed at. The command is that of the newest "
        "row; `make bench-multi30k` makes all."
    )
    command = f"python -m bench.multi30k {shlex.join(sys.argv[1:])}" if len(sys.argv) > 1 else "make bench-multi30k"
    save_table("multi30k", "Multi30k, test_2016_flickr", command, COLUMNS, rows, note=note)


if __name__ == "__main__":
    main()
