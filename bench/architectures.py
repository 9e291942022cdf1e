"""Five architectures on the same data, vocabulary, target tokens and about as many parameters; BLEU against length.

    HEED_MULTI30K=DIR make bench-architectures

German to English. Training text: each Multi30k pair once alone and once inside a concatenation of two to four, so that
models see sentences of up to some 50 words, as RNNsearch-50 did. One run gives the table (test_2016_flickr as it is)
and the picture after figure 2 of arXiv 1409.0473: BLEU against the length of concatenated test sentences.
A run that exists is continued or, if it is finished, used as it is: remove its folder where its recipe has changed.
Speeds are measured afterwards, in turns. `--positions` makes another table, of the Transformer's positions alone.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from bench.multi30k import RECIPES, Case, bleu, data, judged_loss, lines, read_metrics, train, translate
from bench.record import RESULTS, ROOT, WORK, save_table, timed, train_command

SOURCE, TARGET = "de", "en"
JOINED = 4  # sentences in the longest training text
LONGEST = 6  # sentences in the longest test text
TOKENS = 3000 * 4096  # that each is trained on, padding included: about 12 passes over the single and the joined texts
BUCKETS = (10, 20, 30, 40, 50, 60)  # source words: a bucket holds up to so many
BEAM, ALPHA = 5, 1.0
PICTURE = ROOT / "docs" / "pictures" / "bleu-length.svg"
CASES = (
    Case("RNNencdec", RECIPES.format("rnnencdec"), SOURCE, TARGET),
    Case("RNNsearch", RECIPES.format("rnnsearch"), SOURCE, TARGET),
    Case("Transformer", RECIPES.format("transformer"), SOURCE, TARGET),
    Case("causal LM", RECIPES.format("lm"), SOURCE, TARGET),
    Case("prefix LM", RECIPES.format("prefix-lm"), SOURCE, TARGET),
)
POSITIONS = (
    Case("Transformer, learned positions", RECIPES.format("transformer"), SOURCE, TARGET, overrides=("learned",)),
    Case("Transformer, no positions", RECIPES.format("transformer"), SOURCE, TARGET, overrides=("none",)),
)
COLUMNS = (
    *("model", "parameters", "BLEU greedy", f"BLEU beam {BEAM}", "validation NLL", "training tokens/s"),
    *("decoding tokens/s", "memory GiB"),
)


def concatenated(folder: Path) -> dict[str, Path]:
    """The training and validation text, byte for byte the same each time: a run that goes on knows its text by it."""
    names = {f"data.{key}": folder / f"{key}.gz" for key in ("source", "target")}
    held = {f"data.validation_{key}": folder / f"validation_{key}.gz" for key in ("source", "target")}
    for split, (source, target) in (("train", names.values()), ("val", held.values())):
        pairs = list(zip(lines(split, SOURCE), lines(split, TARGET), strict=True))
        drawn = random.Random(0)
        order = drawn.sample(pairs, len(pairs))
        joined = []
        while order:
            count = drawn.randint(2, JOINED)
            group, order = order[:count], order[count:]
            joined.append(tuple(" ".join(side) for side in zip(*group, strict=True)))
        folder.mkdir(parents=True, exist_ok=True)
        for file, side in ((source, 0), (target, 1)):
            text = "".join(f"{pair[side]}\n" for pair in [*pairs, *joined])
            file.write_bytes(gzip.compress(text.encode(), mtime=0))
    return names | held


def by_length() -> dict[int, tuple[list[str], list[str]]]:
    """Test sentences alone and concatenated, {bucket: (sources, references)} by the words of the source."""
    pairs = list(zip(lines("test_2016_flickr", SOURCE), lines("test_2016_flickr", TARGET), strict=True))
    buckets: dict[int, tuple[list[str], list[str]]] = {bucket: ([], []) for bucket in BUCKETS}
    for count in range(1, LONGEST + 1):
        for first in range(0, len(pairs) - count + 1, count):
            source, target = (" ".join(side) for side in zip(*pairs[first : first + count], strict=True))
            words = len(source.split())
            bucket = next((bucket for bucket in BUCKETS if words <= bucket), None)
            if bucket is not None and len(buckets[bucket][0]) < 300:
                buckets[bucket][0].append(source)
                buckets[bucket][1].append(target)
    return buckets


def run_of(case: Case, files: dict[str, Path]) -> tuple[Path, Case]:
    """Where a case is trained, and the case with this benchmark's data."""
    from train.config import load

    positions = [f"model.positions={kind}" for kind in case.overrides]
    run_dir = WORK / "architectures" / "-".join([case.name, *case.overrides])
    size = load(case.recipe, ["data.source=none", "data.target=none"]).train.batch_tokens or TOKENS
    overrides = (*(f"{key}={value}" for key, value in files.items()), *positions, f"train.steps={TOKENS // size}")
    return run_dir, Case(case.model, case.recipe, case.source, case.target, overrides=overrides)


def is_trained(case: Case, files: dict[str, Path]) -> bool:
    """Whether its run has ended: the mean of its last checkpoints is written last."""
    return (run_of(case, files)[0] / "model-last").is_dir()


def judge(case: Case, files: dict[str, Path]) -> dict[str, Any]:
    """Trains a case that is not trained yet, and what the table says of it but speeds."""
    from lm.pretrained import read_config

    done = is_trained(case, files)
    run_dir, case = run_of(case, files)
    metrics = read_metrics(run_dir) if done else train(case, 1, run_dir)
    source, target = lines("test_2016_flickr", SOURCE), lines("test_2016_flickr", TARGET)
    found = {
        "model": case.model,
        "parameters": read_config(run_dir / "model").parameters()["total"],
        "BLEU greedy": bleu(translate(run_dir / "model", source, 1, 0.0), target),
        f"BLEU beam {BEAM}": bleu(translate(run_dir / "model", source, BEAM, ALPHA), target),
        "validation NLL": judged_loss(metrics),
        "memory GiB": max(row["memory_gib"] for row in metrics if "memory_gib" in row),
        "target tokens": max(row["tokens"] for row in metrics),
    }
    print(found, flush=True)
    return found


