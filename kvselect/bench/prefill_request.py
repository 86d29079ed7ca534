"""What a prefill bench is asked, what it answers, and what it refuses."""

from __future__ import annotations

from dataclasses import dataclass, field

from kvselect.bench.layer import Shape
from kvselect.bench.memory import free_device_bytes, require_cuda, require_memory
from kvselect.bench.request import check_sizes
from kvselect.bench.results import Timing
from kvselect.checks import require, require_int

__all__ = [
    "MASKED",
    "MATMUL",
    "NUM_SAMPLES",
    "QUESTION",
    "ROWS_AT_ONCE",
    "TORCH",
    "UNMASKED",
    "PrefillRequest",
    "PrefillRow",
    "check",
]

QUESTION = "How long does a prefill chunk take on a long context, selection included?"
MASKED = "torch SDPA, enable_gqa, causal mask"
UNMASKED = "torch SDPA, group folded, no mask"
MATMUL = "torch matmul-softmax-matmul"
TORCH = (MASKED, UNMASKED, MATMUL)
ROWS_AT_ONCE = 256  # queries of one matrix product: its logits stay a few hundred MB
NUM_SAMPLES = 24  # queries whose outputs and kept mass are computed in float32


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRequest:
    """What to measure.

    Parameters
    ----------
    tokens : tuple of int
        Context lengths, the chunk included.
    chunk_tokens : int
        Queries of the chunk.
    dense_kv_heads : int
        KV heads that dense contenders are timed on; all of them if there are no more, or with
        ``gpu_peers``.
    gpu_peers : bool
        Peers are those of a GPU, on whatever device; a GPU has no others.
    """

    tokens: tuple[int, ...]
    shape: Shape = field(default_factory=Shape)
    chunk_tokens: int = 2048
    topk: int = 2048
    threads: tuple[int, ...] = (1,)
    rounds: int = 3
    dense_kv_heads: int = 1
    gpu_peers: bool = False
    seed: int = 0

    @property
    def timed_kv_heads(self) -> int:
        """Of dense contenders."""
        heads = self.shape.num_kv_heads
        return heads if self.gpu_peers else min(self.dense_kv_heads, heads)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRow:
    """One contender at one length on one number of threads.

    Attributes
    ----------
    timed_kv_heads : int
        Of ``num_kv_heads``; times are of all heads, scaled from these.
    over : dict of name to float
        Time of each torch peer over this row's.
    over_best_sdpa, over_best_torch : float
        The same of the fastest form of SDPA, and of the fastest dense peer of all (on a GPU also of
        other packages). "group folded, no mask" attends to a few tokens too many, in favour of the
        peer.
    attended_tokens, kept_mass : float
        Per query and KV head; the mass on sampled queries, causal, in float32.
    stages_ms : dict
        Of contenders of kvselect, on a CPU; empty for others.
    attention : str or None
        The kernel that attended the lists, of contenders that select: "sparse_attention",
        "flash_attn" or "sdpa".
    expected_us, over_expected : float or None
        Of the step model (`kvselect.bench.expected`) at this run's bandwidth, and time over it;
        among a GPU's peers only.
    """

    tokens: int
    contender: str
    chunk_tokens: int
    timed_kv_heads: int
    num_kv_heads: int
    over: dict[str, float]
    over_best_sdpa: float
    over_best_torch: float
    attended_tokens: float
    kept_mass: float
    output_error: float
    gmac_per_s: float | None
    stages_ms: dict[str, float]
    timing: Timing
    attention: str | None = None
    expected_us: float | None = None
    over_expected: float | None = None


def check(request: PrefillRequest) -> None:
    """Refuse what cannot run, before anything is allocated.

    Raises
    ------
    ValueError, TypeError
        For sizes that do not fit each other or the free memory.
    """
    require_int(request.chunk_tokens, "chunk_tokens", 1)
    require_int(request.dense_kv_heads, "dense_kv_heads", 1)
    check_sizes(
        request.tokens,
        request.threads,
        topk=request.topk,
        rounds=request.rounds,
        shortest=request.chunk_tokens + 1,
    )
    shape, free = request.shape, None
    require(shape.batch == 1, "batch", shape.batch, "1 (a prefill chunk)")
    if shape.on_cuda:
        require_cuda(shape.device)
        require(request.threads == (1,), "threads", request.threads, "(1,) on a GPU")
        require(request.gpu_peers, "gpu_peers", request.gpu_peers, "True on a GPU")
        free = free_device_bytes(shape.device)
    for tokens in request.tokens:
        require_memory("tokens", tokens, needed_bytes(request, tokens), free)


def needed_bytes(request: PrefillRequest, tokens: int) -> int:
    """Memory at one length."""
    shape = request.shape
    heads = request.timed_kv_heads
    caches = shape.cache_bytes(tokens, "int4")
    samples = 8 * NUM_SAMPLES * shape.group_size * tokens + 8 * shape.head_dim * tokens
    scores = 4 * tokens * (request.chunk_tokens // 64 + 16) * shape.num_q_heads
    if request.gpu_peers:
        return caches + 4 * samples + scores + (1 << 30)
    caches += shape.cache_bytes(tokens, None) * heads // shape.num_kv_heads
    mask = 3 * request.chunk_tokens * tokens  # bool, and what torch makes of it
    mask += 8 * ROWS_AT_ONCE * heads * shape.group_size * tokens  # logits of one product
    return caches + mask + samples + scores + (1 << 30)
