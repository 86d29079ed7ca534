"""Two nodes, each a launcher of its own, over loopback: one server whose heads are split."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from test_vllm_server import wait_for
from vllm_engine import NEW_TOKENS, SMALL, attached, prompts

import kvselect
from kvselect.eval.checkpoint import embedded_model_path

ROOM = 2176


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()


def test_two_nodes_equal_one(tmp_path: Path) -> None:
    """Scope "layer": the ranks add their votes over the network."""
    import openai

    policy = kvselect.TokenSelect(**SMALL, scope="layer", positions="compact")
    port, rendezvous = free_port(), free_port()
    command = [sys.executable, str(Path(__file__).with_name("vllm_command.py")), "serve"]
    command += [str(embedded_model_path()), "--served-model-name", "embedded", "--dtype", "float32"]
    command += ["--enforce-eager", "--max-model-len", str(ROOM), "--max-num-batched-tokens", "4096"]
    command += ["--hf-overrides", json.dumps({"max_position_embeddings": ROOM})]
    command += ["--tensor-parallel-size", "2", "--distributed-executor-backend", "mp"]
    command += ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", str(rendezvous)]
    asked = prompts()
    with ExitStack() as running:
        for rank, options in (
            (1, ["--headless"]),
            (0, ["--host", "127.0.0.1", "--port", str(port)]),
        ):
            environ = os.environ | {
                "KVSELECT_VLLM_POLICY": json.dumps(policy.to_dict()),
                "KVSELECT_BREAK_EVEN": "off",
                "VLLM_CPU_OMP_THREADS_BIND": str(rank),
                "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
            }
            log = tmp_path / f"node{rank}"
            out = running.enter_context(log.open("w"))
            process = subprocess.Popen(
                [*command, "--node-rank", str(rank), *options],
                env=environ,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            running.callback(stop, process)
        wait_for(f"http://127.0.0.1:{port}", process, log)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")

        def ask(prompt: list[int]) -> list[int]:
            out = client.completions.create(
                model="embedded",
                prompt=prompt,
                max_tokens=NEW_TOKENS,
                temperature=0.0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            return list(out.choices[0].token_ids)  # type: ignore[attr-defined]

        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(ask, asked))
    assert got == attached(policy, asked)
