"""lm-evaluation-harness on an attached model: docs/lm-eval.md, run as it stands there.

Needs the packages of the extra "lm-eval", which `make test` does not install.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from kvselect import TokenSelect, attach
from kvselect.eval.checkpoint import embedded_model_path, load_checkpoint

lm_eval = pytest.importorskip("lm_eval")

PAGE = Path(__file__).resolve().parent.parent / "docs" / "lm-eval.md"
# Every token is listed, so answers must be the stock model's.
LISTING = {"topk": 16, "num_sink_tokens": 4, "num_recent_tokens": 128, "overselect": 200.0}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")


def answers(checkpoint: Any, task: str) -> list[Any]:
    from lm_eval.models.huggingface import HFLM

    model = HFLM(
        pretrained=checkpoint.model, tokenizer=checkpoint.tokenizer, batch_size=2, max_length=2048
    )
    result = lm_eval.simple_evaluate(
        model=model,
        tasks=[task],
        limit=2,
        metadata={"tokenizer": str(embedded_model_path()), "max_seq_lengths": [1024]},
        bootstrap_iters=0,
        gen_kwargs={"max_gen_toks": 6},
        log_samples=True,
    )
    return [sample["resps"] for sample in result["samples"][task]]


def test_a_ruler_task_runs_offline_on_an_attached_model() -> None:
    checkpoint = load_checkpoint("embedded")
    expected = answers(checkpoint, "niah_single_1")
    with attach(checkpoint.model, TokenSelect(**LISTING, q_block_size=32, max_age=1)) as handle:
        assert answers(checkpoint, "niah_single_1") == expected
        decode = handle.report().layers[0].decode
    assert decode["num_calls"] > decode["num_dense_calls"]
    with attach(checkpoint.model, TokenSelect(topk=64, num_recent_tokens=128, max_age=1)) as handle:
        assert len(answers(checkpoint, "niah_single_1")) == 2
        assert handle.report().layers[0].decode["kept_mass"] < 1


def test_the_page_is_code_that_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    code = code.replace('"/models/llama-3.2-1b"', "str(embedded_model_path())")
    code = code.replace("[16384]", "[1024]").replace("limit=100", "limit=1")
    assert "embedded_model_path" in code and "[1024]" in code and "limit=1," in code
    names: dict[str, Any] = {"embedded_model_path": embedded_model_path}
    exec(compile(code, str(PAGE), "exec"), names)
    assert "niah_single_1" in names["results"]["results"]
    assert not names["handle"].attached
