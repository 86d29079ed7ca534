"""Every script in bench/ runs at its quick sizes and answers its question in JSON."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import hf_models
import pretend_gpu
import pytest
import torch
from bench_sizes import SHAPE, SIZES
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvselect import TokenSelect, crossovers, ops
from kvselect.bench import decode, policies, prefill
from kvselect.bench.contenders import DisagreementError
from kvselect.bench.entrants import DENSE_KERNEL, OUR_DENSE, SELECT_INT4
from kvselect.bench.layer import Shape
from kvselect.bench.results import load, save
from kvselect.cli import main

pytestmark = pytest.mark.usefixtures("small_reads")

BENCH = Path(__file__).resolve().parent.parent / "bench"
SCRIPTS = sorted(path.stem for path in BENCH.glob("*.py"))


def script(name: str) -> ModuleType:
    import sys

    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def quick(name: str, out: Path, *more: str) -> list[dict[str, Any]]:
    """Rows of a quick run on a small layer."""
    script(name).main(["--quick", *more, "--out", str(out / f"{name}.json")])
    content = load(out / f"{name}.json")
    assert content["question"].endswith("?") and content["machine"] and content["commit"]
    rows: list[dict[str, Any]] = content["results"]
    return rows


# ---- all of them


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_first_line_is_a_question(name: str) -> None:
    doc = script(name).__doc__
    assert doc is not None and doc.split("\n", 1)[0].endswith("?")


def test_the_readme_names_every_script_and_only_those() -> None:
    text = (BENCH / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"bench/([a-z0-9_]+)\.py", text)) == set(SCRIPTS)


def test_targets_name_scripts_that_exist() -> None:
    targets = script("targets").TARGETS
    assert {target.script for target in targets} <= set(SCRIPTS)
    assert len({target.claim for target in targets}) == len(targets)


# ---- decode, ops, prefill


def test_decode_step(tmp_path: Path) -> None:
    rows = quick("decode_step", tmp_path, *SIZES, "--threads", "1")
    assert {row["tokens"] for row in rows} == {2048, 4096}
    assert (tmp_path / "decode_step.png").read_bytes().startswith(b"\x89PNG")
    ours = next(row for row in rows if row["contender"] == SELECT_INT4)
    assert 0 < ours["kept_mass"] < 1 and ours["over_best_torch"] > 0


def test_ops(tmp_path: Path) -> None:
    rows = quick("ops", tmp_path, *SIZES, "--threads", "1")
    assert {"scan int4", "select", "decode step, hit"} <= {row["op"] for row in rows}


def test_block_sparse(tmp_path: Path) -> None:
    rows = quick("block_sparse", tmp_path, *SIZES)
    assert {row["block_size"] for row in rows} == {16, 64}
    full = [row for row in rows if row["contender"] == "100% of blocks"]
    assert all(row["over_proportional"] == 1.0 and row["over_sdpa"] > 0 for row in full)
    assert all(0.04 < row["kept_share"] <= 1.0 for row in rows)


def test_shared_prefix(tmp_path: Path) -> None:
    rows = quick("shared_prefix", tmp_path, *SIZES)
    assert [(row["members"], row["prefix_tokens"]) for row in rows] == [
        (members, tokens) for tokens in (64, 256) for members in (1, 3)
    ]
    for row in rows:
        assert row["prefix_passes"] == 1 and row["prefix_bytes_ratio"] == row["members"]
        assert row["bytes_ratio"] >= 1.0 and row["speed_up"] > 0


def test_shared_prefix_through_attach(tmp_path: Path) -> None:
    rows = quick("shared_prefix", tmp_path, "--model", "embedded", "--members", "3")
    assert [(row["members"], row["prefix_tokens"]) for row in rows] == [(3, 64), (3, 256)]
    assert all(row["logit_error"] < 1e-4 and row["speed_up"] > 0 for row in rows)
    assert rows[1]["separate_bytes"] > rows[1]["shared_bytes"]


def test_adaspa(tmp_path: Path) -> None:
    rows = quick("adaspa", tmp_path)
    assert len(rows) == 8 and {row["sparsity"] for row in rows} == {0.8, 0.9}
    assert {row["head_split"] for row in rows} == {None, "two_level", "proportional"}
    for row in rows:
        assert row["num_searches"] == 2 and 0.1 < row["kept_share"] < 0.3
        assert 0.0 < row["least_recall"] <= row["mean_recall"] <= 1.0
        assert 0.0 < row["output_error"] < 1.0 and 0.0 < row["kept_lse_overlap"] <= 1.0


def test_prefill_chunk(tmp_path: Path) -> None:
    rows = quick("prefill_chunk", tmp_path, *SIZES, "--dense-kv-heads", "2")
    assert {row["chunk_tokens"] for row in rows} == {256}
    assert {row["timed_kv_heads"] for row in rows} == {2}
    ours = {OUR_DENSE, SELECT_INT4, DENSE_KERNEL}
    assert {row["contender"] for row in rows} == {*prefill.TORCH, *ours}


def test_cascade(tmp_path: Path) -> None:
    rows = quick("cascade", tmp_path, *SIZES)
    values = [row for row in rows if row["part"] == "values"]
    errors, read = [row["output_error"] for row in values], [row["value_share"] for row in values]
    assert errors == sorted(errors, reverse=True) and read == sorted(read) and read[0] < 0.5
    bits = [row for row in rows if row["part"] == "bits"]
    rates = [row["refine_rate"] for row in bits]
    assert rates == sorted(rates) and rates[0] < rates[-1]
    assert bits[-1]["output_error"] <= bits[0]["output_error"] and bits[0]["overlap"] > 0.5


# ---- scaling


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = quick("scaling", tmp_path, *SIZES)
    steps = [row for row in rows if row["contender"] == SELECT_INT4]
    assert [row["tokens"] for row in steps] == [2048, 4096]
    ratio = steps[1]["median_ms"] / steps[0]["median_ms"] / 2
    text = capsys.readouterr().out
    assert (
        f"time per token relative to the first, 1 thread(s): 2048: 1.000, 4096: {ratio:.3f}" in text
    )
    assert not [row for row in rows if "enable_gqa" in row["contender"]]


# ---- implementations


def test_implementations_are_forced_and_let_go(tmp_path: Path) -> None:
    in_use = ops.cpu_implementation()
    rows = quick("implementations", tmp_path, *SIZES)
    assert ops.cpu_implementation() == in_use
    assert [row["implementation"] for row in rows] == list(ops.cpu_implementations())
    fastest = min(row["median_ms"] for row in rows)
    for row in rows:
        assert row["over_fastest"] == pytest.approx(fastest / row["median_ms"])
        assert row["output_error"] <= 1e-5 and 0 < row["kept_mass"] < 1


def test_the_scalar_implementation_is_left_out_beyond_its_length(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("implementations")
    monkeypatch.setattr(module, "SCALAR_TOKENS", 2048)
    out = tmp_path / "x.json"
    module.main(["--quick", *SIZES, "--tokens", "2k,4k", "--out", str(out)])
    rows = load(out)["results"]
    assert [row["tokens"] for row in rows if row["implementation"] == "scalar"] == [2048]


# ---- the rolling sweep


def test_rolling_sweep(tmp_path: Path) -> None:
    sizes = ("--q-heads", "4", "--kv-heads", "2", "--head-dim", "32", "--segments", "2", "4")
    rows = quick("rolling_sweep", tmp_path, *sizes)
    assert {row["keys"] for row in rows} == {"vt", "drift 0.9"}
    for keys in ("vt", "drift 0.9"):
        by_name = {row["contender"]: row for row in rows if row["keys"] == keys}
        full, rolled = by_name["full scan"], by_name["rolling 2, 1x"]
        assert len(full["step_ms"]) == 12 and full["num_rolled"] == 0
        assert rolled["num_rolled"] > 0 and rolled["bytes_read"] < full["bytes_read"]
        masses = zip(rolled["mass_by_layer"], full["mass_by_layer"], strict=True)
        assert all(0.5 * whole < part < 1.001 * whole for part, whole in masses)


# ---- fidelity


def test_fidelity(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("fidelity")
    sizes = ("--head-dim", "32", "--group-size", "2", "--sketches", "int4", "bounds 16")
    dump = tmp_path / "some.safetensors"
    asked = ("capture", "--model", "embedded", "--task", "vt", "--lengths", "1200", "--layers", "2")
    assert main([*asked, "--queries", "4", "--out", str(dump)]) == 0
    rows = quick("fidelity", tmp_path, *sizes, "--overselect", "1", "1.5", "--dump", str(dump))
    kinds = ["Gaussian", "structured", "embedded vt, rotated", "embedded vt, un-rotated"]
    assert list(dict.fromkeys(row["keys"] for row in rows)) == [
        *kinds, "some, rotated", "some, un-rotated"]  # fmt: skip
    assert {row["layer"] for row in rows if row["keys"].startswith("some")} == {"layer 2"}
    for row in rows:
        assert row["attended_tokens"] == row["overselect"] * row["topk"]
        assert 0 < row["mass_min"] <= row["mass"] <= 1 and 0 <= row["recall"] <= 1
    by_sketch = {
        sketch: [row["mass"] for row in rows if row["sketch"] == sketch]
        for sketch in ("int4", "bounds 16")
    }
    assert all(a > b for a, b in zip(by_sketch["int4"], by_sketch["bounds 16"], strict=True))
    assert (tmp_path / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "fewest bytes that keep the exact top-k's mass in every head: int4 at 1.5x" in shown
    assert "no sketch keeps" in module.verdict([row | {"mass_ratio_min": 0.9} for row in rows])


def test_fidelity_refuses() -> None:
    for arguments, message in (
        (("--share", "1"), "share: got 1.0, allowed: between 0 and 1"),
        (("--queries", "0"), "queries: got 0, allowed: an int >= 1"),
        (("--tokens", "384"), r"tokens: got 384, allowed: at least 512"),
    ):
        with pytest.raises(ValueError, match=message):
            script("fidelity").main(["--quick", "--models", *arguments])


# ---- stability


def test_stability(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = script("stability")
    dump = tmp_path / "some.safetensors"
    asked = ("capture", "--model", "embedded", "--task", "vt", "--lengths", "450", "--layers", "1")
    assert main([*asked, "--queries", "9", "--out", str(dump)]) == 0
    rows = quick("stability", tmp_path, "--thresholds", "0.1", "0.9", "--dump", str(dump))
    assert list(dict.fromkeys(row["stream"] for row in rows)) == ["Embedded model vt", "some 447"]
    pairs = [row for row in rows if row["part"] == "pairs" and row["ages"] == [1, 64]]
    for stream, lists, steps in (("Embedded model vt", 8, 12), ("some 447", 2, 9)):
        mine = [row["count"] for row in pairs if row["stream"] == stream]
        # Cosines at which no pair has anything to lose have no row.
        pairs_there_are = lists * steps * (steps - 1) / 2
        assert 0.8 * pairs_there_are <= sum(mine) <= pairs_there_are
    cache = [row for row in rows if row["part"] == "cache"]
    loose, tight = ([row for row in cache if row["threshold"] == t] for t in (0.1, 0.9))
    assert all(a["hit_rate"] >= b["hit_rate"] for a, b in zip(loose, tight, strict=True))
    assert loose[0]["hit_rate"] > 0 and loose[0]["loss_points"] > tight[0]["loss_points"]
    sweep = {row["contender"]: row for row in rows if row["part"] == "sweep" and row["layer"] == 1}
    assert sweep["full scan"]["mass_over_full"] == 1.0
    assert 0.5 < sweep["rolling 2, 1x"]["mass_over_full"] <= 1.001
    assert (tmp_path / "stability.png").read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "old lists hold 0.95 of the fresh candidates' mass" in shown
    none = [row | {"worst_loss_points": 3.0} for row in cache]
    assert module.verdict(none) == "no threshold keeps every layer within 0.5 points of mass"
    good = [row | {"share": 1.0} for row in pairs]
    assert "mass at every cosine" in module.safe_cosine(good)


def test_stability_refuses() -> None:
    for arguments, message in (
        (("--steps", "0"), "steps: got 0, allowed: an int >= 1"),
        (("--thresholds", "1.5"), r"thresholds: got 1.5, allowed: floats in \(0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            script("stability").main(["--quick", "--models", *arguments])


# ---- ablations


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A random model of bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(["x"], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(tmp_path / "reader")
    small = hf_models.config("llama", vocab_size=256, num_hidden_layers=1)
    hf_models.build(small).save_pretrained(tmp_path / "reader")
    return tmp_path / "reader"


def test_ablations(
    tmp_path: Path,
    reader: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A run that dies before the text goes on with the tasks that it has, and ends the same."""
    module = script("ablations")
    some = ("one list per layer", "unscaled votes", "pooled over 5")
    fewer = {label: module.ablation.CHANGES[label] for label in some}
    monkeypatch.setattr(module.ablation, "CHANGES", fewer)
    monkeypatch.setattr(module.perplexity, "library_text", lambda: "import this; " * 80)
    asked = ("--language-model", str(reader), "--text-lengths", "400")
    out = tmp_path / "ablations.json"

    def die(*arguments: Any, **more: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module.perplexity, "measure", die)
        with pytest.raises(KeyboardInterrupt):
            module.main(["--quick", *asked, "--out", str(out)])
    assert not out.exists() and out.with_suffix(".tasks.jsonl").exists()
    rows = quick("ablations", tmp_path, *asked)
    assert "going on with" in capsys.readouterr().out
    assert list(tmp_path.glob("*.jsonl")) == []
    labels = ["defaults", "dense attention", "modulo head map", *some]
    for measure in ("score", "kept mass", "perplexity"):
        mine = [row for row in rows if row["measure"] == measure]
        assert [row["variant"] for row in mine] == labels
        assert mine[0]["effect"] == 0.0 and mine[0]["value"] == mine[0]["base"]
    masses = {row["variant"]: row["effect"] for row in rows if row["measure"] == "kept mass"}
    assert masses["modulo head map"] < -0.01 and masses["pooled over 5"] < -0.01
    good = [module.Effect(**{k: v for k, v in row.items() if k != "verdict"}) for row in rows]
    good = [dataclasses.replace(one, samples=99, low=0.1, high=0.2) for one in good[:5]]
    assert "better somewhere and worse nowhere: defaults, modulo" in module.better_than_defaults(
        good
    )


