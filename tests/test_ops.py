"""Schemas, fakes and torch.compile; which CPU implementation runs; what build_info says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from op_calls import int32
from torch import Tensor

from kvselect import ops

ROOT = Path(__file__).resolve().parent.parent
HEAD_DIM = 32
SCHEMAS = {
    "kv_append",
    "score_tokens",
    "select_tokens",
    "sparse_attention",
    "gather_tokens",
    "list_blocks",
    "merge_splits",
    "recovered_mass",
    "block_sparse_attention",
    "block_mass",
    "selection_cache_step",
    "rolling_sweep",
}


def cache_tensors(
    *, seqlen: int = 150, paged: bool = False, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Arguments that describe a cache of two rows, 2 KV heads; the second row is shorter."""
    generator = torch.Generator().manual_seed(seqlen)
    shape = (20, 16, 2, HEAD_DIM) if paged else (2, 160, 2, HEAD_DIM)
    table = torch.randperm(20, generator=generator).view(2, 10).to(torch.int32)
    return {
        "k_cache": torch.randn(shape, generator=generator).to(dtype),
        "v_cache": torch.randn(shape, generator=generator).to(dtype),
        "block_table": table if paged else None,
        "cache_seqlens": int32(seqlen, seqlen // 3),
    }


def append_arguments(*, num_new: int = 5, **cache: Any) -> dict[str, Any]:
    tensors = cache_tensors(seqlen=126, **cache)
    generator = torch.Generator().manual_seed(7)
    new = torch.randn(2, 2, num_new, 2, HEAD_DIM, generator=generator)
    return {
        "k": new[0].to(tensors["k_cache"].dtype),
        "v": new[1].to(tensors["k_cache"].dtype),
        "num_valid": int32(num_new, num_new - 1),
        **tensors,
        "sketch": torch.zeros(2, 2, 1, 4 * HEAD_DIM + 64 * HEAD_DIM, dtype=torch.uint8),
        "sketch_format": "int4",
        "num_nonfinite": torch.zeros(2, 2, dtype=torch.int64),
    }


def score_arguments(*, seqlen: int = 150, **cache: Any) -> dict[str, Any]:
    tensors = cache_tensors(seqlen=seqlen, **cache)
    del tensors["v_cache"]
    return {
        "q": torch.randn(2, 1, 1, 4, HEAD_DIM, generator=torch.Generator().manual_seed(3)),
        "q_local": None,
        **tensors,
        "starts": None,
        "sketch": None,
        "sketch_format": "none",
        "q_block_offsets": None,
        "seqlen_q": 1,
        "window_rule": "decode",
        "num_sink_tokens": 4,
        "num_recent_tokens": 8,
        "keep": 16,
        "scale": HEAD_DIM**-0.5,
        "normalise_candidates_only": False,
        "max_vote": False,
        "cos": None,
        "sin": None,
        "rope_start": 0,
        "rope_interleaved": False,
        "hit": None,
        "max_seqlen_k": seqlen,
    }


def select_arguments(*, width: int = 28) -> dict[str, Any]:
    scores = torch.rand(2, 1, 2, 150, generator=torch.Generator().manual_seed(4))
    return {
        "scores": scores,
        "cache_seqlens": int32(150, 50),
        "starts": int32(0, 3),
        "q_block_offsets": None,
        "seqlen_q": 1,
        "window_rule": "decode",
        "num_sink_tokens": 4,
        "num_recent_tokens": 8,
        "keep": 16,
        "pool_width": 1,
        "hit": None,
        "indices": torch.zeros(2, 1, 2, width, dtype=torch.int32),
        "topk_length": torch.zeros(2, 1, 2, dtype=torch.int32),
        "kept_score": torch.zeros(2, 1, 2),
    }


def lists() -> dict[str, Any]:
    indices = torch.arange(0, 40, 4, dtype=torch.int32).expand(2, 1, 2, 10)
    return {
        "indices": indices.contiguous(),
        "topk_length": torch.full((2, 1, 2), 10, dtype=torch.int32),
    }


def attention_arguments(*, seqlen_q: int = 1, **cache: Any) -> dict[str, Any]:
    tensors = cache_tensors(**cache)
    q = torch.randn(2, seqlen_q, 4, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    return {
        "q": q.to(tensors["k_cache"].dtype),
        **tensors,
        "starts": None,
        **lists(),
        "q_block_offsets": None,
        "softmax_scale": HEAD_DIM**-0.5,
        "cos": None,
        "sin": None,
        "rope_start": 0,
        "rope_interleaved": False,
    }


def gather_arguments(**cache: Any) -> dict[str, Any]:
    """Lists without room to spare, of tokens that end with both queries' own."""
    arguments = attention_arguments(**cache) | {"seqlen_q": 2}
    for name in ("q", "softmax_scale"):
        del arguments[name]
    ends = arguments["cache_seqlens"].view(2, 1, 1, 1)
    before = lists()["indices"]
    own = (ends + torch.arange(-2, 0)).expand(2, 1, 2, 2).to(torch.int32)
    return arguments | {
        "indices": torch.cat([before, own], dim=-1),
        "topk_length": torch.full((2, 1, 2), 12, dtype=torch.int32),
    }


def mass_arguments() -> dict[str, Any]:
    arguments = attention_arguments(seqlen_q=2) | {"max_seqlen_k": 150}
    for name in ("v_cache", "cos", "sin", "rope_start", "rope_interleaved"):
        del arguments[name]
    return arguments


def cache_step_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    q = torch.randn(2, 1, 4, HEAD_DIM, generator=torch.Generator().manual_seed(6)).to(dtype)
    return {
        "q": q,
        "cache_seqlens": int32(150, 50),
        "starts": int32(0, 3),
        "num_nonfinite": torch.zeros(2, 2, dtype=torch.int64),
        "similarity": "min",
        "similarity_threshold": 0.9,
        "max_age": 64,
        "dense_limit": 10,
        "anchor_query": q[:, 0].float().clone(),
        "age": int32(0, 1, 64, 3).view(2, 2),
        "expected_seqlens": int32(150, 50),
        "known_nonfinite": torch.zeros(2, 2, dtype=torch.int64),
        "reuse_counts": torch.zeros(2, dtype=torch.int64),
    }


def reusing_arguments() -> dict[str, Any]:
    """Scores of a step whose selection cache decides on the way: all lists miss.

    Scores of one that hits are whatever the memory held.
    """
    cache = cache_step_arguments()
    renamed = {"q": "compared_q", "num_nonfinite": "cache_nonfinite"}
    for name in ("cache_seqlens", "starts"):
        del cache[name]
    reuse = {renamed.get(name, name): value for name, value in cache.items()}
    reuse["age"] = torch.full((2, 2), 64, dtype=torch.int32)
    hit = torch.full((2, 2), 7, dtype=torch.int32)
    plain = {"softcap": 0.0, "sink_logits": None, "ranking": None, "sketch_in_pages": False}
    return score_arguments() | plain | reuse | {"starts": int32(0, 3), "hit": hit}


def sweep_arguments(**cache: Any) -> dict[str, Any]:
    """Row 0 rolls over its two blocks, row 1 is reused."""
    arguments = score_arguments(**cache)
    for name in ("q_block_offsets", "seqlen_q", "window_rule", "max_seqlen_k", "max_vote"):
        del arguments[name]
    num_lists, num_segments = 2, 2
    members = torch.arange(4, 12, dtype=torch.int32)
    return arguments | {
        "q": torch.randn(2, 4, HEAD_DIM, generator=torch.Generator().manual_seed(3)),
        "hit": int32(0, 0, 1, 1).view(2, num_lists),
        "scan_all": torch.zeros(2, num_lists, dtype=torch.int32),
        "pool": members.expand(2, num_lists, num_segments, 8).clone(),
        "pool_length": torch.full((2, num_lists, num_segments), 8, dtype=torch.int32),
        "scanned_to": torch.full((2, num_lists, num_segments), 140, dtype=torch.int32),
        "next_segment": torch.ones(2, num_lists, dtype=torch.int32),
        "indices": torch.full((2, num_lists, 32), -1, dtype=torch.int32),
        "topk_length": torch.zeros(2, num_lists, dtype=torch.int32),
        "kept_score": torch.zeros(2, num_lists),
    }


def block_arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    q = torch.randn(2, 20, 4, HEAD_DIM, dtype=dtype)
    k, v = torch.randn(2, 2, 40, 2, HEAD_DIM, dtype=dtype)
    return {
        "q": q,
        "k": k,
        "v": v,
        "block_mask": torch.rand(2, 4, 2, 3) < 0.5,
        "row_offsets": None,
        "seqlens_q": None,
        "cache_seqlens": torch.tensor([40, 17], dtype=torch.int32),
        "q_block_size": 16,
        "kv_block_size": 16,
        "causal": True,
        "softmax_scale": 0.1,
    }


def block_mass_arguments() -> dict[str, Any]:
    arguments = block_arguments()
    for name in ("v", "block_mask", "row_offsets"):
        del arguments[name]
    return arguments | {"lse": None, "row_stride": 3}


CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "kv_append": ("kv_append", append_arguments()),
    "kv_append paged bf16": ("kv_append", append_arguments(paged=True, dtype=torch.bfloat16)),
    "kv_append left-padded": ("kv_append", append_arguments() | {"starts": int32(3, 0)}),
    "kv_append without sketch": (
        "kv_append",
        append_arguments() | {"sketch": None, "sketch_format": "none", "num_valid": None},
    ),
    "score_tokens": ("score_tokens", score_arguments()),
    "score_tokens paged fp16": ("score_tokens", score_arguments(paged=True, dtype=torch.float16)),
    "score_tokens with a selection cache": ("score_tokens.reuse", reusing_arguments()),
    "select_tokens": ("select_tokens", select_arguments()),
    "select_tokens hit": (
        "select_tokens",
        select_arguments() | {"hit": torch.ones(2, 2, dtype=torch.int32)},
    ),
    "sparse_attention": ("sparse_attention", attention_arguments()),
    "sparse_attention paged bf16": (
        "sparse_attention",
        attention_arguments(seqlen_q=3, paged=True, dtype=torch.bfloat16),
    ),
    "sparse_attention dense": (
        "sparse_attention",
        attention_arguments() | {"indices": None, "topk_length": None},
    ),
    "list_blocks": (
        "list_blocks",
        {
            "picked": torch.tensor([[[0, 2], [1, -1]], [[0, 1], [-1, -1]]], dtype=torch.int32),
            "first_block": int32(3, 2),
            "end": int32(60, 40),
            "starts": int32(0, 5),
            "finite": torch.ones(2, 2, 4, 16, dtype=torch.bool),
            "num_window_blocks": 2,
            "width": 64,
        },
    ),
    "gather_tokens": ("gather_tokens", gather_arguments()),
    "gather_tokens paged bf16": (
        "gather_tokens",
        gather_arguments(paged=True, dtype=torch.bfloat16),
    ),
    "merge_splits": (
        "merge_splits",
        {"partial_out": torch.randn(3, 2, 4, HEAD_DIM), "partial_lse": torch.randn(3, 2, 4)},
    ),
    "recovered_mass": ("recovered_mass", mass_arguments()),
    "block_sparse_attention": ("block_sparse_attention", block_arguments()),
    "block_sparse_attention csr bf16": (
        "block_sparse_attention",
        block_arguments(torch.bfloat16)
        | {
            "block_mask": torch.tensor([2, 0, 1], dtype=torch.int32),
            "row_offsets": torch.tensor([0, *[3] * 16]),
        },
    ),
    "block_mass": ("block_mass", block_mass_arguments()),
    "block_mass lse": ("block_mass", block_mass_arguments() | {"lse": torch.randn(2, 20, 4)}),
    "selection_cache_step": ("selection_cache_step", cache_step_arguments()),
    "rolling_sweep": ("rolling_sweep", sweep_arguments()),
    "rolling_sweep paged bf16": (
        "rolling_sweep",
        sweep_arguments(paged=True, dtype=torch.bfloat16),
    ),
    "selection_cache_step bf16": ("selection_cache_step", cache_step_arguments(torch.bfloat16)),
}


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call: str) -> None:
    name, arguments = CALLS[call]
    name, _, overload = name.partition(".")
    op = getattr(getattr(torch.ops.kvselect, name), overload or "default")
    torch.library.opcheck(op, (), arguments)


