"""What policies that pick whole blocks share: statistics that follow the cache, sinks, a window."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kvselect.block_statistics import BlockStatistics
from kvselect.cache import KVCache
from kvselect.checks import require_int
from kvselect.crossovers import Crossover
from kvselect.engine_block_statistics import EngineBlockStatistics
from kvselect.engine_cache import EngineKVCache
from kvselect.fixed_cache import FixedKVCache
from kvselect.policies.base import Policy, PolicyState, require_listed_reads
from kvselect.policies.budgets import share_out
from kvselect.policies.token_settings import require_layers
from kvselect.queries import Phase
from kvselect.rope import Rope

__all__ = ["BlockPolicy", "BlockState", "WindowedBlocks", "share_out_blocks"]


_MIN_BLOCK, _MAX_RECENT = 16, 512


def share_out_blocks(budget: int, largest: int) -> dict[str, Any]:
    """Settings of `WindowedBlocks` that attend to at most ``budget`` tokens, two blocks less at
    least.

    Blocks hold a 32nd of the budget, a power of two from 16 to ``largest``; a quarter of it is the
    window (at most 512 tokens), and sinks are what other methods have, in whole blocks.
    """
    sinks = share_out(budget).num_sink_tokens
    size = min(max(1 << (budget // 32).bit_length() - 1, _MIN_BLOCK), largest)
    recent = min(_MAX_RECENT, budget // 4)
    picked = (budget - -(-sinks // size) * size - recent - (size - 1)) // size
    return {
        "topk_blocks": picked,
        "block_size": size,
        "num_sink_tokens": sinks,
        "num_recent_tokens": recent,
        "q_block_size": 64,
    }


@dataclass(slots=True, eq=False)
class BlockState(PolicyState):
    """`PolicyState` and what stands for the keys of each block."""

    blocks: BlockStatistics = field(default_factory=lambda: BlockStatistics(1))

    def take_over(self, before: PolicyState) -> None:
        if isinstance(before, BlockState):
            self.blocks = before.blocks

    @property
    def scored_nbytes(self) -> int:
        return self.blocks.scored_nbytes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPolicy(Policy):
    """A policy that says which statistics it wants of its blocks."""

    def new_statistics(self) -> BlockStatistics:
        """Statistics of no tokens."""
        raise NotImplementedError

    def new_state(
        self, cache: KVCache, crossovers: Mapping[int, Crossover] | None = None
    ) -> BlockState:
        if cache.keep is not None:
            require_listed_reads(self)
        blocks = self.new_statistics()
        if isinstance(cache, EngineKVCache):
            blocks = EngineBlockStatistics(blocks.block_size, blocks.kinds, cache)
        return BlockState(self, crossovers=crossovers, blocks=blocks)

    def extra_bytes(
        self, num_tokens: int, *, num_q_heads: int, num_kv_heads: int, head_dim: int, itemsize: int
    ) -> tuple[int, int]:
        blocks = self.new_statistics()
        return blocks.bytes_of(num_tokens, num_kv_heads, head_dim, itemsize), 0

    def prepare_capture(
        self, state: PolicyState, cache: FixedKVCache, num_q_heads: int, rope: Rope | None
    ) -> list[Tensor]:
        assert isinstance(state, BlockState)
        known = state.blocks.tensors()
        state.blocks.prepare(cache)
        return [] if known else state.blocks.tensors()

    def update(self, state: PolicyState, cache: KVCache) -> None:
        assert isinstance(state, BlockState)
        state.blocks.follow(cache)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowedBlocks(BlockPolicy):
    """Sinks, the ``topk_blocks`` best blocks, and a window, all in whole blocks."""

    # Every method declares fields of these names.
    @property
    def topk_blocks(self) -> int:
        raise NotImplementedError

    @property
    def block_size(self) -> int:
        raise NotImplementedError

    @property
    def num_sink_tokens(self) -> int:
        raise NotImplementedError

    @property
    def num_recent_tokens(self) -> int:
        raise NotImplementedError

    def require_counts(self) -> None:
        """TypeError, ValueError unless the counts of tokens, blocks and layers are some."""
        for name in ("topk_blocks", "block_size", "num_recent_tokens", "chunk_size"):
            require_int(getattr(self, name), name, 1)
        require_int(self.q_block_size, "q_block_size", 1)
        require_int(self.num_sink_tokens, "num_sink_tokens", 0)
        require_layers(self.dense_layers)

    @property
    def most_blocks(self) -> int:
        """Most blocks that one list picks."""
        return self.topk_blocks

    @property
    def num_sink_blocks(self) -> int:
        """Blocks with a sink in them."""
        return -(-self.num_sink_tokens // self.block_size)

    @property
    def capacity(self) -> int:
        """Sinks, picked blocks, and the window of a query block, in whole blocks."""
        longest = self.num_recent_tokens + self.q_block_size
        window = (longest + self.block_size - 2) // self.block_size + 1
        return (self.num_sink_blocks + self.most_blocks + window) * self.block_size

    @property
    def reads_unlisted(self) -> str | None:
        if self.num_recent_tokens + self.num_margin_tokens < self.block_size:
            return "num_recent_tokens < block_size: the last block outgrows the window"
        return None

    def new_state(
        self, cache: KVCache, crossovers: Mapping[int, Crossover] | None = None
    ) -> BlockState:
        num_recent_tokens = self.num_recent_tokens + self.num_margin_tokens
        cache.require_window(self.num_sink_tokens, num_recent_tokens)
        return super(WindowedBlocks, self).new_state(cache, crossovers)

    def is_dense(self, phase: Phase, begin: int, end: int, rope: Rope | None) -> bool:
        before_window = (end if phase == "decode" else begin) - self.num_recent_tokens
        candidates = max(before_window, 0) // self.block_size
        return candidates <= self.num_sink_blocks + self.topk_blocks