def test_ablations_without_the_language_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("ablations")
    monkeypatch.setattr(module.ablation, "CHANGES", {})
    monkeypatch.setattr(module, "LANGUAGE_MODEL", "embedded:nobody")
    (tmp_path / "ablations.tasks.jsonl").write_text("not a journal\n", encoding="utf-8")
    module.main(["--quick", "--out", str(tmp_path / "ablations.json")])
    rows = load(tmp_path / "ablations.json")["results"]
    assert {row["measure"] for row in rows} == {"score", "kept mass"}
    shown = capsys.readouterr().out
    assert "left out: text: model: got 'embedded:nobody'" in shown
    assert "the defaults stand" in shown
    with pytest.raises(ValueError, match="model: got 'embedded:nobody'"):
        module.main(
            ["--quick", "--language-model", "embedded:nobody", "--out", str(tmp_path / "x")]
        )
    with pytest.raises(ValueError, match="segments: got 0, allowed: an int >= 1"):
        module.main(["--quick", "--segments", "0"])


# ---- tiers


def test_tier(tmp_path: Path) -> None:
    sizes = ("--q-heads", "4", "--kv-heads", "2", "--head-dim", "32")
    rows = quick("tier", tmp_path, *sizes)
    assert [(row["keys"], row["lists"]) for row in rows] == [
        (keys, lists) for keys in ("vt", "drift 0.9") for lists in (1.0, 2.0)
    ]
    for small, large in (rows[:2], rows[2:]):
        assert small["device_bytes"] < large["device_bytes"] < large["resident_device_bytes"]
        assert small["num_fetched"] > large["num_fetched"] > 0
        listed = small["num_found"] + small["num_fetched"]
        assert listed == large["num_found"] + large["num_fetched"]
        assert 0 < large["fetched_bytes"] < small["fetched_bytes"] < small["listed_bytes"]
        assert len(small["step_ms"]) == len(small["resident_step_ms"]) == 12


