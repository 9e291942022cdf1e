"""The whole way in one command: text, tokenizer, training, server, and a completion that streams in.

`make demo` calls it. Everything it does it does with the commands a person would type, and it prints them.
"""

from __future__ import annotations

import argparse
import http.client
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.fetch import FetchError, fetch  # noqa: E402
from train.config import Recipe, RecipeError, load  # noqa: E402
from train.tracking import sync_command  # noqa: E402

HOST = "127.0.0.1"
LAUNCH = ("accelerate", "launch", "-q", "--config_file", "configs/accelerate/cpu.yaml", "-m", "train")


class DemoError(RuntimeError):
    """One sentence: what went wrong, and where to look."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--once", action="store_true", help="end after the completion instead of serving on")
    parser.add_argument("--text", type=Path, metavar="FILE", help="train on this text instead of Tiny Shakespeare")
    parser.add_argument("--recipe", default="configs/demo.yaml", metavar="YAML", help="default: %(default)s")
    parser.add_argument("--prompt", help="what the model continues (default: the recipe's first eval.prompts)")
    parser.add_argument("--port", type=int, help="the server's port (default: 8000, or a free one if it is taken)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the recipe: train.steps=2000 ...")
    options = parser.parse_intermixed_args(argv)
    text = options.text.resolve() if options.text else None
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _terminated)
    children: list[subprocess.Popen] = []
    try:
        _demo(options, text, children)
        return 0
    except (DemoError, FetchError, RecipeError) as error:
        print(f"\n{error}", file=sys.stderr)
        return 2 if isinstance(error, RecipeError) else 1
    except KeyboardInterrupt:
        print("\nStopping.", flush=True)
        for child in children:
            end(child)
        print("Stopped. The same command goes on where this one ended.")
        return 130
    finally:
        for child in children:
            end(child)


def _demo(options: argparse.Namespace, text: Path | None, children: list[subprocess.Popen]) -> None:
    overrides = list(options.overrides)
    if text is None:
        heading("Text")
        print(f"Tiny Shakespeare, in {shown(fetch('shakespeare'))}")
    else:
        overrides = [f"data.text={text}", f"run.dir=runs/demo-{text.stem}", *overrides]
    recipe = load(options.recipe, overrides)

    heading("Training")
    command = [*LAUNCH, options.recipe, *overrides]
    print(f"$ {shlex.join(command)}\n", flush=True)
    train(command, children)
    folder = Path(recipe.run.dir) / "model"
    if not (folder / "config.json").exists():
        raise DemoError(f"The training ended without a model in {shown(folder)}; what it said is above.")

    heading("Serving")
    port = options.port or free_port()
    command = ["python", "-m", "serve", shown(folder), "--host", HOST, "--port", str(port)]
    log = Path(recipe.run.dir) / "serve.log"
    print(f"$ {shlex.join(command)}", flush=True)
    server = serve(command, log, children)
    wait_until_healthy(server, port, log)

    prompt = options.prompt or first_prompt(recipe, text)
    heading("A completion, as it comes, through the openai client")
    model = stream(port, prompt, recipe.model.context)
    heading("What to try next (after: source .venv/bin/activate)")
    print(hints(port, model, prompt, recipe, options.recipe, overrides, log))
    if not options.once:
        print("\nServing until Ctrl-C.", flush=True)
        serve_on(server, log)


def train(command: Sequence[str], children: list[subprocess.Popen]) -> None:
    """Runs the training in the foreground: its progress bar is the demo's. Raises DemoError if it fails."""
    # The launcher of this very environment, whatever is first on the PATH.
    # OMP_NUM_THREADS only keeps the launcher from guessing it aloud: the trainer sets its threads itself.
    environment = {"OMP_NUM_THREADS": str(os.cpu_count() or 1), **os.environ}
    # A process group of its own, so that Ctrl-C reaches this process alone: the launcher would die of it at once, and
    # leave a trainer that is still writing its checkpoint.
    child = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *command[2:]], env=environment, process_group=0
    )
    children.append(child)
    status = child.wait()
    if status:
        raise DemoError(f"The training ended with exit status {status}; what it said is above.")


def serve(command: Sequence[str], log: Path, children: list[subprocess.Popen]) -> subprocess.Popen:
    """Starts the server as a child; what it says goes to `log`, so that the completion stands alone on the screen."""
    with log.open("ab") as output:
        child = subprocess.Popen([sys.executable, *command[1:]], stdout=output, stderr=subprocess.STDOUT)
    children.append(child)
    return child


