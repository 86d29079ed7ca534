"""The house rules (docs/design.md): who may import whom, what lies where, how things are named."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest

from kvselect import reference

ROOT = Path(__file__).resolve().parent.parent
PACKAGE, CSRC = ROOT / "kvselect", ROOT / "csrc"

# Rooms from the ground up. A module imports its own floor and those below it, never one above.
FLOORS = (
    {"checks", "machine"},
    {"ops"},
    {"crossovers", "lru_slots", "query_blocks", "rope", "sketch", "storage", "tensor_parallel"},
    {"cache", "tiered_rows"},
    {
        "arguments",
        "attention",
        "block_lists",
        "block_scores",
        "block_sparse",
        "block_statistics",
        "dense_kernel",
        "fixed_cache",
        "local_mass",
        "block_masks",
        "engine_block_statistics",
        "engine_cache",
        "evictable_cache",
        "prefix_plan",
        "queries",
        "rolling_pools",
        "score",
        "selection",
        "selection_cache",
        "engine_selection_cache",
        "tiered_cache",
    },
    {"policies"},
    {"decode", "prefill", "prefix_groups", "repeated_attention", "shared_prefix"},
    {"break_even"},
    {"reference", "testing"},
    {"integrations"},
    {"explain"},
    {"eval"},
    {"bench"},
    {"cli", "cli_break_even", "cli_capture", "cli_eval", "cli_explain", "cli_perplexity", "doctor"},
    {"__init__", "__main__"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# The specification and the test inputs serve those who check results; what computes them may not.
FOR_CHECKING_ONLY = {"reference", "testing"}
CHECKERS = {"reference", "testing", "doctor", "cli", "eval", "bench", "__init__"}

PYTHON_FILES = sorted(PACKAGE.rglob("*.py"))
CPP_FILES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".cpp", ".cu", ".cuh"})
OWN_FILES = sorted(
    path
    for folder in ("kvselect", "csrc", "tests", "bench", "docs")
    for path in (ROOT / folder).rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)
OPS = re.findall(
    r'm\.def\(\s*"(\w+)\(Tensor', (CSRC / "bindings" / "ops.cpp").read_text(encoding="utf-8")
)


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def room_of(path: Path) -> str:
    """The top-level module or package of kvselect that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> set[str]:
    """Full names of everything that a file imports, at its top or inside functions."""
    package = ".".join(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = parts[: len(parts) - node.level + 1] if node.level else []
            module = ".".join(base + ([node.module] if node.module else []))
            found.add(module)
            if module == "kvselect":
                found |= {f"kvselect.{alias.name}" for alias in node.names}
    return found


def imported_rooms(path: Path) -> set[str]:
    names = {name.split(".")[1] for name in imported_modules(path) if name.startswith("kvselect.")}
    return names & FLOOR_OF.keys()


def test_every_room_has_a_floor() -> None:
    assert {room_of(path) for path in PYTHON_FILES} <= FLOOR_OF.keys()


def test_imports_go_down() -> None:
    upward = [
        f"{name_of(path)} imports kvselect.{other}"
        for path in PYTHON_FILES
        for other in sorted(imported_rooms(path))
        if FLOOR_OF[other] > FLOOR_OF[room_of(path)]
    ]
    assert not upward


def test_rooms_of_one_floor_make_no_circle() -> None:
    below = {
        room: set().union(*(imported_rooms(p) for p in PYTHON_FILES if room_of(p) == room)) - {room}
        for room in FLOOR_OF
    }
    placed: set[str] = set()
    while len(placed) < len(below):
        ready = {room for room in below.keys() - placed if below[room] <= placed}
        assert ready, f"these import each other: {sorted(below.keys() - placed)}"
        placed |= ready


def test_results_do_not_come_from_the_reference() -> None:
    for path in PYTHON_FILES:
        if room_of(path) not in CHECKERS:
            assert not imported_rooms(path) & FOR_CHECKING_ONLY, name_of(path)


@pytest.mark.parametrize(
    ("framework", "rooms"),
    [
        ("transformers", {"integrations", "eval"}),
        ("vllm", {"integrations"}),
        ("matplotlib", {"eval", "bench", "explain"}),
    ],
)
def test_frameworks_stay_at_the_edge(framework: str, rooms: set[str]) -> None:
    users = {
        room_of(path)
        for path in PYTHON_FILES
        if framework in {name.split(".")[0] for name in imported_modules(path)}
    }
    assert users <= rooms


# Lines of code of a file that registers a policy: those with a token of their own. Imports,
# docstrings and comments aside: a settings table that says what each setting means is long.
POLICY_LINES = 150
POLICY_FILES = [
    path
    for path in sorted((PACKAGE / "policies").glob("*.py"))
    if "@register_policy" in path.read_text(encoding="utf-8")
]


def code_lines(path: Path) -> int:
    """Lines with a token that is no comment, outside of imports and docstrings."""
    text = path.read_text(encoding="utf-8")
    aside: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if isinstance(node, ast.Import | ast.ImportFrom) or is_text:
            aside |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    blank = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - aside)