# ---- the selection cache


def test_policies(tmp_path: Path) -> None:
    small = (*SIZES, "--policies", "TokenSelect", "StreamingLLM", "SnapKV", "ColumnRank")
    also = ("ada_spa:sparsity=0.5,dense_prefill_tokens=0", "sp_atten:mean_pruned=0.5")
    rows = quick("policies", tmp_path, *small, "--also", ",".join(also))
    named = [entry.replace(":", " ").replace(",", " ") for entry in also]
    assert [row["policy"] for row in rows] == [
        *("Dense", "TokenSelect 512", "TokenSelect 1024"),
        *("StreamingLLM 512", "StreamingLLM 1024", "SnapKV 512", "SnapKV 1024"),
        named[0],  # a cascade has no single layer, a walk along a prompt wants its queries
    ]
    dense, few, more, window = rows[:4]
    assert dense["kept_mass"] == 1.0 and dense["output_error"] < 1e-4
    assert window["kept_mass"] < few["kept_mass"] < more["kept_mass"] < 1.0
    assert dense["output_error"] < more["output_error"] < window["output_error"]
    assert few["attended_tokens"] <= 512 and few["bytes_ratio"] < more["bytes_ratio"] < 1.0
    assert few["memory_bytes"] > dense["memory_bytes"]  # the sketch
    answered = load(tmp_path / "policies_on_model.json")["results"]
    asked = {row["policy"]: row for row in answered}
    assert set(asked) == {
        *("Dense", "TokenSelect 228", "TokenSelect 228 compact"),
        *("StreamingLLM 228", "StreamingLLM 228 compact"),
        *("SnapKV 228", "SnapKV 228 next_call", "ColumnRank 228", "ColumnRank 228 next_call"),
        *named,
    }
    assert asked["Dense"]["score"] > 0.9 > asked["StreamingLLM 228"]["score"]
    assert (tmp_path / "policies.png").stat().st_size > 10_000
    assert not list(tmp_path.glob("*.jsonl"))  # nothing is left to go on with
    with pytest.raises(ValueError, match="parts: got 'all', allowed: layer or model"):
        quick("policies", tmp_path, "--parts", "all")