def wait_until_healthy(server: subprocess.Popen, port: int, log: Path, seconds: float = 120) -> None:
    """Returns when /health answers 200. Raises DemoError if the server ends first or takes longer than `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise DemoError(f"The server ended with exit status {server.returncode}: {last_line(log)}")
        connection = http.client.HTTPConnection(HOST, port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            pass
        finally:
            connection.close()
        time.sleep(0.1)
    raise DemoError(f"The server was not ready after {seconds:.0f} s; what it said is in {shown(log)}.")


def stream(port: int, prompt: str, context: int) -> str:
    """Prints a completion piece by piece; returns the model's name. Raises DemoError if none comes."""
    import openai

    # trust_env=False: a proxy for the outside world is not asked for a server on this machine.
    client = openai.OpenAI(
        base_url=f"http://{HOST}:{port}/v1", api_key="none", http_client=openai.DefaultHttpxClient(trust_env=False)
    )
    room = max(16, min(200, context - len(prompt.encode()) - 1))
    pieces = 0
    try:
        model = client.models.list().data[0].id
        print(prompt, end="", flush=True)
        answer = client.completions.create(
            model=model, prompt=prompt, max_tokens=room, temperature=0.8, top_p=0.95, seed=1, stream=True
        )
        for chunk in answer:
            if chunk.choices and chunk.choices[0].text:
                pieces += 1
                print(chunk.choices[0].text, end="", flush=True)
    except openai.OpenAIError as error:
        raise DemoError(f"The completion failed: {error}") from error
    print()
    if not pieces:
        raise DemoError("The server answered without any text.")
    return model


def hints(port: int, model: str, prompt: str, recipe: Recipe, path: str, overrides: list[str], log: Path) -> str:
    """What a person could do next, as lines to copy."""
    run = Path(recipe.run.dir)
    body = f'{{"model": "{model}", "prompt": "{prompt.splitlines()[0]}", "max_tokens": 64}}'
    url = f"http://{HOST}:{port}/v1/completions"
    length = f"train.steps={2 * recipe.total_steps}"
    longer = shlex.join([*LAUNCH, path, *overrides, length])
    lines = [
        ("Ask it yourself", f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(body)}"),
        ("Train it further, from where it is", longer),
        ("Serve it again", f"python -m serve {shown(run / 'model')}"),
        ("The model, an ordinary Hugging Face folder", shown(run / "model")),
        ("The loss curve", shown(run / "loss.png")),
        ("Every figure, a row a step", shown(run / "metrics.jsonl")),
        ("What the server says", shown(log)),
    ]
    if list(run.glob("wandb/offline-run-*")):
        lines.append(("The curves in wandb", sync_command(run)))
    return "\n".join(f"  {name}:\n    {line}" for name, line in lines)


def serve_on(server: subprocess.Popen, log: Path) -> None:
    """Waits for Ctrl-C. Raises DemoError if the server ends by itself."""
    try:
        status = server.wait()
    except KeyboardInterrupt:
        print()
        return
    raise DemoError(f"The server ended with exit status {status}: {last_line(log)}")


def end(child: subprocess.Popen, seconds: float = 30) -> None:
    """Ends a child and all that it started: asked first (a trainer writes a checkpoint), killed after `seconds`, or at
    once by a second Ctrl-C."""
    import psutil

    asked: list[psutil.Process] = []
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            # A child with a group of its own is the launcher, which passes no signal on: its trainers are asked too.
            if process.pid == child.pid or os.getpgid(process.pid) == child.pid:
                asked.append(process)
    family = set(asked)
    for process in asked:
        with suppress(psutil.Error):
            family.update(process.children(recursive=True))
            process.terminate()
    try:
        psutil.wait_procs(family, timeout=seconds)
    finally:
        for process in family:
            with suppress(psutil.Error):
                process.kill()


def free_port() -> int:
    """8000, or a free port of the loopback interface if somebody has it."""
    for port in (8000, 0):
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((HOST, port))
            return probe.getsockname()[1]
    raise DemoError("No port of the loopback interface is free.")


def first_prompt(recipe: Recipe, text: Path | None) -> str:
    """The recipe's first sample prompt; for a person's own text, the beginning of its first line."""
    if text is not None:
        with text.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    return line.strip()[:24]
    return recipe.eval.prompts[0] if recipe.eval.prompts else "The"


def last_line(log: Path) -> str:
    """The last thing that the server said, and where the rest is."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    return f"{lines[-1]} (all of it: {shown(log)})"


def heading(title: str) -> None:
    print(f"\n\033[1m{title}\033[0m" if sys.stdout.isatty() else f"\n== {title}", flush=True)


def shown(path: Path) -> str:
    """A path as a person here would type it."""
    path = path.resolve()
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else str(path)


def _terminated(number: int, frame: object) -> None:
    raise SystemExit(128 + number)  # through main's finally: the children end too


if __name__ == "__main__":
    sys.exit(main())