def test_every_computing_op_is_opchecked() -> None:
    overloads = {"score_tokens.reuse"}
    assert {name for name, _ in CALLS.values()} == SCHEMAS | overloads
    schemas = (ROOT / "csrc/bindings/ops.cpp").read_text()
    defined = set(re.findall(r'm\.def\(\s*"([\w.]+)\(', schemas))
    machine = {"build_info", "cpu_implementations", "cpu_implementation", "set_cpu_implementation"}
    machine |= {"advise_huge_pages", "set_cuda_overlap"}
    assert defined == SCHEMAS | overloads | machine


def test_fakes_give_the_shapes_strides_and_dtypes_of_the_ops() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    for name, arguments in CALLS.values():
        op = getattr(torch.ops.kvselect, name.partition(".")[0])
        real = op(**{key: _copy(value) for key, value in arguments.items()})
        with FakeTensorMode() as mode:
            fake = op(
                **{
                    key: mode.from_tensor(value) if isinstance(value, Tensor) else value
                    for key, value in arguments.items()
                }
            )
        for got, want in zip(_as_tuple(fake), _as_tuple(real), strict=True):
            assert (got.shape, got.stride(), got.dtype) == (want.shape, want.stride(), want.dtype)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _as_tuple(result: Any) -> tuple[Tensor, ...]:
    if result is None:
        return ()
    return (result,) if isinstance(result, Tensor) else tuple(result)