def test_methods_without_a_budget_are_refused() -> None:
    message = "policies: got 'Dense', allowed: .*StreamingLLM"
    with pytest.raises(ValueError, match=message):
        policies.budgeted(["Dense"], [512])
    with pytest.raises(ValueError, match="budget: got 3, allowed: an int >= 144"):
        policies.budgeted(None, [3])


def test_a_policy_that_wants_the_queries_of_the_whole_prompt_is_left_out() -> None:
    request = policies.PoliciesRequest(
        tokens=(512,),
        policies=policies.budgeted(["ColumnRank", "SnapKV"], [256]),
        shape=Shape(num_q_heads=2, num_kv_heads=1, head_dim=32),
        chunk_tokens=64,
        rounds=1,
    )
    skipped: list[Any] = []
    rows = policies.run(request, on_skip=skipped.append)
    assert [row.policy for row in rows] == ["Dense", "SnapKV 256"]
    message = "policy: got 'ColumnRank 256', allowed: one that asks for no queries but those of the"
    assert [(skip.tokens, skip.contender) for skip in skipped] == [(512, "ColumnRank 256")]
    assert skipped[0].reason.startswith(message)
    with pytest.raises(ValueError, match=message):
        policies.run(request)


def test_a_policy_without_room_in_memory_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    request = policies.PoliciesRequest(
        tokens=(512,),
        policies=policies.budgeted(["Coverage", "SnapKV"], [256]),
        shape=Shape(num_q_heads=2, num_kv_heads=1, head_dim=32),
        chunk_tokens=64,
        rounds=1,
    )
    # Coverage compares all tokens with all: 4 MB, where three caches take .2 MB.
    monkeypatch.setattr("kvselect.bench.policies.free_bytes", lambda: 3_000_000)
    skipped: list[Any] = []
    rows = policies.run(request, on_skip=skipped.append)
    assert [row.policy for row in rows] == ["Dense", "SnapKV 256"]
    message = "policy: got Coverage 256, which needs 0.0 GB, allowed: 0.0 GB"
    assert [(skip.tokens, skip.contender) for skip in skipped] == [(512, "Coverage 256")]
    assert skipped[0].reason.startswith(message)
    with pytest.raises(ValueError, match=message):
        policies.run(request)
    monkeypatch.setattr("kvselect.bench.policies.free_bytes", lambda: 100_000)
    with pytest.raises(ValueError, match=r"tokens: got 512, which needs 0\.0 GB"):
        policies.run(request, on_skip=skipped.append)


