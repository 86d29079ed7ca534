"""Every architecture of docs/models.md: exact, reversible, and right where tokens are left out."""

from __future__ import annotations

import hf_checks
import pytest
from hf_architectures import REFUSED, SUPPORTED

COMPACT = [name for name, row in SUPPORTED.items() if row.compact]


@pytest.mark.parametrize("name", SUPPORTED)
def test_layers_select_or_say_why_not(name: str) -> None:
    hf_checks.layers(name)


@pytest.mark.parametrize("name", SUPPORTED)
def test_exact_at_original_positions(name: str) -> None:
    hf_checks.exact(name, "original")


@pytest.mark.parametrize("name", COMPACT)
def test_exact_at_compact_positions(name: str) -> None:
    hf_checks.exact(name, "compact")


@pytest.mark.parametrize("name", COMPACT)
def test_one_layer_on_the_kept_tokens_alone(name: str) -> None:
    hf_checks.oracle(name, "compact")


@pytest.mark.parametrize("name", SUPPORTED)
def test_one_layer_on_the_kept_tokens_at_their_places(name: str) -> None:
    hf_checks.oracle(name, "original")


@pytest.mark.parametrize("name", SUPPORTED)
def test_detach_is_bit_equal(name: str) -> None:
    hf_checks.detach(name)


@pytest.mark.parametrize("name", SUPPORTED)
def test_generate_of_a_padded_batch(name: str) -> None:
    hf_checks.batch(name, "compact" if SUPPORTED[name].compact else "original")


@pytest.mark.parametrize("name", REFUSED)
def test_refused_models_are_told_why(name: str) -> None:
    hf_checks.refused(name)