APPEND, SCORE, SELECT, ATTEND = (
    append_arguments() | {"num_valid": None},
    score_arguments(),
    select_arguments() | {"starts": None},
    attention_arguments(),
)


def decode(
    new: Tensor, q: Tensor, cache: dict[str, Any], max_seqlen_k: int
) -> tuple[Tensor, Tensor]:
    """Append, score, select, attend: the four ops of a decode step, two of which mutate."""
    torch.ops.kvselect.kv_append(**(APPEND | {"k": new, "v": new} | cache))
    keys = {name: cache[name] for name in ("k_cache", "block_table", "cache_seqlens")}
    score = SCORE | keys | {"q": q[:, None, None], "max_seqlen_k": max_seqlen_k}
    scores, _, _ = torch.ops.kvselect.score_tokens(**score)
    selection = {
        "indices": q.new_full((2, 1, 2, 28), -1, dtype=torch.int32),
        "topk_length": q.new_zeros((2, 1, 2), dtype=torch.int32),
    }
    select = SELECT | selection | {"scores": scores, "cache_seqlens": cache["cache_seqlens"]}
    torch.ops.kvselect.select_tokens(**select)
    out, lse = torch.ops.kvselect.sparse_attention(
        **(ATTEND | cache | selection | {"q": q[:, None]})
    )
    return out * 2.0, lse


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("paged", [False, True])
def test_compiled_decode_step_equals_eager(backend: str, paged: bool) -> None:
    new, q = torch.randn(2, 1, 2, HEAD_DIM), torch.randn(2, 4, HEAD_DIM)
    eager, compiled = cache_tensors(seqlen=126, paged=paged), cache_tensors(seqlen=126, paged=paged)
    step = torch.compile(decode, fullgraph=True, backend=backend, dynamic=False)
    for seqlen in (127, 128):
        want, got = decode(new, q, eager, seqlen), step(new, q, compiled, seqlen)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    for name, tensor in eager.items():  # mutations arrived
        assert tensor is None or torch.equal(compiled[name], tensor), name
    assert eager["cache_seqlens"].tolist() == [128, 44]