@pytest.mark.parametrize("path", POLICY_FILES, ids=lambda path: str(path.stem))
def test_a_policy_is_short_and_owns_no_kernel(path: Path) -> None:
    assert code_lines(path) <= POLICY_LINES
    text = path.read_text(encoding="utf-8")
    assert "torch.ops" not in text and "import triton" not in text
    assert "kvselect.ops" not in imported_modules(path)
    assert sum(text.count(mark) for mark in ("@register_policy", "@triton")) == 1


def test_every_policy_is_looked_at() -> None:
    from kvselect.policies import POLICIES

    assert {f"kvselect.policies.{path.stem}" for path in POLICY_FILES} == {
        policy.__module__ for policy in POLICIES.values()
    }


def includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s+([<"][^>"]+[>"])', path.read_text(encoding="utf-8"), re.M)


# Per room of csrc: our own headers that it may include, and foreign ones. Kernels build and test
# without torch: std, the compiler's intrinsics, CUDA's headers.
OWN_HEADERS = {
    "include": ("kvselect/",),
    "cpu": ("kvselect/", "cpu/"),
    "cuda": ("kvselect/", "cuda/"),
    "bindings": ("kvselect/", "cpu/", "cuda/", "bindings/"),
}
FOREIGN_HEADERS = {
    "include": (),
    "cpu": ("immintrin.h", "arm_neon.h", "cpuid.h", "sys/syscall.h", "unistd.h"),
    "cuda": ("cuda", "cub/", "cooperative_groups", "mma.h"),
    "bindings": (
        "torch/csrc/stable/",
        "torch/headeronly/",
        "cuda_runtime",
        "sys/mman.h",
        "unistd.h",
    ),
}


def may_include(room: str, include: str) -> bool:
    name = include[1:-1]
    if include[0] == '"':
        return name.startswith(OWN_HEADERS[room])
    is_standard = "/" not in name and "." not in name
    return is_standard or name.startswith(FOREIGN_HEADERS[room])


def test_includes_stay_in_their_rooms() -> None:
    wrong = [
        f"{name_of(path)} includes {include}"
        for path in CPP_FILES
        for include in includes(path)
        if not may_include(path.relative_to(CSRC).parts[0], include)
    ]
    assert not wrong


def test_what_is_compiled_per_instruction_set_includes_nothing_standard() -> None:
    """Inside a target region a standard template could become everybody's copy (STYLE.md)."""
    per_set = [
        p for p in CPP_FILES if p.name.endswith("-inl.h") or p.name.startswith(("vec_", "tiles_"))
    ]
    assert len(per_set) > 8
    assert not [name_of(p) for p in per_set for include in includes(p) if include[0] == "<"]


@pytest.mark.parametrize("op", OPS)
def test_one_op_has_one_name_in_every_room(op: str) -> None:
    for place in (
        f"csrc/include/kvselect/{op}.h",
        f"csrc/cpu/{op}-inl.h",
        f"csrc/bindings/{op}.cpp",
        f"tests/test_{op}.py",
        f"tests/cpp/test_{op}.cpp",
    ):
        assert (ROOT / place).is_file(), place
    assert callable(getattr(reference, op))
    assert f"Fn {op};" in (CSRC / "cpu/dispatch.h").read_text(encoding="utf-8")


def test_kernel_files_are_named_after_ops() -> None:
    assert len(OPS) >= 6
    cuda = {path.stem for path in (CSRC / "cuda").glob("*.cu")}
    assert cuda <= set(OPS)
    bindings = {path.stem for path in (CSRC / "bindings").glob("*.cpp")}
    assert bindings == set(OPS) | {"ops", "checks", "machine"}


CUDA_OPS = sorted(path.stem for path in (CSRC / "cuda").glob("*.cu"))


@pytest.mark.parametrize("op", CUDA_OPS)
def test_a_cuda_op_is_bound_emulated_and_described(op: str) -> None:
    header = (CSRC / "include" / "kvselect" / f"{op}.h").read_text(encoding="utf-8")
    assert "namespace cuda {" in header and f"void {op}(const " in header
    registered = (CSRC / "bindings" / "cuda" / "ops.cpp").read_text(encoding="utf-8")
    assert f'm.impl("{op}", TORCH_BOX(&cuda::{op}));' in registered
    assert (CSRC / "bindings" / "cuda" / f"{op}.cpp").is_file()
    emulated = (ROOT / "tests" / "cpp" / f"emulated_{op}.cpp").read_text(encoding="utf-8")
    assert f'#include "cuda/{op}.cu"' in emulated
    page = (ROOT / "docs" / "kernels" / f"{op}.md").read_text(encoding="utf-8")
    assert "## CUDA" in page


@pytest.mark.parametrize("header", ["ptx.cuh", "hopper_ptx.cuh"])
def test_instructions_by_name_have_host_twins(header: str) -> None:
    """Assembly lies in two files, and the emulation defines the same functions."""
    twin = ROOT / "tests" / "cpp" / "cuda_emulation" / "cuda" / "device" / header
    names = [
        set(re.findall(r"^(?:__device__ __forceinline__|inline) [\w* ]+?(\w+)\(", text, re.M))
        for text in (
            (CSRC / "cuda" / "device" / header).read_text(encoding="utf-8"),
            twin.read_text(encoding="utf-8"),
        )
    ]
    assert len(names[0]) > 10 and names[0] <= names[1]
    for path in (CSRC / "cuda").rglob("*.cu*"):
        text = path.read_text(encoding="utf-8")
        assert path.name in ("ptx.cuh", "hopper_ptx.cuh") or not re.search(
            r"\basm\b|<<<|__CUDA_ARCH__", text
        ), path


@pytest.mark.parametrize(
    "path", sorted((CSRC / "cuda" / "sm90a").glob("*.cu")), ids=lambda path: str(path.stem)
)
def test_an_op_in_hoppers_instructions_is_emulated_and_has_another_kernel(
    path: Path,
) -> None:
    assert path.stem in CUDA_OPS
    emulated = ROOT / "tests" / "cpp" / f"emulated_{path.stem}_sm90a.cpp"
    assert f'#include "cuda/sm90a/{path.name}"' in emulated.read_text(encoding="utf-8")
    header = (CSRC / "include" / "kvselect" / f"{path.stem}.h").read_text(encoding="utf-8")
    assert f"void {path.stem}_sm90a(const " in header


def test_files_are_named_after_what_they_hold() -> None:
    vague = {"util", "utils", "helper", "helpers", "misc", "common"}
    for path in OWN_FILES:
        parts = [Path(part).stem for part in path.relative_to(ROOT).parts]
        words = {word for part in parts for word in re.split(r"[-_.]", part.lower())}
        assert not words & vague, name_of(path)


def test_nothing_shadows_torch_or_a_module_of_python() -> None:
    assert not [name_of(path) for path in CPP_FILES if "torch" in path.relative_to(CSRC).parts]
    shadows = [
        name_of(path)
        for path in OWN_FILES
        if path.suffix == ".py" and path.stem in sys.stdlib_module_names - {"__main__"}
    ]
    assert not shadows


def test_no_bare_todo() -> None:
    marks = re.compile(rf"\b({'|'.join(('TO' + 'DO', 'FIX' + 'ME', 'X' + 'XX'))})\b")
    code = [path for path in OWN_FILES if path.suffix in {".py", ".h", ".cpp", ".cu", ".cuh"}]
    assert not [name_of(path) for path in code if marks.search(path.read_text(encoding="utf-8"))]