def test_the_quickest_policy_of_a_mass() -> None:
    found = {"tokens": 9, "kept_mass": 0.5, "decode_ms": 1.0, "method": "Quest"}
    rows: Any = [
        SimpleNamespace(**found | {"policy": "a"}),
        SimpleNamespace(**found | {"policy": "b", "kept_mass": 0.9, "decode_ms": 2.0}),
        SimpleNamespace(**found | {"policy": "c", "kept_mass": None, "decode_ms": 0.1}),
        SimpleNamespace(**found | {"policy": "Dense", "kept_mass": 1.0, "decode_ms": 5.0}),
        SimpleNamespace(
            **found | {"policy": "d", "method": "AdaSpa", "kept_mass": 1.0}
        ),  # prefill only
    ]
    wins = policies.fastest(rows, [0.1, 0.6, 0.95])
    assert wins == [(9, 0.1, "a"), (9, 0.6, "b"), (9, 0.95, "Dense")]


def test_selection_cache(tmp_path: Path) -> None:
    rows = quick("selection_cache", tmp_path, *SIZES, "--tokens", "2k", "--hit-rate", "0.6")
    assert [(row["rho"], row["moving"]) for row in rows] == list(script("selection_cache").CASES)
    for row in rows:
        assert row["hit_rate"] == pytest.approx(0.6, abs=0.05)
        assert len(row["samples_with_ms"]) == len(row["samples_without_ms"]) == 20
        assert row["speed_up"] == pytest.approx(row["without_ms"] / row["with_ms"])
        loss = 100 * (row["kept_mass_without"] - row["kept_mass_with"])
        assert row["kept_mass_loss_points"] == pytest.approx(loss)
    losses = [row["kept_mass_loss_points"] for row in rows if not row["moving"]]
    assert losses[0] < losses[-1]  # faster drift at the same hits loses more


def test_hit_rates_between_none_and_all() -> None:
    module = script("selection_cache")
    for rate in ("0", "1"):
        with pytest.raises(ValueError, match=r"hit-rate: got \d\.0, allowed: between 0 and 1"):
            module.main(["--quick", *SIZES, "--hit-rate", rate])


@pytest.mark.parametrize("first", [1, 40])
@pytest.mark.parametrize("hit_rate", [0.2, 0.8])
def test_a_threshold_gives_the_hits_asked_for(hit_rate: float, first: int) -> None:
    module, generator = script("selection_cache"), torch.Generator().manual_seed(0)
    queries = [torch.randn(4, 16, generator=generator)]
    for _ in range(299):
        fresh = torch.randn(4, 16, generator=generator)
        queries.append(0.9 * queries[-1] + 0.19**0.5 * fresh)
    stacked = torch.stack(queries)
    threshold = module.threshold_for(stacked, 2, hit_rate, 8, first)
    hits = []
    for head in (slice(0, 2), slice(2, 4)):
        anchor = 0
        for step in range(1, 300):
            pair = torch.cosine_similarity(stacked[anchor, head], stacked[step, head], dim=-1)
            hit = float(pair.min()) >= threshold and step - anchor <= 8
            anchor = anchor if hit else step
            if step >= first:
                hits.append(hit)
    assert sum(hits) / len(hits) == pytest.approx(hit_rate, abs=0.02)


def test_a_wrong_step_stops_the_bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    module = script("selection_cache")
    real = module.decode_step

    def off(*arguments: Any, **more: Any) -> Any:
        out, info = real(*arguments, **more)
        return 1.01 * out, info

    monkeypatch.setattr(module, "decode_step", off)
    with pytest.raises(DisagreementError, match="without the cache"):
        module.main(["--quick", *SIZES, "--tokens", "2k", "--out", str(tmp_path / "x.json")])
    assert not (tmp_path / "x.json").exists()


# ---- the steady state


def test_steady_state(tmp_path: Path) -> None:
    (row,) = quick("steady_state", tmp_path, "--tokens", "1k", "--rounds", "1100")
    assert row["steps"] == 1100 and len(row["resident_bytes"]) == 4
    assert 0 < row["hit_rate"] < 1
    assert row["last_over_first"] == row["last_tenth_ms"] / row["first_tenth_ms"]
    assert row["bytes_per_step"] == row["grown_bytes"] / 1100


@pytest.mark.parametrize("option", ["--tokens", "--threads"])
def test_the_steady_state_is_of_one_size(option: str) -> None:
    with pytest.raises(ValueError, match=f"{option[2:]}: got '1,2', allowed: one count"):
        script("steady_state").main(["--quick", option, "1,2"])


# ---- the break-even, the overhead of a step


