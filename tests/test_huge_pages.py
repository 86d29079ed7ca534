"""Large caches and sketches ask for huge pages, small ones do not, and advice never fails."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch

from kvselect import KVCache
from kvselect.storage import zeros_in_huge_pages

HUGE_PAGE = 2 << 20
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ADVISED = "hg"  # the flag of advised memory in smaps


def flags_of(address: int) -> list[str]:
    """VmFlags of the mapping that holds ``address``; how many huge pages it got is not ours."""
    inside = False
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        first, _, rest = line.partition(" ")
        if "-" in first and not first.endswith(":"):
            begin, end = (int(part, 16) for part in first.split("-"))
            inside = begin <= address < end
        elif inside and first == "VmFlags:":
            return rest.split()
    return []


needs_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux only")
needs_huge_pages = pytest.mark.skipif(
    not SWITCH.exists() or "[never]" in SWITCH.read_text(), reason="no transparent huge pages here"
)


@needs_linux
@needs_huge_pages
def test_a_large_store_is_advised_before_it_is_touched() -> None:
    store = zeros_in_huge_pages(torch.empty(0), (16, HUGE_PAGE // 4))
    flags = flags_of(store.data_ptr() + store.nbytes // 2)
    if not flags:
        pytest.skip("/proc/self/smaps lists no VmFlags here")
    assert ADVISED in flags
    assert not store.any()


@needs_linux
@needs_huge_pages
@pytest.mark.parametrize("page_block_size", [None, 64])
def test_keys_values_and_sketch_of_a_long_cache_are_advised(page_block_size: int | None) -> None:
    cache = KVCache(1, 8, 64, sketch="int8", page_block_size=page_block_size)
    tokens = torch.ones(1, 24 << 10, 8, 64)
    cache.append(tokens, tokens)
    assert cache.sketch_data is not None
    stores = [cache.k_pages, cache.v_pages, cache.sketch_data]
    flags = [flags_of(store.data_ptr() + (4 << 20)) for store in stores]
    if not all(flags):
        pytest.skip("/proc/self/smaps lists no VmFlags here")
    assert all(ADVISED in of_store for of_store in flags)
    assert torch.equal(cache.k, tokens) and torch.equal(cache.v, tokens)


def test_small_and_empty_memory_is_left_alone() -> None:
    assert zeros_in_huge_pages(torch.empty(0), (0,)).shape == (0,)
    assert torch.equal(zeros_in_huge_pages(torch.ones(1).half(), (3, 5)), torch.zeros(3, 5).half())


@pytest.mark.parametrize("page_block_size", [None, 16])
def test_caches_of_fake_tensors_ask_for_nothing(
    page_block_size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    asked: list[int] = []
    monkeypatch.setattr(
        torch.ops.kvselect, "advise_huge_pages", lambda address, size: asked.append(size)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns once in a process: hence `asked` too
        with FakeTensorMode():
            cache = KVCache(1, 8, 64, capacity=24 << 10, page_block_size=page_block_size)
    assert isinstance(cache.k_pages, FakeTensor) and cache.capacity >= 24 << 10
    assert asked == []


def test_errors_of_the_advice_are_ignored() -> None:
    torch.ops.kvselect.advise_huge_pages(0, 64 << 20)  # nothing is mapped at 0
