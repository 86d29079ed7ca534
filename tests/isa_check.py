"""Do the object files keep every instruction set where it belongs? ``make isa-check`` runs this.

``python tests/isa_check.py OBJECT...``, the files of ``csrc/cpu``. Three things must hold:

- ``isa_*`` files define no weak function: it could be the copy that the linker keeps for all CPUs;
- functions of ``kvselect::cpu::<isa>::(anonymous)`` use what ``<isa>`` may use and nothing more,
  all other functions nothing beyond baseline x86-64;
- each file holds the instruction that it exists for: a region that was not opened would pass the
  other two.
"""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from pathlib import Path

# Of the text that objdump prints. An instruction belongs to the first family that it matches.
FAMILIES = {
    "amx": re.compile(r"%tmm|^(ldtilecfg|sttilecfg|tilerelease)"),
    "avx512_bf16": re.compile(r"^(vdpbf16ps|vcvtne2?ps2bf16)"),
    "avx512_vnni": re.compile(r"^vpdp"),
    "avx512": re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])|\{1to\d|^k[a-z]+[bwdq]\s"),
    "avx_vnni": re.compile(r"^\{vex\} vpdp"),
    "avx2": re.compile(r"%ymm|^v(?!err|erw|m[cflopr][a-z]+\s*$)"),
    "sse4": re.compile(
        r"^(popcnt|crc32|pshufb|palignr|ph(add|sub)|pabs|pmul(ld|dq|hrsw)|pmaddubsw|psign|"
        r"pblend|blendv?p|round[sp]|ptest|p(extr|insr)[bdq]\s|extractps|insertps|pmov[sz]x|"
        r"p(min|max)(sb|sd|uw|ud)|packusdw|pcmpeqq|pcmpgtq|h(add|sub)p|addsubp|movs[hl]dup|movddup)"
    ),
    "bmi": re.compile(
        # Not tzcnt: baseline code has it, where an older CPU sees a bsf of the same result.
        r"^(andn|bextr|bls[irm]|blsmsk|bzhi|lzcnt|mulx|pdep|pext|rorx|sarx|shlx|shrx)[lq]?\s"
    ),
}
AVX2 = {"sse4", "avx2"}
AVX512 = AVX2 | {"avx512", "avx512_vnni"}
# What functions inside the region may use, and what at least one of them must.
ALLOWED: dict[str, set[str]] = {
    "scalar": set(),
    "avx2": AVX2,
    "avx2_vnni": AVX2 | {"avx_vnni"},
    "avx512": AVX512,
    "avx512_bf16": AVX512 | {"avx512_bf16"},
    "amx": AVX512 | {"avx512_bf16", "amx"},
}
NEEDED = {
    "scalar": r"mul[ps]s",
    "avx2": r"vfmadd.*%ymm",
    "avx2_vnni": r"\{vex\} vpdpbusd .*%ymm",
    "avx512": r"vpdpbusd .*%zmm",
    "avx512_bf16": r"vdpbf16ps .*%zmm",
    "amx": r"tdpbsud .*%tmm",
}


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def family_of(instruction: str) -> str | None:
    return next((name for name, text in FAMILIES.items() if text.search(instruction)), None)


def problems_of(path: Path) -> list[str]:
    """What is wrong with one object file, a line each."""
    stem = path.name.removesuffix(".o").removesuffix(".cpp")
    isa = stem.removeprefix("isa_") if stem.startswith("isa_") else None
    if isa is not None and isa not in ALLOWED:
        return [f"tests/isa_check.py does not know the instruction set {isa}"]
    found = []
    if isa is not None:
        # DW.ref.* are addresses of the exception runtime, not code of ours.
        found = [
            f"weak symbol: {line.split(maxsplit=2)[2]} (put it into an unnamed namespace)"
            for line in run("nm", "-C", "--defined-only", str(path)).splitlines()
            if re.search(r" [WVu] (?!DW\.ref\.)", line)
        ]
    inside = f"kvselect::cpu::{isa}::(anonymous namespace)::"
    function, needed = "", False
    for line in run("objdump", "-d", "-C", "-w", "--no-show-raw-insn", str(path)).splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            function = header[1]
        elif len(parts := line.split("\t")) == 2:
            instruction = parts[1]
            in_region = isa is not None and inside in function
            allowed = ALLOWED[str(isa)] if in_region else set()
            family = family_of(instruction)
            if family is not None and family not in allowed:
                found.append(f"{family} in {function}: {instruction}")
            needed = needed or (in_region and bool(re.search(NEEDED[str(isa)], instruction)))
    if isa is not None and not needed:
        found.append(f"no {NEEDED[isa]} in its region")
    return found


def main(objects: list[str]) -> int:
    if platform.machine() not in ("x86_64", "AMD64"):
        print(f"isa-check: {platform.machine()} has one implementation, nothing checked")
        return 0
    paths = [Path(name) for name in objects]
    checked = {path.name.split(".")[0] for path in paths}
    failed = False
    for path in paths:
        problems = problems_of(path)
        failed = failed or bool(problems)
        for problem in problems[:10]:
            print(f"isa-check: {path.name}: {problem}")
        if len(problems) > 10:
            print(f"isa-check: {path.name}: and {len(problems) - 10} more")
    missing = [isa for isa in ALLOWED if f"isa_{isa}" not in checked]
    if missing:
        print(f"isa-check: no object file of {', '.join(missing)}")
    if failed or missing:
        return 1
    print(f"isa-check: {len(paths)} files keep their instruction sets")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
