"""Runs the Hugging Face tests on both ends of the supported versions: ``make test-matrix``.

Each pair of torch and transformers gets an environment of its own under build/matrix, made once.
One built extension serves all of them (stable ABI). Exit status 1 if any run fails or is cut off.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS = "2.11.0:5.17.0,2.13.0:newest"
OTHERS = ("safetensors", "numpy", "rich", "matplotlib", "pytest", "hypothesis", "accelerate")
TESTS = ("tests/test_hf_*.py", "tests/test_fixed_cache.py", "tests/test_audit.py")


def environment(torch: str, transformers: str) -> Path:
    """Python of the environment of a pair; made if it is not there."""
    folder = ROOT / "build" / "matrix" / f"torch-{torch}-transformers-{transformers}"
    python = folder / "bin" / "python"
    ready = folder / ".ready"
    if ready.is_file():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    newest = "transformers>=5.17,<6"
    wanted = newest if transformers == "newest" else f"transformers=={transformers}"
    # torch first and by name: left to the others' needs it would be the newest there is.
    for packages in ((f"torch=={torch}",), (wanted, f"torch=={torch}", *OTHERS)):
        subprocess.run([str(python), "-m", "pip", "install", "-q", *packages], check=True)
    ready.touch()
    return python


def versions(python: Path) -> str:
    code = "import torch, transformers; print(torch.__version__, '+', transformers.__version__)"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run(python: Path, time_limit: float) -> tuple[str, float]:
    """Last line of pytest and seconds; the line says so if the run was cut off."""
    files = sorted(str(path) for pattern in TESTS for path in ROOT.glob(pattern))
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    begin = time.monotonic()
    surroundings = {**os.environ, "PYTHONPATH": str(ROOT)}
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=surroundings,
            capture_output=True,
            text=True,
            timeout=time_limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"FAILED: cut off after {time_limit:.0f} s", time.monotonic() - begin
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    if done.returncode != 0:
        print(done.stdout[-6000:], done.stderr[-2000:], file=sys.stderr)
        last = f"FAILED: {last}"
    return last, time.monotonic() - begin


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", default=PAIRS, help="TORCH:TRANSFORMERS, comma-separated")
    parser.add_argument("--time-limit", type=float, default=1200.0, help="seconds per pair")
    parser.add_argument("--python", action="append", help="an environment that exists, instead")
    options = parser.parse_args()
    if options.python:
        pythons = [Path(python) for python in options.python]
    else:
        pythons = [environment(*pair.split(":")) for pair in options.pairs.split(",")]
    failed = False
    for python in pythons:
        last, seconds = run(python, options.time_limit)
        failed |= last.startswith("FAILED")
        print(f"{versions(python):32s} {last} ({seconds:.0f} s)", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