def test_break_even(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script("break_even")
    policy = TokenSelect(topk=256)
    found = crossovers.Crossover(
        machine=crossovers.machine_identity(),
        workload=crossovers.Workload.of(policy.to_dict(), 32, 8, 128, torch.bfloat16),
        tokens=200,
        extrapolated=False,
        points=(crossovers.Point(300, 2.0, 1.0, 0.01),),
        measured_at="2026-01-02T03:04:05+00:00",
        seconds=1.0,
    )
    monkeypatch.setattr(module.break_even, "crossover_for", lambda *_, **__: found)
    module.main(["--quick", "--out", str(tmp_path / "x.json")])
    content = load(tmp_path / "x.json")
    (tables,) = content["results"]
    steps = [(row["state"], row["tokens"], row["selects"]) for row in tables["steps"]]
    expected = [(state, n, n == 1024) for state in ("cold", "hot") for n in (16, 1024)]
    assert steps == expected
    assert crossovers.Crossover.from_dict(content["config"]["crossover"]) == found
    assert set(tables["parts_us"]) == {"1", "512"} and tables["prefill"] == []
    for row in tables["steps"]:
        assert row["rounds"] >= 9 and row["ratio_to_best_dense"] > 0


def test_step_overhead(tmp_path: Path) -> None:
    (tables,) = quick("step_overhead", tmp_path)
    assert set(tables) == {"dense 16", "select", "transformers"}
    for table in tables.values():
        for times in table.values():
            assert len(times["samples_us"]) == 3 and times["p20_us"] <= times["median_us"]


def test_attach_overhead(tmp_path: Path) -> None:
    module = script("attach_overhead")
    rows = quick("attach_overhead", tmp_path)
    parts = {part: [row for row in rows if row["part"] == part] for part in ("step", "writes")}
    stock, again, ours = parts["step"]
    assert [row["contender"] for row in parts["step"]] == [module.STOCK, module.AGAIN, module.DENSE]
    assert len(ours["samples_ms"]) == 3 and stock["met"] is again["met"] is None
    assert ours["met"] == (ours["times_stock"] <= module.ALLOWED)
    assert {row["tokens"] for row in rows if row["part"] == "generate"} == {256, 1024}
    assert {row["contender"] for row in rows if row["part"] == "append"} == set(module.LAYERS)
    (report,) = (row["report"] for row in rows if row["part"] == "report")
    assert report["policy"]["policy"] == "TokenSelect"
    # Of 1024 tokens and 129: what concatenating writes is known to the byte, and ours grew once.
    tokens, more, token_bytes = 1024, 129, 2 * 8 * 128 * 2
    for row in parts["writes"]:
        assert row["token_bytes"] == token_bytes and row["peak_bytes"] >= 0
        if row["contender"] == "DynamicLayer":
            assert row["bytes_per_token"] == token_bytes * (tokens + (more + 1) / 2)
        else:
            assert (
                token_bytes < row["bytes_per_token"] < token_bytes * 2 * 1.3 * tokens / more + 1e4
            )


@pytest.mark.parametrize("name", ["rounds", "new-tokens", "layers", "grown-tokens", "chunk"])
def test_attach_overhead_refuses(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: got 0, allowed: an int >= 1"):
        script("attach_overhead").main(["--quick", f"--{name}", "0"])


# ---- generate


def test_generate(tmp_path: Path) -> None:
    module = script("generate")
    rows = {row["contender"]: row for row in quick("generate", tmp_path, "--tokens", "1k")}
    assert set(rows) == {module.SDPA, module.OURS}
    ours, theirs = rows[module.OURS], rows[module.SDPA]
    assert (ours["new_tokens_timed"], theirs["new_tokens_timed"]) == (7, 2)
    assert theirs["over_sdpa"] == 1.0
    assert ours["over_sdpa"] == pytest.approx(theirs["median_ms"] / ours["median_ms"])
    assert {"linear layers", "append and sketch", "scan", "select", "attention"} <= set(
        ours["stages_ms"]
    )
    assert {"linear layers", "attention"} <= set(theirs["stages_ms"])
    assert ours["layers"] == 2 and ours["parameters"] > 0
    assert ours["report"] is not None and theirs["report"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "0"), "layers: got 0, allowed: an int >= 1"),
        (("--sdpa-tokens", "0"), "sdpa-tokens: got 0, allowed: an int >= 1"),
        (("--rounds", "1"), "rounds: got 1, allowed: an int >= 2"),
        (("--tokens", "1k,2k"), "tokens: got '1k,2k', allowed: one count"),
        (("--threads", "1,2"), "threads: got '1,2', allowed: one count"),
    ],
)
def test_generate_refuses(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        script("generate").main(["--quick", *arguments])


def test_generate_counts_its_memory_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvselect.bench.memory.free_bytes", lambda: 1 << 30)
    with pytest.raises(ValueError, match="layers: got 2 at 2048 tokens, which needs"):
        script("generate").main(["--quick"])


# ---- a whole model's step


def test_model_step(tmp_path: Path) -> None:
    rows = {row["contender"]: row for row in quick("model_step", tmp_path, "--batch", "2")}
    module = script("model_step")
    assert list(rows) == [module.SDPA, module.FUSED, module.OUR_DENSE, module.OURS]
    best = min(rows[name]["median_ms"] for name in (module.SDPA, module.FUSED))
    for row in rows.values():
        assert row["over_best_dense"] == pytest.approx(best / row["median_ms"])
        assert row["tokens_per_s"] == pytest.approx(2e3 / row["median_ms"])
        assert row["interleaved"] and row["layers"] == 2 and row["batch"] == 2
    assert rows[module.FUSED]["logits_error"] <= 1e-4
    assert rows[module.OUR_DENSE]["logits_error"] <= 1e-4
    assert 0 < rows[module.OURS]["kept_mass"] < 1 and rows[module.OUR_DENSE]["kept_mass"] is None
    weights = rows[module.SDPA]["parameters"] * 4
    assert rows[module.SDPA]["bytes_must_read"] == weights + 2 * 2 * 2 * 2 * 32 * 4 * 2048


def test_twins_share_their_weights() -> None:
    module = script("model_step")
    options = module.argparse.Namespace(
        q_heads=2, kv_heads=1, head_dim=32, layers=1, intermediate=64, vocabulary=32
    )
    model = module.random_model(module.config_of(options, 64), SHAPE)
    other = module.twin(model)
    assert other is not model and other.model.layers[0] is not model.model.layers[0]
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert module.num_parameters(options) == sum(
        weight.numel() for name, weight in model.named_parameters() if "norm" not in name
    )


def test_model_step_with_memory_for_one_cache_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("model_step")

    def enough_for_one(self: Any) -> int:
        return int((self.fixed_bytes + 1.5 * self.cache_bytes) / module.HEADROOM)

    monkeypatch.setattr(module.Bench, "free", enough_for_one)
    out = tmp_path / "x.json"
    module.main(["--quick", "--out", str(out)])
    rows = load(out)["results"]
    assert len(rows) == 4 and not any(row["interleaved"] for row in rows)


def test_model_step_counts_its_memory_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = script("model_step")
    monkeypatch.setattr(module, "free_bytes", lambda: 1 << 20)
    out = tmp_path / "x.json"
    module.main(["--quick", "--out", str(out)])
    content = load(out)
    assert content["results"] == [] and len(content["skipped"]) == 4
    assert "needs 0.3 GB, of 0.0 GB that are free" in capsys.readouterr().out


def test_model_step_reports_what_cannot_be_attached(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = script("model_step")

    def refuses(*_: object) -> object:
        raise ValueError("sparse_attention: got CUDA tensors, allowed: tensors on the CPU")

    monkeypatch.setattr(module.kvselect, "attach", refuses)
    out = tmp_path / "x.json"
    with pytest.raises(SystemExit, match="left out, and should not be: kvselect dense, kvselect T"):
        module.main(["--quick", "--out", str(out)])
    content = load(out)
    assert [row["contender"] for row in content["results"]] == [module.SDPA, module.FUSED]
    skipped = {one["contender"]: one["reason"] for one in content["skipped"]}
    assert skipped.keys() == {module.OUR_DENSE, module.OURS}
    assert skipped[module.OURS].startswith("ValueError: sparse_attention: got CUDA tensors")


def test_model_step_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend_gpu.install(monkeypatch)
    out = tmp_path / "x.json"
    script("model_step").main(["--quick", "--out", str(out)])
    rows = load(out)["results"]
    assert len(rows) == 4
    for row in rows:
        assert row["clock"] == "events" and row["not_captured"] == "" and row["wall_ms"] > 0
        assert row["tokens_per_s"] == pytest.approx(1e3 / row["wall_ms"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "0"), "layers: got 0, allowed: an int >= 1"),
        (("--vocabulary", "0"), "vocabulary: got 0, allowed: an int >= 1"),
        (("--tokens", "1k,2k"), "tokens: got '1k,2k', allowed: one count"),
        (("--device", "cuda:9"), "device: got 'cuda:9', allowed: cpu, or one of the 0 GPUs"),
    ],
)
def test_model_step_refuses(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=message):
        script("model_step").main(["--quick", *arguments])


