"""Sizes that a bench runs in no time, for the tests of kvselect.bench."""

from __future__ import annotations

from kvselect.bench.layer import Shape

SHAPE = Shape(num_q_heads=4, num_kv_heads=2, head_dim=32, dtype="float32")
ROW_BYTES = 2 * 32 * 4  # keys of one token
# As command line options; topk 64 keeps 64 sinks + 512 recent tokens and the picked ones.
SIZES = ("--q-heads", "4", "--kv-heads", "2", "--head-dim", "32", "--dtype", "float32")
