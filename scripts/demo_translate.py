"""The two older architectures in one command: RNNsearch and the 2017 Transformer learn to reverse sequences of numbers,
translate, show what they attend to, and are served.

`make demo-translate` calls it. The data is drawn on the way, so nothing is fetched. It uses the commands that a person
would type, and prints them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.demo import (  # noqa: E402
    HOST,
    LAUNCH,
    DemoError,
    end,
    free_port,
    heading,
    serve,
    shown,
    train,
    wait_until_healthy,
)
from train.config import RecipeError, load  # noqa: E402

RECIPES = {
    "RNNsearch": "configs/translate-reverse-rnnsearch.yaml",
    "Transformer": "configs/translate-reverse.yaml",
}
TRIALS = 200  # sequences that are reversed to see how many come out right


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--once", action="store_true", help="end after one completion of each instead of serving on")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="changes to both recipes: train.steps=100 ..."
    )
    options = parser.parse_intermixed_args(argv)
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    children: list[subprocess.Popen] = []
    try:
        _demo(options, children)
        return 0
    except (DemoError, RecipeError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    except KeyboardInterrupt:
        print("\nStopping.", flush=True)
        return 130
    finally:
        for child in children:
            end(child)


def _demo(options: argparse.Namespace, children: list[subprocess.Popen]) -> None:
    # Read before anything is trained: a wrong key is one sentence, and said at once.
    folders = {name: Path(load(recipe, options.overrides).run.dir) / "model" for name, recipe in RECIPES.items()}
    for name, recipe in RECIPES.items():
        heading(f"Training {name}")
        command = [*LAUNCH, recipe, *options.overrides]
        print(f"$ {shlex.join(command)}\n", flush=True)
        train(command, children)
        if not (folders[name] / "config.json").exists():
            raise DemoError(f"The training ended without a model in {shown(folders[name])}; what it said is above.")

    drawn = random.Random("demo")
    sequences = [_sequence(drawn, drawn.randint(1, 25)) for _ in range(TRIALS)]
    sentence = _sequence(drawn, 12)
    pictures = {}
    for name, folder in folders.items():
        heading(f"{name} reverses")
        print(f"$ echo {shlex.quote(sentence)} | python -m lm translate {shown(folder)} --beam 1")
        outputs = translate(folder, [sentence, *sequences])
        print(outputs[0])
        right = sum(output == _reversed(text) for text, output in zip(sequences, outputs[1:], strict=True))
        print(f"{right} of {TRIALS} sequences of 1 to 25 numbers come out exactly reversed.")
        pictures[name] = folder.parent / "attention.png"
        draw(folder, sentence, pictures[name])
    heading("Pictures: source across, output down; an output looks back from the end")
    for name, picture in pictures.items():
        print(f"  {name}: {shown(picture)}")

    heading("Serving")
    servers = {}
    for name, folder in folders.items():
        port = free_port()
        command = ["python", "-m", "serve", shown(folder), "--host", HOST, "--port", str(port)]
        print(f"$ {shlex.join(command)}", flush=True)
        log = folder.parent / "serve.log"
        server = serve(command, log, children)
        wait_until_healthy(server, port, log)
        print(f"{name} over HTTP: {complete(port, sentence)}")
        servers[name] = server, port, folder
    heading("What to try next (after: source .venv/bin/activate)")
    for name, (_, port, folder) in servers.items():
        body = json.dumps({"model": shown(folder), "prompt": "1 2 3 4 5", "temperature": 0, "max_tokens": 32})
        url = f"http://{HOST}:{port}/v1/completions"
        print(f"  {name}, over HTTP:\n    curl {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}")
        print(
            f'  Its attention, to click through:\n    python -m lm attend {shown(folder)} "1 2 3" --out attention.html'
        )
    if not options.once:
        print("\nServing until Ctrl-C.", flush=True)
        for server, _, folder in servers.values():
            status = server.wait()
            raise DemoError(f"The server of {shown(folder)} ended with exit status {status}.")


def translate(folder: Path, lines: Sequence[str]) -> list[str]:
    """Translations by `python -m lm translate`."""
    done = subprocess.run(
        [sys.executable, "-m", "lm", "translate", str(folder), "--beam", "1"],
        input="".join(f"{line}\n" for line in lines),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise DemoError(f"The translation ended with exit status {done.returncode}: {done.stderr.strip()}")
    return done.stdout.splitlines()


def draw(folder: Path, sentence: str, picture: Path) -> None:
    """The head whose cross-attention aligns best, large, by `python -m lm attend`, which is printed."""
    from lm import attend
    from lm.alignment import reversal, strongest

    seen = attend.look(attend.parser().parse_args([str(folder), sentence, "--kind", "cross", "--out", str(picture)]))
    words = len(sentence.split())
    scores = {
        (layer, head): strongest(weights[head], reversal(words, weights.shape[1] - 1))[0]
        for layer, weights in seen.maps.cross.items()
        for head in range(weights.shape[0])
    }
    layer, head = max(scores, key=lambda place: scores[place])
    options = ["--kind", "cross", "--layer", str(layer), "--head", str(head), "--out", shown(picture)]
    print(f"$ {shlex.join(['python', '-m', 'lm', 'attend', shown(folder), sentence, *options])}")
    if attend.main([str(folder), sentence, *options]):
        raise DemoError("The picture could not be drawn; why is above.")


def complete(port: int, prompt: str) -> str:
    """The whole completion of a source, through the openai client."""
    import openai

    # trust_env=False: a proxy for the outside world is not asked for a server on this machine.
    client = openai.OpenAI(
        base_url=f"http://{HOST}:{port}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)
    )
    try:
        model = client.models.list().data[0].id
        return client.completions.create(model=model, prompt=prompt, max_tokens=60, temperature=0).choices[0].text
    except openai.OpenAIError as error:
        raise DemoError(f"The completion failed: {error}") from error


def _sequence(drawn: random.Random, length: int) -> str:
    return " ".join(str(drawn.randrange(50)) for _ in range(length))


def _reversed(text: str) -> str:
    return " ".join(reversed(text.split()))


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # through main's finally: the children end too


if __name__ == "__main__":
    sys.exit(main())