def test_one_graph_serves_every_length() -> None:
    """max_seqlen_k grows with every decode step; as a SymInt it is traced once."""
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    def score(cache_seqlens: Tensor, max_seqlen_k: int) -> Tensor:
        lengths = {"cache_seqlens": cache_seqlens, "max_seqlen_k": max_seqlen_k}
        return torch.ops.kvselect.score_tokens(**(SCORE | lengths))[0]

    compiled = torch.compile(score, fullgraph=True, backend=count, dynamic=True)
    for seqlen in (40, 41, 77, 150):
        assert compiled(int32(seqlen, 20), seqlen).shape == (2, 1, 2, seqlen)
    assert len(graphs) == 1


def test_ops_export() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k_cache: Tensor) -> Tensor:
            arguments = ATTEND | {"q": q, "k_cache": k_cache}
            return torch.ops.kvselect.sparse_attention(**arguments)[0]

    inputs = (ATTEND["q"], ATTEND["k_cache"])
    exported = torch.export.export(Attention(), inputs)
    assert torch.equal(exported.module()(*inputs), Attention()(*inputs))


def test_build_info_names_versions_and_implementations() -> None:
    info = ops.build_info()
    assert f'\nversion = "{info["version"]}"\n' in (ROOT / "pyproject.toml").read_text()
    assert info["torch"] == torch.__version__
    assert info["torch_abi_target"] == "2.11"
    assert re.match(r"(gcc|clang) \d+", str(info["compiler"]))
    assert info["cuda_archs"] == [] or info["cuda_loaded"] in (True, False)
    assert info["cpu_implementations"] == ops.cpu_implementations()
    assert info["cpu_implementation"] == ops.cpu_implementation()
    compiled = info["cpu_compiled"]
    assert isinstance(compiled, list)
    assert [name for name in compiled if name in ops.cpu_implementations()] == (
        ops.cpu_implementations()
    )
    notes = info["cpu_notes"]
    assert isinstance(notes, dict) and not notes  # every implementation has met its hardware
    assert all(value not in (None, "") for key, value in info.items() if key != "cuda_runtime")


