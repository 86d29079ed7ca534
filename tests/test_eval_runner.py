"""The runner: paired questions on a prefilled cache, grades, honest counts, partial results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import config
from transformers import DynamicCache, LlamaForCausalLM

from kvselect import attach
from kvselect.eval import report, runner
from kvselect.eval.audit import Audit, audited
from kvselect.eval.checkpoint import Checkpoint
from kvselect.eval.results import Cell, Length, Results
from kvselect.eval.runner import Request
from kvselect.eval.session import Session, answer, share_weights
from kvselect.eval.tasks import TASKS, Question, dialect, dialect_sample
from kvselect.policies.dense import Dense
from kvselect.policies.streaming_llm import StreamingLLM
from kvselect.policies.token_select import TokenSelect


class DialectTokenizer:
    """As much of the embedded model's tokenizer as the runner uses."""

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [dialect.vocabulary()[index] for index in ids]


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    """A random model that speaks the dialect (and answers nonsense)."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config("llama", vocab_size=dialect.VOCAB_SIZE, eos_token_id=2)).eval()
    return Checkpoint("random", model, DialectTokenizer(), 512, True)


SELECT = TokenSelect(
    topk=16,
    num_sink_tokens=4,
    num_recent_tokens=32,
    q_block_size=32,
    sketch=None,
    overselect=1.0,
    positions="compact",
)
STREAM = StreamingLLM(num_sink_tokens=4, num_recent_tokens=48, q_block_size=32)


def request(**changes: Any) -> Request:
    settings: dict[str, Any] = {
        "tasks": (TASKS["niah_multikey"], TASKS["niah_multivalue"]),
        "lengths": (Length(label="x", tokens=150),),
        "policies": {"Dense": Dense(), "Stream": STREAM, "Select": SELECT},
        "samples": 14,
        "questions_per_context": 8,
        "timed_steps": 2,
    }
    return Request(**(settings | changes))


def test_every_policy_answers_the_same_questions(checkpoint: Checkpoint) -> None:
    progress: list[int] = []
    saved: list[int] = []
    wanted = request()
    results = runner.run(
        checkpoint,
        wanted,
        on_progress=lambda what, amount: progress.append(amount),
        on_cells=lambda partial: saved.append(len(partial.cells)),
    )
    assert results.complete and saved == [3, 6, 6]
    assert sum(progress) == runner.total_progress(wanted)
    assert [(cell.task, cell.policy) for cell in results.cells] == [
        (task, policy)
        for task in ("niah_multikey", "niah_multivalue")
        for policy in ("Dense", "Stream", "Select")
    ]
    assert all(len(cell.outcomes) == 14 for cell in results.cells)
    dense, stream, select = results.cells[:3]
    assert dense.kept_mass == 1.0 and dense.bytes_ratio == 1.0
    assert 140 < dense.tokens_attended <= 152
    assert stream.tokens_attended == select.tokens_attended == 52
    assert stream.kept_mass is not None and 0 < stream.kept_mass < 1
    assert select.kept_mass is not None and 0 < select.kept_mass < 1
    # StreamingLLM reads what it attends; scoring from the keys reads all of them besides.
    assert stream.bytes_ratio == pytest.approx(52 / dense.tokens_attended, rel=0.02)
    assert select.bytes_ratio == pytest.approx(stream.bytes_ratio + 0.5, rel=0.02)
    assert all(cell.decode_ms > 0 and cell.prefill_s > 0 for cell in results.cells)
    assert results.baseline == "Dense"
    # 3 layers, 2 KV heads, 32 channels, keys and values in float32, for 149 tokens at least.
    assert all(cell.cache_bytes >= 3 * 2 * 32 * 2 * 4 * 149 for cell in results.cells)


def test_a_run_is_the_same_twice_and_leaves_the_model_alone(checkpoint: Checkpoint) -> None:
    before = checkpoint.model(torch.arange(20)[None]).logits
    first, second = (runner.run(checkpoint, request()) for _ in range(2))
    for one, other in zip(first.cells, second.cells, strict=True):
        assert one.outcomes == other.outcomes
        assert one.kept_mass == other.kept_mass and one.bytes_ratio == other.bytes_ratio
    assert torch.equal(checkpoint.model(torch.arange(20)[None]).logits, before)


def test_views_share_weights_and_nothing_else(checkpoint: Checkpoint) -> None:
    view = share_weights(checkpoint.model)
    for own, other in zip(view.parameters(), checkpoint.model.parameters(), strict=True):
        assert own.data_ptr() == other.data_ptr()
    with attach(view, SELECT):
        assert checkpoint.model.config._attn_implementation != "kvselect"
        assert not checkpoint.model.model._forward_pre_hooks


@pytest.mark.parametrize("policy", [Dense(), STREAM, SELECT], ids=["dense", "stream", "select"])
def test_an_answer_is_what_greedy_generation_gives(checkpoint: Checkpoint, policy: Any) -> None:
    sample = dialect_sample(TASKS["niah_multikey"], 150, max_questions=4)
    context = torch.as_tensor(sample.context)
    with Session("x", share_weights(checkpoint.model), policy) as session:
        session.prefill(context)
        answers = [
            answer(session, question, context.device, stop=set())
            for question in (*sample.questions, sample.questions[0])
        ]
        assert answers[0] == answers[-1]  # the cache was cropped back after every question
        assert session.cache.get_seq_length() == len(context)
        for question, got in zip(sample.questions, answers, strict=False):
            cache = DynamicCache(config=session.model.config)
            session.model(context[None], past_key_values=cache)
            everything = torch.cat([context, torch.as_tensor(question.tokens)])[None]
            out = session.model.generate(
                everything,
                past_key_values=cache,
                max_new_tokens=len(question.answer),
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
            assert out[0, everything.shape[1] :].tolist() == got


def test_a_stop_token_ends_an_answer(checkpoint: Checkpoint) -> None:
    question = Question(dialect_sample(TASKS["chain"], 60).questions[0].tokens, ("a",) * 5, 5)
    with Session("x", share_weights(checkpoint.model), Dense()) as session:
        session.prefill(torch.arange(3, 40))
        free = answer(session, question, torch.device("cpu"), stop=set())
        assert len(free) == 5
        stopped = answer(session, question, torch.device("cpu"), stop={free[1]})
        assert stopped == free[: free.index(free[1]) + 1]


def test_max_contexts_ends_a_cell_early(checkpoint: Checkpoint) -> None:
    wanted = request(tasks=(TASKS["niah_single"],), samples=9, max_contexts=2)
    progress: list[int] = []
    results = runner.run(checkpoint, wanted, on_progress=lambda what, n: progress.append(n))
    assert {len(cell.outcomes) for cell in results.cells} == {2}
    assert sum(progress) == runner.total_progress(wanted)


def test_what_cannot_run_is_refused_before_anything_runs(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"chain at x: length: got \d+, allowed: an int >="):
        runner.check(
            checkpoint, request(tasks=(TASKS["chain"],), lengths=(Length(label="x", tokens=8),))
        )
    large = dataclasses.replace(SELECT, topk=4096)
    with pytest.raises(ValueError, match=r"wide: policy.capacity: got \d+, allowed: at most 2048"):
        runner.check(checkpoint, request(policies={"wide": large}))


def test_the_audit_changes_nothing_and_agrees_with_exact_scores(checkpoint: Checkpoint) -> None:
    """With exact keys, a policy's own kept mass is the audit's."""
    sample = dialect_sample(TASKS["vt"], 200)
    tokens = torch.as_tensor(sample.context)
    for positions in ("original", "compact"):
        policy = dataclasses.replace(SELECT, positions=positions)
        audit = Audit()
        logits = []
        for attached in (policy, audited(policy, audit)):
            view = share_weights(checkpoint.model)
            with attach(view, attached) as handle, torch.inference_mode():
                cache = DynamicCache(config=view.config)
                view(tokens[None, :-4], past_key_values=cache)
                for token in tokens[-4:]:
                    out = view(token[None, None], past_key_values=cache)
                logits.append(out.logits)
                own = [layer.decode["kept_mass"] for layer in handle.report().layers]
        assert torch.equal(*logits)
        known = [mass for mass in own if mass is not None]
        assert audit.recovered_mass == pytest.approx(sum(known) / len(known), rel=1e-4)


# ---- results


def results_of(policies: list[str], tasks: tuple[str, ...], right: float = 0.5) -> Results:
    lengths = (Length(label="1x", tokens=512), Length(label="4x", tokens=2048))
    results = Results(
        model="model",
        window_tokens=512,
        tasks=tasks,
        lengths=lengths,
        policies={policy: {"policy": policy} for policy in policies},
        baseline=policies[0],
        config={"samples": 10},
        environment={"commit": None},
    )
    for length in lengths:
        for task in tasks:
            for policy in policies:
                outcomes = tuple(index < 10 * right for index in range(10))
                results.cells.append(
                    Cell(
                        task=task,
                        length=length,
                        policy=policy,
                        outcomes=outcomes,
                        kept_mass=None if policy == "B" else 0.5,
                        tokens_attended=100.0,
                        bytes_ratio=0.25,
                        decode_ms=2.0,
                        prefill_s=1.0,
                        cache_bytes=2_500_000,
                    )
                )
    return results


def test_json_holds_everything_and_is_written_whole(tmp_path: Path) -> None:
    results = results_of(["A", "B"], ("vt",))
    path = tmp_path / "new" / "results.json"
    results.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]
    read = json.loads(path.read_text())
    assert read["complete"] is False and read["policies"]["B"] == {"policy": "B"}
    first, second = read["cells"][:2]
    assert first["difference_to_baseline"] is None and second["difference_to_baseline"] == 0.0
    assert second["outcomes"] == [1] * 5 + [0] * 5 and second["score"] == 0.5
    assert 0 < second["interval_95"][0] < 0.5 < second["interval_95"][1] < 1


def render(results: Results, width: int = 110) -> str:
    from rich.console import Console

    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report.table(results))
    return console.export_text()


def test_the_table_shows_scores_intervals_and_that_it_is_a_demonstration() -> None:
    text = render(results_of(["A", "B"], ("niah_single", "vt")))
    assert "single" in text and "50" in text and "24–76" in text
    assert "a demonstration; a claim needs 500" in " ".join(text.split())
    assert (
        "10 questions per task and length" in " ".join(text.split())
        and "25 %" in text
        and "2.5" in text
        and "–" in text
    )


def test_many_tasks_have_a_table_of_their_own() -> None:
    tasks = tuple(f"task_{n}" for n in range(8))
    text = render(results_of(["A", "B [x]"], tasks), width=100)
    assert "mean of" in text and "8 tasks" in text and "+0.0 to +0.0" in text
    assert "Score by task" in text and all(task in text for task in tasks)
    assert "B [x]" in text and max(map(len, text.splitlines())) <= 100


def test_the_selection_cache_is_counted(checkpoint: Checkpoint) -> None:
    """Answers of several words reuse lists; every list is a hit or a miss, on the device."""
    reusing = dataclasses.replace(SELECT, similarity_threshold=1e-9, similarity="flat")
    wanted = request(tasks=(TASKS["chain"],), policies={"Dense": Dense(), "Reuse": reusing})
    dense, reuse = runner.run(checkpoint, wanted).cells
    assert dense.hit_rate is None
    assert reuse.hit_rate is not None and 0.3 < reuse.hit_rate <= 1.0


def test_masses_of_heads_average_to_the_mass(checkpoint: Checkpoint) -> None:
    results = runner.run(checkpoint, request(tasks=(TASKS["vt"],)))
    assert results.layers == (0, 1, 2)
    for cell in results.cells:
        assert [len(heads) for heads in cell.mass_by_head] == [2, 2, 2]
        mean = sum(map(sum, cell.mass_by_head)) / 6
        assert cell.kept_mass == pytest.approx(mean)
    assert results.cells[0].mass_by_head == ((1.0, 1.0),) * 3
    assert len({mass for heads in results.cells[2].mass_by_head for mass in heads}) == 6
