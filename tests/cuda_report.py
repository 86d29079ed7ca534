"""Registers, spills and shared memory of every CUDA kernel, as ptxas reports them.

A spill fails, but in the kernels that COLD names; so does a product of a warpgroup that ptxas
could not leave under way (its notes C7508 to C7520 say that products "are serialized").

Two uses, both by `make cuda-check`:

    cuda_report.py --compile nvcc ...   run the compiler, keep what ptxas says beside the object
    cuda_report.py FOLDER               read all that was kept under FOLDER, print a table
"""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
SERIALIZED = "are serialized"
SUFFIX = ".ptxas"

# Kernels that may spill, by the start of their readable name, and why that is no loss that counts.
COLD = {
    "kv_append_kernel<float, 4>": "float32 caches: 8 bytes, once a block",
    "kv_append_kernel<float, 8>": "float32 caches: 8 bytes, once a block",
    "attend_few_kernel<float, 64>": "float32 caches: three products for one",
    "attend_few_kernel<float, 128>": "float32 caches: three products for one",
    "attend_few_kernel<float, 256>": "float32 caches: three products for one",
    "attend_few_kernel<BFloat, 256>": "16 x 256 sums a warp; to be split over channels",
    "attend_few_kernel<Half, 256>": "16 x 256 sums a warp; to be split over channels",
    "attend_many_kernel<BFloat, 256>": "16 x 256 sums a warp; to be split over channels",
    "attend_many_kernel<Half, 256>": "16 x 256 sums a warp; to be split over channels",
    "attend_blocks_kernel<BFloat, 256, 1>": "16 x 256 sums a warp; to be split over channels",
    "attend_blocks_kernel<Half, 256, 1>": "16 x 256 sums a warp; to be split over channels",
    "attend_blocks_kernel<float, 64, 1>": "float32: three products for one",
    "attend_blocks_kernel<float, 96, 1>": "float32: three products for one",
    "attend_blocks_kernel<float, 128, 1>": "float32: three products for one",
    "attend_blocks_kernel<float, 256, 1>": "float32: three products for one",
    "block_mass_kernel<float, 64>": "float32: three products for one",
    "block_mass_kernel<float, 96>": "float32: three products for one",
    "block_mass_kernel<float, 128>": "float32: three products for one",
    "block_mass_kernel<float, 256>": "float32: three products for one",
    "logits_kernel<BFloat, 4, 4>": "12 to 20 bytes: reuse and pages in one kernel",
    "logits_kernel<BFloat, 8, 4>": "12 to 20 bytes: reuse and pages in one kernel",
}


@dataclass(frozen=True)
class Usage:
    """What one kernel takes on one architecture. [registers per thread, bytes]"""

    kernel: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    shared_bytes: int


def compile_and_keep(command: list[str]) -> int:
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    said = done.stderr.splitlines(keepends=True)
    kept = [line for line in said if line.startswith(("ptxas info", "    "))]
    sys.stderr.writelines(line for line in said if line not in kept)
    if done.returncode == 0 and "-o" in command:
        Path(command[command.index("-o") + 1] + SUFFIX).write_text("".join(kept))
    return done.returncode


def usages(text: str) -> list[Usage]:
    """All kernels of one ptxas log.

    >>> usages('''ptxas info    : Compiling entry function 'k' for 'sm_80'
    ...     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
    ... ptxas info    : Used 40 registers, used 1 barriers, 256 bytes smem, 400 bytes cmem[0]''')
    [Usage(kernel='k', architecture='sm_80', registers=40, stack_bytes=8, spill_bytes=16, \
shared_bytes=256)]
    """
    found = []
    kernel = architecture = ""
    stack = spills = 0
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernel, architecture = entry.groups()
            stack = spills = 0
        elif spill := SPILLS.search(line):
            stack, spills = int(spill[1]), int(spill[2]) + int(spill[3])
        elif (used := USED.search(line)) and kernel:
            shared = SHARED.search(line)
            size = int(shared[1]) if shared else 0
            found.append(Usage(kernel, architecture, int(used[1]), stack, spills, size))
            kernel = ""
    return found


def readable(names: list[str]) -> list[str]:
    """Demangled, without namespaces and parameters."""
    done = subprocess.run(["c++filt", *names], stdout=subprocess.PIPE, text=True, check=True)
    short = []
    for name in done.stdout.splitlines():
        name = re.sub(r"\(anonymous namespace\)::|kvselect::(cuda::)?|^void ", "", name)
        name = re.sub(r"\((int|long|bool|\w*Format)\)", "", name)
        short.append(re.sub(r"\((?!anonymous).*\)$", "", name))
    return short


def report(folder: Path) -> int:
    found = [u for log in folder.rglob(f"*{SUFFIX}") for u in usages(log.read_text())]
    if not found:
        print(f"{folder}: got no ptxas report, allowed: a folder that make cuda-check built in")
        return 1
    by_kernel: dict[str, list[Usage]] = {}
    for usage in found:
        by_kernel.setdefault(usage.kernel, []).append(usage)
    names = dict(zip(by_kernel, readable(list(by_kernel))))
    architectures = sorted({u.architecture for u in found}, key=lambda a: int(re.sub(r"\D", "", a)))
    print(
        f"registers per thread; static shared memory and spills in bytes; {len(by_kernel)} kernels"
    )
    print(f"{'kernel':<72}" + "".join(f"{a:>8}" for a in architectures) + "  shared  spills")
    for kernel in sorted(by_kernel, key=lambda k: names[k]):
        of = {u.architecture: u for u in by_kernel[kernel]}
        registers = "".join(f"{of[a].registers if a in of else '-':>8}" for a in architectures)
        shared = max(u.shared_bytes for u in of.values())
        spills = max(u.spill_bytes + u.stack_bytes for u in of.values())
        print(f"{names[kernel]:<72}{registers}{shared:>8}{spills:>8}")
    failures = 0
    for u in found:
        if u.spill_bytes or u.stack_bytes:
            why = COLD.get(names[u.kernel])
            failures += why is None
            print(
                f"{'spills' if why else 'SPILLS'} {names[u.kernel]} on {u.architecture}: "
                f"{u.spill_bytes} bytes, stack {u.stack_bytes}{f' (allowed: {why})' if why else ''}"
            )
    for log in sorted(folder.rglob(f"*{SUFFIX}")):
        serialized = [line for line in log.read_text().splitlines() if SERIALIZED in line]
        failures += len(serialized)
        for line in serialized:
            print(f"SERIALIZED {log.name}: {line}")
    return 1 if failures else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compile"]:
        sys.exit(compile_and_keep([word for word in sys.argv[2:] if word]))
    sys.exit(report(Path(sys.argv[1])))
