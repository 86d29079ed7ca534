"""StackState: what the layers of one stack share, in a forward pass and from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

from torch import Tensor

from kvselect.cache import KVCache
from kvselect.queries import Queries

__all__ = ["RowState", "StackState"]


class RowState(Protocol):
    """Something remembered per row that outlives a forward pass."""

    def take_rows(self, rows: Tensor) -> None:
        """Rows became ``rows[...]``, int64 [new_batch]."""

    def crop(self, num_real_tokens: tuple[int, ...]) -> None:
        """Of each row only the first tokens are left, padding excluded."""


_Rows = TypeVar("_Rows", bound=RowState)
_Value = TypeVar("_Value")
_PassKey = tuple[object, ...]


class StackState:
    """Shared by the states of the layers of one stack on one set of rows; never by two caches.

    `Policy.new_states` makes it for functional calls. An attached model's layers find it through
    the cache that they write to: two generations side by side have one each, a copy of a cache has
    a copy, and it goes with the last of its rows.

    Parameters
    ----------
    num_layers : int
        Layers that select, in the order in which they run.
    settings : Policy or None
        Whose: under another one everything is void.

    Notes
    -----
    What outlives a pass (`rows`) follows crops and new orders of the rows, which happen to the
    caches of all layers alike: the cache of the layer that came first is asked. Anything else that
    happens to it voids everything. What flows down a pass (`carry`, `carried`) is known by the
    tokens that the pass is about, so that nothing left behind by another pass is ever read.
    """

    def __init__(self, num_layers: int, settings: object = None) -> None:
        self.num_layers = num_layers
        self.settings = settings
        self._rows: dict[str, RowState] = {}
        self._carried: dict[str, dict[_PassKey, tuple[int, object]]] = {}
        self._tokens: tuple[object, ...] = ()  # of the pass that `_carried` belongs to
        self._anchor: KVCache | None = None
        self._anchor_layer = 0
        self._version = 0

    def follow(self, layer: int, cache: KVCache) -> None:
        """Before a layer uses any of it, after its append."""
        anchor = self._anchor
        if anchor is None or (layer == self._anchor_layer and cache is not anchor):
            self.clear()
            self._anchor = anchor = cache
            self._anchor_layer, self._version = layer, cache.version
        elif anchor.version != self._version:
            changes = anchor.changes_since(self._version)
            if changes is None:
                self._rows.clear()
            for change in changes or ():
                for state in self._rows.values():
                    if change.rows is not None:
                        state.take_rows(change.rows)
                    state.crop(change.num_real_tokens)
            self._carried.clear()
            self._version = anchor.version
        tokens = (cache.lengths, cache.num_real_tokens)
        if tokens != self._tokens:
            self._carried.clear()
            self._tokens = tokens

    def serve(self, settings: object) -> None:
        """Belong to this policy from now on."""
        if self.settings != settings:
            self.clear()
            self.settings = settings

    @property
    def nbytes(self) -> int:
        """A layer's share of the memory of what is remembered."""
        total = sum(getattr(state, "nbytes", 0) for state in self._rows.values())
        return total // max(self.num_layers, 1)

    def clear(self) -> None:
        """Forget everything."""
        self._rows.clear()
        self._carried.clear()
        self._anchor = None

    def rows(self, name: str, make: Callable[[], _Rows]) -> _Rows:
        """What a plug of this name remembers of the rows, made at its first use."""
        if name not in self._rows:
            self._rows[name] = make()
        return cast(_Rows, self._rows[name])

    def carry(self, name: str, layer: int, queries: Queries, value: object) -> None:
        """Hand ``value`` to the layers below for the same queries."""
        self._carried.setdefault(name, {})[_pass_key(queries)] = (layer, value)

    def carried(
        self, name: str, layer: int, queries: Queries, first: Callable[[], _Value]
    ) -> _Value:
        """What the last layer above handed down for these queries; ``first()``: there was none."""
        found = self._carried.get(name, {}).get(_pass_key(queries))
        if found is None or found[0] >= layer:  # a pass over the same tokens once more
            return first()
        return cast(_Value, found[1])


def _pass_key(queries: Queries) -> _PassKey:
    return queries.num_later_tokens, queries.offsets
