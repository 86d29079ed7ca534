"""A decode bench as on a GPU: its contenders, several layers, hits, and who is left out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pretend_gpu
import pytest
import torch
from bench_sizes import ROW_BYTES, SHAPE, SIZES
from test_bench_decode import ENDS, TOKENS, TOPK, request

from kvselect import TokenSelect
from kvselect.bench import (
    command,
    decode,
    dense_peers,
    entrants,
    expected,
    graphs,
    ops,
    prefill,
)
from kvselect.bench.contenders import TORCH_TOKEN_SELECT, DisagreementError, exact_mass
from kvselect.bench.decode import PERFECT_DENSE, DecodeRequest, DecodeRow
from kvselect.bench.dense_peers import PACKAGES, SDPA_BACKENDS, sdpa_name
from kvselect.bench.entrants import OUR_DENSE, QUEST, SELECT_EXACT, SELECT_INT4, STREAMING
from kvselect.bench.layer import Shape, StructuredLayer
from kvselect.bench.results import Skipped, load
from kvselect.bench.reuse import RepeatedStep
from kvselect.cli import main

pytestmark = pytest.mark.usefixtures("small_reads")

HALF, ALL = f"{SELECT_INT4}, 50 % hits", f"{SELECT_INT4}, all hits"
FLASH = sdpa_name("flash", "group folded")


def gpu_request(**settings: object) -> DecodeRequest:
    usual = {"layers": 2, "hit_shares": (0.5, 1.0), "gpu_peers": True, "curves": ()}
    usual["policies"] = entrants.gpu_policies(TOPK)
    return request(**(usual | settings))


@pytest.fixture(scope="module")
def found() -> tuple[dict[str, DecodeRow], dict[str, str]]:
    skipped: list[Skipped] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kvselect.bench.measure.READ_BYTES", 1 << 20)
        rows = decode.run(gpu_request(), on_skip=skipped.append)
    assert len({one.contender for one in skipped}) == len(skipped)  # not once per layer
    return {row.contender: row for row in rows}, {one.contender: one.reason for one in skipped}


def test_everybody_takes_part_or_says_why_not(
    found: tuple[dict[str, DecodeRow], dict[str, str]],
) -> None:
    rows, skipped = found
    sdpa = {sdpa_name(b, a) for b in SDPA_BACKENDS for a in ("group folded", "enable_gqa")}
    ours = {SELECT_INT4, SELECT_EXACT, STREAMING, OUR_DENSE, HALF, ALL}
    quests = {f"{name}, equal kept mass" for name in QUEST.values()}
    quests |= {f"{QUEST['kvselect']}, equal tokens"}
    everybody = sdpa | {*PACKAGES, TORCH_TOKEN_SELECT, PERFECT_DENSE} | ours | quests
    assert rows.keys() | skipped.keys() == everybody and not rows.keys() & skipped.keys()
    assert ours | quests | {FLASH, TORCH_TOKEN_SELECT} <= rows.keys()
    for name in PACKAGES:
        assert skipped[name].startswith("ModuleNotFoundError: No module named")
    assert skipped[sdpa_name("cuDNN", "enable_gqa")].startswith("RuntimeError: No viable backend")


def test_a_share_of_the_layers_hits(found: tuple[dict[str, DecodeRow], dict[str, str]]) -> None:
    rows, _ = found
    assert (rows[SELECT_INT4].hit_share, rows[HALF].hit_share, rows[ALL].hit_share) == (0, 0.5, 1)
    listed = 96 + ENDS  # 1.5 times topk
    assert rows[SELECT_INT4].attended_tokens == listed
    assert rows[ALL].attended_tokens == listed + 1  # the newest token joined
    assert rows[HALF].attended_tokens == listed + 0.5
    scan = 2 * (32 // 2 + 1) * TOKENS
    assert rows[ALL].timing.bytes_must_read == 2 * ROW_BYTES * (listed + 1)
    assert rows[HALF].timing.bytes_must_read == 2 * ROW_BYTES * listed + ROW_BYTES + scan // 2
    for name in (HALF, ALL):
        assert rows[name].output_error is not None and rows[name].output_error <= 1e-5
        assert 0 < rows[name].kept_mass < 1


def test_ratios_expectations_and_errors(
    found: tuple[dict[str, DecodeRow], dict[str, str]],
) -> None:
    rows, _ = found
    dense = [sdpa_name(b, a) for b in ("flash", "math") for a in ("group folded", "enable_gqa")]
    best = min(rows[name].timing.median_ms for name in dense)
    for name, row in rows.items():
        assert row.over_best_torch == pytest.approx(best / row.timing.median_ms)
        assert (row.batch, row.layers) == (1, 2), name
        if row.expected_us is not None:
            measured = 1e3 * row.timing.median_ms
            assert row.over_expected == pytest.approx(measured / row.expected_us)
    bandwidth = rows[FLASH].timing.streaming_gb_per_s
    us = 2 * ROW_BYTES * TOKENS / bandwidth / 1e3
    assert rows[FLASH].expected_us == pytest.approx(us + 10)
    assert rows[ALL].expected_us == pytest.approx(
        2 * ROW_BYTES * rows[ALL].attended_tokens / bandwidth / 1e3 + 6.5
    )
    assert rows[TORCH_TOKEN_SELECT].expected_us is None


def test_rows_of_a_batch_agree_with_exact_attention() -> None:
    shape = dataclasses.replace(SHAPE, batch=3)
    skipped: list[Skipped] = []
    rows = decode.run(gpu_request(shape=shape, rounds=1), on_skip=skipped.append)
    by_name = {row.contender: row for row in rows}
    for name in (FLASH, TORCH_TOKEN_SELECT, SELECT_INT4, SELECT_EXACT, OUR_DENSE, ALL):
        row = by_name[name]
        assert row.batch == 3 and row.output_error is not None and row.output_error <= 1e-5
    assert by_name[FLASH].timing.bytes_must_read == 3 * 2 * ROW_BYTES * TOKENS
    assert by_name[TORCH_TOKEN_SELECT].kept_mass == pytest.approx(by_name[SELECT_EXACT].kept_mass)
    quest = {one.reason for one in skipped if one.contender.startswith("Quest")}
    assert quest == {"ValueError: batch: got 3, allowed: 1 (Quest as it is re-created here)"}


def test_mass_by_torch_is_that_of_the_op() -> None:
    shape = dataclasses.replace(SHAPE, batch=2)
    layer, cache = StructuredLayer(shape), shape.new_cache(1024, None)
    layer.fill([cache], 1024)
    q = layer.query(layer.draw_query(), cache)[0]
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)
    selection = entrants.TorchTokenSelect(k, v, 4, 16).selection(q, 100)
    expected_mass = entrants.recovered_mass(q, cache, selection)
    assert torch.allclose(exact_mass(q, cache, selection).view_as(expected_mass), expected_mass)


def test_who_is_off_is_left_out_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = entrants.decode_step

    def wrong(*arguments: object, **named: object) -> object:
        out, info = real(*arguments, **named)  # type: ignore[arg-type]
        return 1.5 * out, info

    monkeypatch.setattr(entrants, "decode_step", wrong)
    skipped: list[Skipped] = []
    rows = decode.run(gpu_request(rounds=1, hit_shares=()), on_skip=skipped.append)
    reason = next(one.reason for one in skipped if one.contender == SELECT_INT4)
    assert reason.startswith(
        f"DisagreementError: {SELECT_INT4}, {TOKENS} tokens: got an output 5.0"
    )
    assert FLASH in {row.contender for row in rows}


def test_a_cache_that_reuses_nothing_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    real = RepeatedStep.step
    monkeypatch.setattr(RepeatedStep, "step", lambda self, q, similar: real(self, q, False))
    skipped: list[Skipped] = []
    decode.run(gpu_request(rounds=1), on_skip=skipped.append)
    reasons = {one.contender: one.reason for one in skipped}
    assert reasons[ALL] == f"ValueError: {ALL}: lists reused: got 0, allowed: 2"


def test_without_a_gpus_rules_an_error_ends_the_bench() -> None:
    with pytest.raises(RuntimeError, match="No viable backend"):
        decode.run(gpu_request(rounds=1))


def test_a_policy_without_a_selection_cache_cannot_repeat() -> None:
    layer, cache = StructuredLayer(SHAPE), SHAPE.new_cache(TOKENS, "int4")
    layer.fill([cache], TOKENS)
    q = layer.query(layer.draw_query(), cache)[0]
    with pytest.raises(ValueError, match="similarity_threshold: got None, allowed: a float"):
        RepeatedStep(TokenSelect(topk=TOPK), q, cache)


# ---- through the pretended GPU


def test_on_a_gpu_graphs_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu.install(monkeypatch)
    shape = dataclasses.replace(SHAPE, device="cpu")
    skipped: list[Skipped] = []
    rows = decode.run(gpu_request(shape=shape), on_skip=skipped.append)
    by_name = {row.contender: row for row in rows}
    for name in (FLASH, SELECT_INT4, HALF, ALL):
        timing = by_name[name].timing
        assert timing.clock == "events" and timing.not_captured == ""
        assert timing.samples_ms == [0.25, 0.25] and timing.wall_ms is not None
    assert pretend_gpu.PretendGraph.replays > 4


@pytest.mark.parametrize("bench", ["decode", "ops", "prefill"])
def test_a_contender_that_fails_at_its_capture_is_left_out(
    monkeypatch: pytest.MonkeyPatch, bench: str, tmp_path: Path
) -> None:
    pretend_gpu.install(monkeypatch)
    real, count = graphs.capture, iter(range(100))

    def first_fails(*arguments: Any) -> graphs.Replay:
        if next(count) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*arguments)

    monkeypatch.setattr(graphs, "capture", first_fails)
    sizes = ("--tokens", "4k", "--topk", "64", "--rounds", "1", "--layers", "2")
    chunk = ("--chunk-tokens", "128")
    code = main(["bench", bench, *SIZES, *sizes, *chunk, "--out", str(tmp_path)])
    assert code == (1 if bench == "ops" else 0)  # a peer may fail, an op of ours may not
    content = load(tmp_path / f"{bench}.json")
    reasons = {one["contender"]: one["reason"] for one in content["skipped"]}
    (lost,) = (name for name, why in reasons.items() if why.startswith("OutOfMemoryError"))
    names = {row.get("contender", row.get("op")) for row in content["results"]}
    assert names and lost not in names


@pytest.mark.parametrize("bench", ["decode", "ops", "prefill"])
def test_a_bench_without_anybody_says_so(
    monkeypatch: pytest.MonkeyPatch, bench: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def disagrees(name: str, *_: object) -> None:
        raise DisagreementError(f"{name}: off")

    for module in (decode, ops, prefill):
        monkeypatch.setattr(module, "require_agreement", disagrees)
    sizes = ("--tokens", "4k", "--topk", "64", "--rounds", "1", "--chunk-tokens", "128")
    out = ("--out", str(tmp_path))
    assert main(["bench", bench, "--as-on-gpu", *SIZES, *sizes, *out]) == 1
    content = load(tmp_path / f"{bench}.json")
    assert content["results"] == [] and len(content["skipped"]) > 3
    said = capsys.readouterr()
    assert "DisagreementError: " in said.out
    assert "kvselect bench: left out, and should not be: " in said.err


def test_the_command_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretend_gpu.install(monkeypatch, capturable=lambda: False)
    sizes = ("--tokens", "2k", "--topk", "64", "--rounds", "2", "--layers", "2", "--batch", "2")
    assert main(["bench", "decode", *SIZES, *sizes, "--out", str(tmp_path)]) == 0
    content = load(tmp_path / "decode.json")
    assert content["config"]["gpu_peers"] and content["config"]["hit_shares"] == [0.5, 1.0]
    assert content["config"]["shape"]["batch"] == 2
    reasons = {one["contender"]: one["reason"] for one in content["skipped"]}
    assert set(PACKAGES) <= reasons.keys()
    row = next(row for row in content["results"] if row["contender"] == SELECT_INT4)
    assert row["not_captured"].startswith("RuntimeError: operation not permitted")
    text = capsys.readouterr().out
    assert "left out at 2048 tokens: flashinfer: ModuleNotFoundError" in text
    assert not list(tmp_path.glob("*.png"))


def test_the_commands_defaults_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[DecodeRequest] = []
    monkeypatch.setattr(command.decode, "check", seen.append)
    pretend_gpu.install(monkeypatch)
    import argparse

    parser = argparse.ArgumentParser()
    command.add_options(parser)
    command.prepare(parser.parse_args(["decode", "--device", "cuda", "--tokens", "128k"]))
    asked = seen[0]
    assert (asked.rounds, asked.layers, asked.curves) == (50, 8, ())
    assert asked.sketches == ("int4",) and asked.shape.device == "cuda"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 0}, "layers: got 0, allowed: an int >= 1"),
        ({"layers": 1}, r"layers: got 1, allowed: an int >= 2 with hit_shares"),
        ({"hit_shares": (1.5,)}, r"hit_shares: got 1.5, allowed: shares in \(0, 1\]"),
        ({"shape": dataclasses.replace(SHAPE, device="cuda:7")}, "device: got 'cuda:7', allowed: "),
    ],
)
def test_requests_are_checked(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode.check(gpu_request(**settings))


def test_a_gpu_has_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu.install(monkeypatch)
    with pytest.raises(ValueError, match=r"threads: got \(2,\), allowed: \(1,\) on a GPU"):
        decode.check(gpu_request(threads=(2,)))


def test_more_than_fits_the_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpu.install(monkeypatch)
    with pytest.raises(ValueError, match=r"tokens: got 1048576, which needs .* GB, allowed: 7.7"):
        decode.check(gpu_request(tokens=(1 << 20,), shape=Shape(), layers=8))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "CUDA"])
def test_devices_have_names(device: str) -> None:
    with pytest.raises(ValueError, match=f"device: got '{device}', allowed: cpu, cuda or cuda:N"):
        Shape(device=device)


# ---- the step model


@pytest.mark.parametrize(
    ("tokens", "us"),
    [
        (32768, {"dense": 41, "exact": 35, "int4": 24.7, "hit": 9.1}),
        (131072, {"dense": 135, "exact": 85, "int4": 40, "hit": 9.1}),
        (1 << 20, {"dense": 1009, "exact": 549, "int4": 183.4, "hit": 9.1}),
    ],
)
def test_the_step_model_gives_the_planned_figures(tokens: int, us: dict[str, float]) -> None:
    listed = {"dense": 0, "exact": 2688, "int4": 3712, "hit": 2688}
    for design, planned in us.items():
        found = expected.expected_us(design, Shape(), tokens, listed[design])
        assert found == pytest.approx(planned, abs=0.5), design


def test_an_unknown_design_is_refused() -> None:
    with pytest.raises(ValueError, match="design: got 'magic', allowed:"):
        expected.expected_us("magic", Shape(), 1, 1)


# ---- packages that may be there


def test_packages_are_called_with_their_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins with the packages' signatures; what they compute is torch's."""
    shape = dataclasses.replace(SHAPE, batch=2)
    layer, cache = StructuredLayer(shape), shape.new_cache(512, None)
    layer.fill([cache], 512)
    q = layer.query(layer.draw_query(), cache)[0]
    k, v = cache.k.transpose(1, 2), cache.v.transpose(1, 2)

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[batch, heads, tokens, dim]"""
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    def with_kvcache(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, heads, dim]"""
        return sdpa(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    class Wrapper:
        def __init__(self, workspace: torch.Tensor, layout: str, use_tensor_cores: bool) -> None:
            assert workspace.dtype == torch.uint8 and layout == "HND" and use_tensor_cores

        def plan(
            self,
            indptr: torch.Tensor,
            indices: torch.Tensor,
            last: torch.Tensor,
            *sizes: int,
            **dtypes: torch.dtype,
        ) -> None:
            assert indptr.tolist() == [0, 1, 2] and indices.tolist() == [0, 1]
            assert last.tolist() == [512, 512] and sizes == (4, 2, 32, 512)

        def run(self, q: torch.Tensor, kv: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
            return sdpa(q[:, :, None], *kv)[:, :, 0]

    def single(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kv_layout: str, use_tensor_cores: bool
    ) -> torch.Tensor:
        assert kv_layout == "HND" and use_tensor_cores
        return sdpa(q[None, :, None], k[None], v[None])[0, :, 0]

    from types import SimpleNamespace

    modules = {
        "flashinfer": SimpleNamespace(
            single_decode_with_kv_cache=single, BatchDecodeWithPagedKVCacheWrapper=Wrapper
        ),
        "flash_attn": SimpleNamespace(flash_attn_with_kvcache=with_kvcache),
        "flash_attn_interface": SimpleNamespace(flash_attn_with_kvcache=with_kvcache),
        "flash_sparse_attn": SimpleNamespace(
            flash_dense_attn_with_kvcache_func=lambda q, k, v: with_kvcache(q[:, None], k, v)
        ),
    }
    monkeypatch.setattr(dense_peers.importlib, "import_module", modules.__getitem__)
    for rows in (1, 2):
        want = sdpa(q[:rows].transpose(1, 2), k[:rows], v[:rows])
        for name, build in PACKAGES.items():
            got = build(q[:rows], k[:rows], v[:rows])()
            assert torch.allclose(got.reshape(want.shape), want, atol=1e-5), name
