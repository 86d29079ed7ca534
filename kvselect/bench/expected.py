"""The step model: what a decode step should take on a GPU, before anybody measured it.

``microseconds = bytes / copy bandwidth + fixed``. Bytes are those of a method's own plan; the fixed
times are a model's, of nodes that follow each other: weigh 4, vote (which counts for the border) 3,
border and write 3, attention with the memset of its tickets and its merge 6. That is six nodes,
where lists may be reused too; a hit is modelled as a decision and attention alone. At 4.3 TB/s
(copy, H200) they give a dense step of 135 us at 128K tokens.
"""

from __future__ import annotations

from kvselect.bench.layer import Shape
from kvselect.checks import require_choice

__all__ = [
    "DESIGNS",
    "H200_COPY_GB_PER_S",
    "design_bytes",
    "expected_chunk_us",
    "expected_us",
]

H200_COPY_GB_PER_S = 4300.0
# Microseconds that bytes do not explain.
DESIGNS = {"dense": 10.0, "exact": 16.0, "int4": 16.0, "int8": 16.0, "hit": 6.5}
ATTENTION_TFLOP_PER_S = 650.0  # of a dense kernel on an H200, long sequences
CHUNK_FIXED_US = 20.0 + 8.0  # votes and lists; compaction
LOGIT_BYTES = 2  # stored once and read once per query head and scanned token, but for a hit


def design_bytes(design: str, shape: Shape, tokens: int, listed: float) -> float:
    """Bytes that one step of all rows moves.

    Parameters
    ----------
    design : one of `DESIGNS`
    tokens, listed : int, float
        Of one row: cached, and attended to per KV head.
    """
    require_choice(design, "design", tuple(DESIGNS))
    attended = tokens if design == "dense" else listed
    num_bytes = 2.0 * shape.row_bytes * attended
    if design in ("exact", "int4", "int8"):
        sketch = None if design == "exact" else design
        num_bytes += tokens * (shape.sketch_bytes(sketch) + 2 * LOGIT_BYTES * shape.num_q_heads)
    return shape.batch * num_bytes


def expected_us(
    design: str,
    shape: Shape,
    tokens: int,
    listed: float,
    gb_per_s: float = H200_COPY_GB_PER_S,
    hit_share: float = 0.0,
) -> float:
    """Microseconds of one step of one layer; ``hit_share`` of them reuse their list."""
    us = design_bytes(design, shape, tokens, listed) / gb_per_s / 1e3 + DESIGNS[design]
    if hit_share == 0.0:
        return us
    return (1 - hit_share) * us + hit_share * expected_us("hit", shape, tokens, listed, gb_per_s)


def expected_chunk_us(
    shape: Shape,
    tokens: int,
    chunk_tokens: int,
    listed: float | None,
    gb_per_s: float = H200_COPY_GB_PER_S,
) -> float:
    """Microseconds of a prefill chunk of one layer at the end of ``tokens``.

    Dense (``listed`` None): its products at 650 TFLOP/s. With selection: one scan of the int4
    sketch, lists and compaction, and the products with what each query lists.
    """
    if listed is None:
        pairs = chunk_tokens * (tokens - (chunk_tokens - 1) / 2)
    else:
        pairs = chunk_tokens * listed
    flops = 4.0 * pairs * shape.num_q_heads * shape.head_dim
    us = flops / ATTENTION_TFLOP_PER_S / 1e6
    if listed is None:
        return us
    return us + shape.sketch_bytes("int4") * tokens / gb_per_s / 1e3 + CHUNK_FIXED_US
