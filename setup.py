"""Drives CMake, which compiles the extension; everything else is in pyproject.toml.

Environment: KVSELECT_CUDA (auto, on, off, check), KVSELECT_CUDA_ARCHS (for example "90a-real"),
KVSELECT_TORCH_DIR, KVSELECT_WERROR, KVSELECT_BUILD_TYPE, CMAKE_ARGS, MAX_JOBS.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
OLDEST_TORCH = (2, 11)

# pip does not look at [build-system] under --no-build-isolation, and older ones stumble over
# pyproject.toml with a page of text that does not say so.
if int(setuptools.__version__.split(".")[0]) < 77:
    raise SystemExit(
        f"setuptools: got {setuptools.__version__}, allowed: >= 77 (pip install -U setuptools)"
    )


def torch_dir() -> Path:
    """Folder of the torch that we build for, found by path: isolated builds cannot import it."""
    candidates = [Path(sysconfig.get_path(key)) / "torch" for key in ("platlib", "purelib")]
    if os.environ.get("KVSELECT_TORCH_DIR"):
        candidates = [Path(os.environ["KVSELECT_TORCH_DIR"])]
    elif (spec := importlib.util.find_spec("torch")) and spec.submodule_search_locations:
        candidates.append(Path(spec.submodule_search_locations[0]))
    for folder in candidates:
        if (folder / "version.py").is_file() and torch_version(folder)[0] >= OLDEST_TORCH:
            return folder
    found = [f"{torch_version(c)[1]} in {c}" for c in candidates if (c / "version.py").is_file()]
    raise SystemExit(
        f"torch: got {', '.join(found) or 'none'}, allowed: torch >= 2.11 in this environment. "
        "Install it first (pip install torch==2.13.0), then: pip install --no-build-isolation ."
    )


def torch_version(folder: Path) -> tuple[tuple[int, ...], str]:
    text = re.search(r"__version__ *= *['\"]([^'\"]+)", (folder / "version.py").read_text())
    assert text is not None, "torch/version.py holds __version__"
    return tuple(int(part) for part in text[1].split(".")[:2]), text[1]


def tool(name: str) -> str | None:
    """A build tool, the one beside this Python before the system's (which may be older)."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


class CMakeBuild(build_ext):
    """Compile with CMake; one run makes every module of the package."""

    def build_extension(self, ext: Extension) -> None:
        torch = torch_dir()
        cmake, ninja = tool("cmake"), tool("ninja")
        if cmake is None:
            raise SystemExit("cmake: got none, allowed: cmake >= 3.24 (pip install cmake ninja)")
        output_dir = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        generator = "Ninja" if ninja else "Unix Makefiles"
        name = f"cmake-{sysconfig.get_platform()}-torch{torch_version(torch)[1]}-{generator[:5]}"
        build_dir = ROOT / "build" / name.strip().lower()
        settings = {
            "CMAKE_BUILD_TYPE": os.environ.get("KVSELECT_BUILD_TYPE", "Release"),
            "CMAKE_MAKE_PROGRAM": ninja,
            "CMAKE_CUDA_ARCHITECTURES": os.environ.get("KVSELECT_CUDA_ARCHS"),
            "KVSELECT_CUDA": os.environ.get("KVSELECT_CUDA", "auto"),
            "KVSELECT_OUTPUT_DIR": output_dir,
            "KVSELECT_TORCH_DIR": torch,
            "KVSELECT_WERROR": os.environ.get("KVSELECT_WERROR", "OFF"),
        }
        configure = [cmake, "-S", str(ROOT), "-B", str(build_dir)]
        configure += ["-G", generator]
        configure += [f"-D{key}={value}" for key, value in settings.items() if value is not None]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run([cmake, "--build", str(build_dir), "--parallel", jobs], check=True)

    def copy_extensions_to_source(self) -> None:
        """Editable and in-place builds: setuptools would copy the declared module only."""
        built = {path.name: path for path in (Path(self.build_lib) / "kvselect").glob("*.abi3.so")}
        for old in (ROOT / "kvselect").glob("*.abi3.so"):
            if old.name not in built:
                old.unlink()
        for name, path in built.items():
            # A new file, not new content in the old one: whoever has that loaded keeps it.
            shutil.copy2(path, ROOT / "kvselect" / f".{name}.new")
            os.replace(ROOT / "kvselect" / f".{name}.new", ROOT / "kvselect" / name)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".abi3.so"


def native_sources() -> list[str]:
    """What the source distribution needs besides the Python packages."""
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    return sorted(str(path.relative_to(ROOT)) for path in [ROOT / "CMakeLists.txt", *files])


setup(
    ext_modules=[
        Extension("kvselect._C", sources=[], depends=native_sources(), py_limited_api=True)
    ],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
