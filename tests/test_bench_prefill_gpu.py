"""A prefill bench as on a GPU: its peers, its cache without a host, who is left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pretend_gpu
import pytest
import torch
from bench_sizes import SHAPE, SIZES
from test_bench_prefill import CHUNK, TOKENS
from test_bench_prefill import request as cpu_request

from kvselect.bench import dense_peers, expected, prefill
from kvselect.bench.dense_peers import gpu_chunk_peers
from kvselect.bench.entrants import DENSE_KERNEL, OUR_DENSE, SELECT_INT4
from kvselect.bench.layer import Shape
from kvselect.bench.prefill import PrefillRequest, PrefillRow
from kvselect.bench.results import Skipped, load
from kvselect.cli import main

pytestmark = pytest.mark.usefixtures("small_reads")

CAUSAL = "torch SDPA flash, causal"
UNMASKED = "torch SDPA flash, group folded, no mask"


def request(**settings: object) -> PrefillRequest:
    return cpu_request(**({"gpu_peers": True} | settings))


def run(**settings: object) -> tuple[dict[str, PrefillRow], dict[str, str]]:
    skipped: list[Skipped] = []
    rows = prefill.run(request(**settings), on_skip=skipped.append)
    return {row.contender: row for row in rows}, {one.contender: one.reason for one in skipped}


def test_everybody_takes_part_or_says_why_not() -> None:
    rows, skipped = run()
    ours = {OUR_DENSE, SELECT_INT4, DENSE_KERNEL}
    assert rows.keys() == {CAUSAL, UNMASKED} | ours
    assert rows.keys() | skipped.keys() == gpu_chunk_peers().keys() | ours
    assert skipped["flashinfer"] == "ModuleNotFoundError: No module named 'flashinfer'"
    best = min(rows[name].timing.median_ms for name in (CAUSAL, UNMASKED))
    for row in rows.values():
        assert row.output_error <= 1e-5 and row.timed_kv_heads == row.num_kv_heads == 2
        assert row.over_best_torch == pytest.approx(best / row.timing.median_ms)
        assert row.over_best_sdpa == pytest.approx(best / row.timing.median_ms)
        assert row.over_expected == pytest.approx(1e3 * row.timing.median_ms / row.expected_us)
    assert rows[CAUSAL].kept_mass == pytest.approx(1.0) and 0 < rows[SELECT_INT4].kept_mass < 1


def test_ours_is_that_of_a_cache_that_grows() -> None:
    on_gpu, _ = run(rounds=1)
    on_cpu = {row.contender: row for row in prefill.run(cpu_request(rounds=1))}
    for name in ("kept_mass", "attended_tokens"):
        found = getattr(on_gpu[SELECT_INT4], name)
        assert found == pytest.approx(getattr(on_cpu[SELECT_INT4], name))


def test_calls_may_come_in_any_order() -> None:
    bench = prefill._Bench(request(), TOKENS, lambda *_: None, lambda _: None, 1.0)
    chunks = bench.chunks()

    def run(name: str) -> torch.Tensor:
        one = chunks[name]
        if one.prepare is not None:
            one.prepare()
            one.prepare()  # as before a capture and before its first replay
        return one.call()

    first = {name: run(name).clone() for name in (SELECT_INT4, DENSE_KERNEL, OUR_DENSE)}
    for name in (OUR_DENSE, SELECT_INT4, DENSE_KERNEL, SELECT_INT4, DENSE_KERNEL, OUR_DENSE):
        assert torch.equal(run(name), first[name])


def test_on_a_gpu_graphs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu.install(monkeypatch)
    rows, _ = run()
    for row in rows.values():
        assert row.timing.clock == "events" and row.timing.samples_ms == [0.5, 0.5]
        assert row.timing.not_captured == "" and row.stages_ms == {}


def test_who_is_off_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prefill.sparse_attention
    monkeypatch.setattr(prefill, "sparse_attention", lambda *a: (1.1 * real(*a)[0],))
    rows, skipped = run(rounds=1)
    assert OUR_DENSE not in rows and SELECT_INT4 in rows
    assert skipped[OUR_DENSE].startswith(f"DisagreementError: {OUR_DENSE}, {TOKENS} tokens")


def test_without_a_gpus_rules_an_error_ends_the_bench() -> None:
    with pytest.raises(RuntimeError, match="No viable backend"):
        prefill.run(request(rounds=1))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--tokens", "2k", "--topk", "64", "--rounds", "1", "--chunk-tokens", "128")
    out = ("--out", str(tmp_path))
    assert main(["bench", "prefill", "--as-on-gpu", *SIZES, *sizes, *out]) == 0
    content = load(tmp_path / "prefill.json")
    assert content["config"]["gpu_peers"] and content["config"]["chunk_tokens"] == 128
    assert {one["contender"] for one in content["skipped"]} >= {"flash-attn 2", "flash-attn 3"}
    assert "left out at 2048 tokens: flash-attn 2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"threads": (2,)}, r"threads: got \(2,\), allowed: \(1,\) on a GPU"),
        ({"gpu_peers": False}, "gpu_peers: got False, allowed: True on a GPU"),
        ({"shape": dataclasses.replace(SHAPE, batch=2)}, "batch: got 2, allowed: 1"),
        ({"shape": Shape(), "tokens": (1 << 21,)}, "tokens: got 2097152, which needs .* GB"),
    ],
)
def test_requests_are_checked(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], message: str
) -> None:
    pretend_gpu.install(monkeypatch)
    with pytest.raises(ValueError, match=message):
        prefill.check(request(**settings))


def test_the_step_model_gives_the_planned_figures() -> None:
    assert expected.expected_chunk_us(Shape(), 131072, 2048, None) == pytest.approx(6800, rel=0.02)
    selecting = expected.expected_chunk_us(Shape(), 131072, 512, 2688 + 512)
    assert selecting == pytest.approx(95, rel=0.15)


def test_packages_are_called_with_their_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' signatures; what they compute is torch's."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, CHUNK, 4, 32, generator=generator)
    k, v = (torch.randn(1, 2, 512, 32, generator=generator) for _ in range(2))

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **named: object) -> object:
        """[batch, tokens, heads, dim]"""
        assert named in ({"causal": True}, {"is_causal": True})
        rows = (x.transpose(1, 2) for x in (q, k, v))
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool).tril(k.shape[1] - q.shape[1])
        sdpa = torch.nn.functional.scaled_dot_product_attention
        return sdpa(*rows, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    def single(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, kv_layout: str
    ) -> object:
        assert kv_layout == "HND"
        by_token = (x.transpose(0, 1)[None] for x in (k, v))
        return attention(q[None], *by_token, causal=causal)[0]  # type: ignore[index]

    modules = {
        "flashinfer": SimpleNamespace(single_prefill_with_kv_cache=single),
        "flash_attn": SimpleNamespace(flash_attn_func=attention),
        "flash_attn_interface": SimpleNamespace(
            flash_attn_func=lambda *args, **named: (attention(*args, **named), "lse")
        ),
        "flash_sparse_attn": SimpleNamespace(flash_dense_attn_func=attention),
    }
    monkeypatch.setattr(dense_peers.importlib, "import_module", modules.__getitem__)
    peers = gpu_chunk_peers()
    want = peers[CAUSAL].build(q, k, v)()
    assert want.shape == (CHUNK, 4, 32)
    for name, peer in peers.items():
        if not peer.sdpa:
            assert torch.allclose(peer.build(q, k, v)(), want, atol=1e-5), name
