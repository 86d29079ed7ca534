"""One thread for all tests, and every op test once per CPU implementation that the machine has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from on_device import OpsOnDevice

from kvselect import ops
from kvselect.bench import measure


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Small inputs gain nothing from more; test_determinism.py asks for two itself."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def no_measured_crossover(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Results do not depend on the machine, nothing is timed, and nobody's cache folder is touched;
    tests of the break-even switch it on themselves."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVSELECT_BREAK_EVEN", "off")
        patch.setenv("KVSELECT_CACHE_DIR", str(tmp_path_factory.mktemp("kvselect-cache")))
        yield


@pytest.fixture(params=ops.cpu_implementations())
def cpu_implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Name of the implementation that is forced while the test runs."""
    before = ops.cpu_implementation()
    ops.set_cpu_implementation(request.param)
    yield request.param
    ops.set_cpu_implementation(before)


@pytest.fixture(params=[*ops.cpu_implementations(), pytest.param("cuda", marks=pytest.mark.cuda)])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """What runs the ops: each CPU implementation, and with ``-m cuda`` the GPU."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        with OpsOnDevice("cuda"):
            yield "cuda"
        return
    before = ops.cpu_implementation()
    ops.set_cpu_implementation(request.param)
    yield request.param
    ops.set_cpu_implementation(before)


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Benches measure the machine on a few pages: rates mean nothing, and take no time."""
    monkeypatch.setattr(measure, "READ_BYTES", 1 << 20)
    monkeypatch.setattr(measure, "PRODUCT_SIZE", 64)
    monkeypatch.setattr(measure, "last_level_cache_bytes", lambda: 1 << 16)