def test_forcing_an_implementation(cpu_implementation: str) -> None:
    assert ops.cpu_implementation() == cpu_implementation
    ops.set_cpu_implementation("auto")
    assert ops.cpu_implementation() == ops.cpu_implementations()[-1]
    ops.set_cpu_implementation(cpu_implementation)
    assert ops.cpu_implementation() == cpu_implementation


def test_scalar_comes_first() -> None:
    assert ops.cpu_implementations()[0] == "scalar"


# Compiled, but not for this machine: refused like a name that nobody knows.
COMPILED = ops.build_info()["cpu_compiled"]
assert isinstance(COMPILED, list)
ABSENT = [name for name in COMPILED if name not in ops.cpu_implementations()]


@pytest.mark.parametrize("name", ["sse2", "", "AVX2", "avx10", *ABSENT])
def test_unknown_implementations_are_errors_and_change_nothing(name: str) -> None:
    before = ops.cpu_implementation()
    message = re.escape(f"name: got {name!r}, allowed: on this CPU auto, scalar")
    with pytest.raises(ValueError, match=message):
        ops.set_cpu_implementation(name)
    with pytest.raises(ValueError, match=f"CPU implementation: got '{name}', allowed: on this CPU"):
        torch.ops.kvselect.set_cpu_implementation(name)
    assert ops.cpu_implementation() == before


def test_an_implementation_is_named_by_a_string() -> None:
    with pytest.raises(TypeError, match="name: got int 3, allowed: a str"):
        ops.set_cpu_implementation(3)  # type: ignore[arg-type]


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_chooses_the_implementation() -> None:
    code = "from kvselect import ops; print(ops.cpu_implementation())"
    for name in ("scalar", "auto"):
        process = in_a_new_process(code, KVSELECT_CPU=name)
        expected = ops.cpu_implementations()[-1] if name == "auto" else name
        assert process.stdout.strip() == expected, process.stderr


def test_a_bad_environment_is_an_error_at_every_use_until_one_is_forced() -> None:
    code = """
import torch
from kvselect import ops
for _ in range(2):
    try:
        torch.ops.kvselect.merge_splits(torch.ones(1, 1, 1), torch.ones(1, 1))
    except ValueError as error:
        print(error)
ops.set_cpu_implementation("scalar")
print(ops.cpu_implementation())
"""
    for name in ("mmx", *ABSENT):
        process = in_a_new_process(code, KVSELECT_CPU=name)
        lines = process.stdout.splitlines()
        assert len(lines) == 3, process.stderr
        assert lines[0] == lines[1]
        allowed = ", ".join(["auto", *ops.cpu_implementations()])
        assert lines[0] == f"KVSELECT_CPU: got '{name}', allowed: on this CPU {allowed}"
        assert lines[2] == "scalar"


def test_a_missing_build_says_how_to_build(tmp_path: Path) -> None:
    package = tmp_path / "kvselect"
    package.mkdir()
    (package / "__init__.py").touch()
    for name in ("ops.py", "checks.py"):
        (package / name).write_text((ROOT / "kvselect" / name).read_text())
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import kvselect.ops"
    process = in_a_new_process(code)
    assert "ImportError: kvselect is not built: _C.abi3.so is missing" in process.stderr
    assert "pip install --no-build-isolation" in process.stderr
    (package / "_C.abi3.so").write_bytes(b"not a library")
    assert "ImportError: _C.abi3.so does not load into torch" in in_a_new_process(code).stderr


def test_text_arguments_are_freed() -> None:
    """torch's own conversion leaks one string a call; ours must not (checks.h, StringArg)."""
    code = """
import resource, torch
from kvselect import ops
def calls(n):
    for _ in range(n):
        ops.torch.ops.kvselect.set_cpu_implementation("auto")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(calls(1000), calls(100_000))
"""
    before, after = map(int, in_a_new_process(code).stdout.split())
    assert after - before < 1024  # KiB; 100,000 leaked strings are 3 MiB and more


def test_importing_changes_no_torch_setting() -> None:
    code = """
import torch
before = torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
import kvselect
assert before == (torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled())
print("same")
"""
    assert in_a_new_process(code).stdout.strip() == "same"
