"""A transformers cache layer of fixed room, for steps that are compiled or captured once."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from kvselect.checks import require
from kvselect.fixed_cache import FixedKVCache
from kvselect.integrations.hf.attached_layer import AttachedLayer, RopeState
from kvselect.integrations.hf.head_dims import filled_up, require_head_dim
from kvselect.policies.captured_statistics import CapturedStatistics

if TYPE_CHECKING:
    from kvselect.integrations.hf.plan import LayerPlan


class KVSelectStaticLayer(AttachedLayer, StaticLayer):
    """One layer's keys and values in a `FixedKVCache`.

    Decode steps run through ops alone: every shape is fixed, lengths lie on the device. Calls with
    more queries read the lengths once and are not for compiled regions.

    Parameters
    ----------
    max_cache_len : int
        Tokens per row.
    sketch : {"int4", "int8", None}
        Format of the scoring keys that the cache keeps.
    """

    def __init__(self, max_cache_len: int, sketch: str | None = None) -> None:
        super().__init__(max_cache_len)
        self.sketch = sketch
        self.cache: FixedKVCache | None = None
        self._captured: dict[int, CapturedStatistics] = {}
        self._starts: Tensor | None = None

    def __repr__(self) -> str:
        return f"KVSelectStaticLayer({self.max_cache_len}, sketch={self.sketch!r})"

    def announce(self, rope_state: RopeState, sketch: str | None, starts: Tensor | None) -> None:
        """As `AttachedLayer`.

        Raises
        ------
        ValueError
            If a filled layer has another sketch than the policy wants.
        """
        super().announce(rope_state, sketch, starts)
        self._starts = starts
        if self.cache is None:
            self.sketch = sketch
        allowed = f"{self.sketch!r}, which this static cache was made with"
        require(sketch is None or sketch == self.sketch, "sketch", sketch, allowed)

    def __deepcopy__(self, memo: dict[int, Any]) -> KVSelectStaticLayer:
        """A copy whose policies remember nothing: captured steps write to tensors of this one."""
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in self.__dict__.items():
            setattr(made, name, {} if name == "_states" else copy.deepcopy(value, memo))
        return made

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for keys and values like the first ones, ``[batch, heads, n, head_dim]``.

        Raises
        ------
        ValueError
            Inside torch.compile: captured steps must find their tensors.
        """
        _require_eager()
        head_dim = require_head_dim(key_states, value_states)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        with torch.inference_mode(False):  # changed in place by calls of any grad mode
            self.cache = FixedKVCache(
                self.batch_size,
                self.num_heads,
                head_dim,
                capacity=self.max_cache_len,
                dtype=self.dtype,
                device=self.device,
                sketch=self.sketch,
            )
            self.cumulative_length = torch.zeros((), dtype=torch.int64, device=self.device)
        self.keys, self.values = self._shown()
        for tensor in (*self.cache.tensors(), self.cumulative_length):
            torch._dynamo.mark_static_address(tensor)
        self.is_initialized = True

    def captured(self, plan: LayerPlan) -> CapturedStatistics:
        """Counts of decode steps of the attention layer of ``plan``, made at its first eager call.

        Raises
        ------
        ValueError
            Inside torch.compile, if there was none.
        """
        if plan.serial not in self._captured:
            _require_eager()
            assert self.cache is not None
            with torch.inference_mode(False):
                self._captured[plan.serial] = CapturedStatistics(self.cache)
            for tensor in self._captured[plan.serial].tensors():
                torch._dynamo.mark_static_address(tensor)
        return self._captured[plan.serial]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append ``[batch, heads, n, head_dim]``; return views of the whole room, so laid out."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        cache = self.cache
        assert cache is not None
        if not torch.compiler.is_compiling():
            self._take_announced()
            starts, self._starts = self._starts, None
            if starts is not None and key_states.shape[2] > 1:
                cache.set_starts(starts)
        if key_states.requires_grad or value_states.requires_grad:  # our ops have no gradient
            key_states, value_states = key_states.detach(), value_states.detach()
        k, v = (filled_up(x, cache.head_dim) for x in (key_states, value_states))
        cache.append(k.transpose(1, 2), v.transpose(1, 2))
        self.cumulative_length.add_(key_states.shape[2])
        return self._shown()

    def get_seq_length(self) -> Any:
        """Tokens stored (padding included), a device tensor; 0 before the first."""
        return self.cumulative_length if self.is_initialized else 0

    @property
    def is_filled(self) -> bool:
        """Whether anything was appended since the last reset: how much, only the device knows."""
        return self.rope_state is not None

    def reset(self) -> None:
        """Forget all tokens, in place: the cache object may be used again."""
        if self.cache is not None:
            self.cache.reset()
            self.cumulative_length.zero_()
        self._forget()
        for kept in self._states.values():
            kept.state.invalidate()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows become ``rows[beam_idx]``."""
        if self.cache is not None:
            self.cache.reorder(beam_idx)
            if self.validity is not None:
                self.validity = self.validity.index_select(0, beam_idx.to(self.validity.device))

    def _shown(self) -> tuple[Tensor, Tensor]:
        assert self.cache is not None
        pages = zip((self.cache.k_pages, self.cache.v_pages), (self.k_head_dim, self.v_head_dim))
        keys, values = (
            page.transpose(1, 2)[:, :, : self.max_cache_len, :head_dim] for page, head_dim in pages
        )
        return keys, values


def _require_eager() -> None:
    allowed = "an eager first call (generate prefills eagerly)"
    compiling = torch.compiler.is_compiling()
    require(not compiling, "static cache", "a first call inside torch.compile", allowed)
