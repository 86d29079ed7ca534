"""One rank of a tensor-parallel run, started by torchrun from test_hf_distributed.py.

Arguments: folder of the model, scope, positions. Writes what it generated to ``rank<n>.pt`` there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import hf_models
import torch
from transformers import AutoModelForCausalLM

from kvselect import (
    ActQKV,
    AdaSpa,
    Dilated,
    InfLLM,
    Landmark,
    Policy,
    SnapKV,
    SpAtten,
    TokenSelect,
    attach,
)

GREEDY: dict[str, Any] = {
    "max_new_tokens": 10,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}

JOINING: tuple[Policy, ...] = (
    InfLLM(topk_blocks=2, block_size=4, num_recent_tokens=8, q_block_size=16),
    SpAtten(num_recent_tokens=8, q_block_size=16),
    SpAtten(cascade="hard", num_recent_tokens=8, q_block_size=16),
    Dilated(inner=hf_models.narrow(scope="layer")),
)
"""Whose heads decide together, in every layer."""
ALONE: tuple[Policy, ...] = (
    ActQKV(scope="kv_head"),
    AdaSpa(),
    Landmark(scope="layer"),
    SnapKV(budgets="layer"),
    TokenSelect(layer_budget="entropy_pool"),
)
"""Who need all heads in one process."""


def generate(model: Any, scope: str, positions: str) -> dict[str, Any]:
    """Tokens through lists that hold everything, and through lists that leave tokens out."""
    ids, mask = hf_models.left_padded((70, 55), 70)
    result = {"stock": model.generate(ids, attention_mask=mask, **GREEDY)}
    for form in ("listing", "narrow"):
        with attach(model, getattr(hf_models, form)(positions, scope=scope)) as handle:
            result[form] = model.generate(ids, attention_mask=mask, **GREEDY)
            layer = handle.report().layers[0]
        result[f"{form} steps"] = layer.decode["num_calls"] - layer.decode["num_dense_calls"]
        result[f"{form} mass"] = layer.decode["kept_mass"]
    if scope == "layer":
        for policy in JOINING:
            with attach(model, policy):
                result[repr(policy)] = model.generate(ids, attention_mask=mask, **GREEDY)
    ids, mask = hf_models.left_padded((300, 270), 300)
    policy = TokenSelect(
        topk=32, num_sink_tokens=4, num_recent_tokens=128, scope=scope, positions=positions
    )
    for form, options in (("resident", {}), ("kept on cpu", {"keep": "cpu"})):
        with attach(model, policy, **options):
            result[form] = model.generate(ids, attention_mask=mask, **GREEDY)
    return result


def refusals(model: Any) -> list[str]:
    messages = []
    remembering = ({"similarity_threshold": 0.9}, {"num_segments": 4})
    for policy in (*(hf_models.narrow(scope="layer", **x) for x in remembering), *ALONE):
        try:
            attach(model, policy)
        except ValueError as error:
            messages.append(str(error))
    return messages


if __name__ == "__main__":
    os.environ["KVSELECT_BREAK_EVEN"] = "off"
    folder, scope, positions = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    sharded = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    with attach(sharded, hf_models.narrow()) as handle:
        seen = handle._plan.layers[0].num_q_heads
    found = {"heads": seen, **generate(sharded, scope, positions), "refused": refusals(sharded)}
    torch.save(found, folder / f"rank{os.environ['RANK']}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