def training_speed(case: Case, files: dict[str, Path], steps: int) -> float:
    """Target tokens a second of a fresh run of so many updates, without its first ones."""
    run_dir = WORK / "architectures" / "speed"
    timed(["rm", "-rf", str(run_dir)])
    _, case = run_of(case, files)
    quiet = [f"train.steps={steps}", "schedule.warmup=0", "log.every=5", "eval.every=null", "log.wandb=null"]
    timed(train_command(case.recipe, f"run.dir={run_dir}", *case.overrides, *quiet))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return statistics.median(row["tokens_per_second"] for row in rows[1:] if "tokens_per_second" in row)


def decoding_speed(folder: Path, sources: list[str]) -> float:
    """Target tokens a second, greedy, sentences sorted by length, loading left out."""
    from lm.translate import Translator, translate

    translator = Translator.load(folder)
    began = time.perf_counter()
    found = translate(translator.model, translator.tokenizer, sources, beam=1, length_penalty=0.0)
    seconds = time.perf_counter() - began
    return sum(len(translation.hypotheses[0].ids) for translation in found if translation.hypotheses) / seconds


def draw(curves: dict[str, list[float]]) -> None:
    """BLEU against length, after figure 2 of the paper."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.2))
    for name, values in curves.items():
        axes.plot(BUCKETS, values, marker="o", label=name)
    axes.set_xlabel(f"source words (up to; trained on 1 to {JOINED} sentences at a time)")
    axes.set_ylabel("BLEU, tokenised lower-cased")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, bbox_inches="tight", metadata={"Date": None})


def compare_positions(files: dict[str, Path]) -> None:
    """Trains the Transformers that tell positions otherwise, and writes their table. The sinusoids' row is that of the
    table of architectures, or of a run that is here."""
    sinusoids = next(case for case in CASES if case.model == "Transformer")
    if is_trained(sinusoids, files):
        rows, origin = [judge(sinusoids, files)], ""
    else:
        table = json.loads((RESULTS / "architectures.json").read_text(encoding="utf-8"))
        rows = [row for row in table["rows"] if row["model"] == sinusoids.model]
        origin = f" The row of sinusoids is from the table above ({table['machine']})."
    rows += [judge(case, files) for case in POSITIONS]
    for row, kind in zip(rows, ("sinusoidal", "learned", "none"), strict=True):
        row["positions"] = kind
    columns = ("positions", *COLUMNS[1:5])
    shown = [{column: row[column] for column in columns} for row in rows]
    note = f"The Transformer, data and target tokens as in the table above, one seed.{origin}"
    save_table("positions", "Positions", "python -m bench.architectures --positions", columns, shown, note=note)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each speed (default 5)")
    parser.add_argument("--only", help="train the one model of this name, such as RNNsearch; writes no result")
    parser.add_argument("--positions", action="store_true", help="the table of the Transformer's positions alone")
    parser.add_argument("--trained", action="store_true", help="train nothing: the table of the trained ones")
    options = parser.parse_args()
    data()
    files = concatenated(WORK / "architectures" / "text")
    cases = list(CASES)
    if options.only:
        for case in [*CASES, *POSITIONS]:
            if case.model == options.only:
                judge(case, files)
        return
    if options.positions:
        compare_positions(files)
        return
    if options.trained:
        cases = [case for case in CASES if is_trained(case, files)]
    rows = {case.model: judge(case, files) for case in cases}
    buckets = by_length()
    curves = {
        case.model: [
            bleu(translate(run_of(case, files)[0] / "model", sources, BEAM, ALPHA), references)
            for sources, references in buckets.values()
        ]
        for case in cases
    }
    sources = lines("test_2016_flickr", SOURCE)[:200]
    speeds: dict[str, dict[str, list[float]]] = {case.model: {"training": [], "decoding": []} for case in cases}
    for _ in range(options.rounds):
        for case in cases:
            speeds[case.model]["training"].append(training_speed(case, files, 40))
            speeds[case.model]["decoding"].append(decoding_speed(run_of(case, files)[0] / "model", sources))
    for name, row in rows.items():
        row["training tokens/s"] = speeds[name]["training"]
        row["decoding tokens/s"] = speeds[name]["decoding"]
    tokens = [row["target tokens"] for row in rows.values()]
    note = (
        f"German to English, texts of 1 to {JOINED} Multi30k sentences, {min(tokens):,} to {max(tokens):,} "
        f"target tokens for each; "
        f"test_2016_flickr, beam {BEAM}, alpha {ALPHA}; {torch.get_num_threads()} threads."
    )
    command = "python -m bench.architectures --trained" if options.trained else "make bench-architectures"
    save_table("architectures", "Five architectures", command, COLUMNS, list(rows.values()), note=note)
    lengths = [
        {"source words, up to": str(bucket), "sentences": len(buckets[bucket][0])}
        | {name: values[place] for name, values in curves.items()}
        for place, bucket in enumerate(BUCKETS)
    ]
    columns = ["source words, up to", "sentences", *curves]
    save_table("bleu-length", "BLEU against sentence length", command, columns, lengths, note=None)
    draw(curves)


if __name__ == "__main__":
    main()