# ---- targets


def result_files(folder: Path, shape: dict[str, object] | None = None) -> None:
    """Figures that meet some targets, miss one, and leave others open."""
    layer = shape or {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    over = {"torch SDPA, enable_gqa": 200.0, "torch SDPA, group folded": 21.0}
    step = {
        "contender": SELECT_INT4,
        "tokens": 131072,
        "threads": 1,
        "over": over | {"TokenSelect as torch ops": 9.0},
        "over_best_torch": 12.5,
        "over_perfect_dense": 3.0,
        "sketch_over_kv": 0.1328,
    }
    config = {"shape": layer, "topk": 2048}
    save(folder / "decode_step.json", "?", config, [step])
    options = {"q_heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "bfloat16", "topk": 256}
    steady = {"steps": 100_000, "last_over_first": 1.06, "bytes_per_step": 0.0}
    save(folder / "steady_state.json", "?", options, [steady])
    flat = {"q_heads": 32, "kv_heads": 8, "head_dim": 128, "dtype": "bfloat16", "topk": 2048}
    pair = [
        {"tokens": 131072, "threads": 1, "implementation": name, "median_ms": ms}
        for name, ms in (("avx2", 20.0), ("avx512", 9.0), ("avx512_bf16", 8.0))
    ]
    save(folder / "implementations.json", "?", flat, pair)
    scaling = [
        {"contender": SELECT_INT4, "tokens": tokens, "threads": 1, "median_ms": ms}
        for tokens, ms in ((1 << 18, 10.0), (1 << 20, 44.0))
    ]
    save(folder / "scaling.json", "?", config, scaling)


def verdicts(text: str) -> dict[str, list[str]]:
    """Cells of a Markdown table by their first."""
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {cells[0]: cells[1:] for cells in lines}


def test_targets_are_read_from_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result_files(tmp_path)
    script("targets").main(["--results", str(tmp_path), "--markdown"])
    text = capsys.readouterr().out
    found = verdicts(text)
    assert found["decode step 128K over torch's best, one thread"][:3] == [
        ">= 12.0x",
        "12.5x",
        "met",
    ]
    assert found["decode step 128K over SDPA folded, one thread"][1:3] == ["21.0x", "missed"]
    assert found["decode step 128K over SDPA enable_gqa, one thread"][1:3] == ["200.0x", "met"]
    assert found["decode step 128K over torch's best, two threads"][1] == "not measured"
    assert found["decode step 128K over TokenSelect as torch ops"][1:3] == ["9.0x", "met"]
    assert found["int4 sketch over bfloat16 keys and values"][1:3] == ["13.3%", "met"]
    assert found["speed of AVX2 over AVX-512"][1:3] == ["0.40x", "met"]
    assert found["1M tokens: time over linear from 256K"][:3] == ["<= 15%", "+10%", "met"]
    name = "100,000 steps: last tenth's time over the first's"
    assert found[name][:3] == ["<= 1.050", "1.060", "missed"]
    assert found[name][3] == "`python bench/steady_state.py`"
    assert "8 of 10 measured are met; 21 in all" in text


def test_figures_of_another_shape_do_not_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = {"num_q_heads": 8, "num_kv_heads": 8, "head_dim": 128, "dtype": "bfloat16"}
    result_files(tmp_path, shape)
    script("targets").main(["--results", str(tmp_path), "--markdown"])
    found = verdicts(capsys.readouterr().out)
    assert found["decode step 128K over torch's best, one thread"][1] == "not measured"
    assert found["speed of AVX2 over AVX-512"][1] == "0.40x"


def test_targets_without_files_and_of_several_commits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = script("targets")
    targets.main(["--results", str(tmp_path)])
    assert f"0 of 0 measured are met; {len(targets.TARGETS)} in all" in capsys.readouterr().out
    result_files(tmp_path)
    path = tmp_path / "scaling.json"
    path.write_text(json.dumps(load(path) | {"commit": "0123456789abcdef+"}), encoding="utf-8")
    targets.main(["--results", str(tmp_path)])
    assert "measured at several commits: 0123456789+, " in capsys.readouterr().out


def test_real_rows_hold_what_targets_ask_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names in targets.py are those that benches write: each figure is found in real rows."""
    targets = script("targets")
    tiny = (4, 2, 32, "float32", 64)
    sizes = (*SIZES, "--topk", "64", "--rounds", "1")
    for name, tokens in (
        ("decode_step", "1k,4k"),
        ("ops", "4k"),
        ("prefill_chunk", "4k"),
        ("scaling", "1k,2k,4k"),
        ("implementations", "4k"),
        ("selection_cache", "4k"),
    ):
        more = ("--threads", "1,2") if name == "decode_step" else ()
        if name == "selection_cache":
            more = ("--rounds", "20")
        quick(name, tmp_path, *sizes, "--tokens", tokens, *more)
    quick("generate", tmp_path, "--tokens", "1k")
    quick("steady_state", tmp_path, "--rounds", "1000")
    lengths = {1 << 20: 4096, 1 << 19: 2048, 1 << 18: 1024}
    lengths |= {1 << 17: 4096, 1 << 16: 1024, 1 << 15: 1024}
    real = targets.the_row

    def scaled(rows: list[dict[str, Any]], **criteria: Any) -> Any:
        if "tokens" in criteria:
            criteria["tokens"] = lengths[criteria["tokens"]]
        if "steps" in criteria:
            criteria["steps"] = 1000
        return real(rows, **criteria)

    monkeypatch.setattr(targets, "the_row", scaled)
    for target in targets.TARGETS:
        settings = {"generate": (4, 2, 64, "bfloat16", 256), "steady_state": targets.SMALL}
        own = dataclasses.replace(target, settings=settings.get(target.script, tiny))
        value, commit = targets.read(tmp_path, own)
        assert value is not None and commit, target.claim
    capsys.readouterr()


def test_quick_budgets_are_some_of_all() -> None:
    assert set(decode.QUICK_BUDGETS) < set(decode.BUDGETS)


def test_block_memory_stays_flat_on_the_device(tmp_path: Path) -> None:
    rows = quick("block_memory", tmp_path)
    assert [row["tokens"] for row in rows] == [2048] * 4 + [4096] * 4
    assert rows[0]["device_bytes"] == rows[4]["device_bytes"]
    assert rows[4]["host_bytes"] > 1.8 * rows[0]["host_bytes"]
    assert {(row["queries"], row["replacement"]) for row in rows[:4]} == {
        (queries, replacement)
        for queries in ("drift", "periodic")
        for replacement in ("lru", "lru_s")
    }
    assert all(0.5 < row["hit_rate"] <= 1 for row in rows if row["queries"] == "drift")
    assert all(row["fetched_bytes_per_step"] < row["listed_bytes_per_step"] for row in rows)
