"""The rotation of a layer is measured: every layout is found, nothing else passes for one."""

from __future__ import annotations

from typing import Any

import hf_models
import pytest
import torch
from torch import Tensor, nn

from kvselect.checks import UnsupportedModelError
from kvselect.integrations.hf import attach
from kvselect.integrations.hf.rope_fit import (
    FIT_TOLERANCE,
    NO_ROPE,
    Frequencies,
    RopeLayout,
    candidate_layouts,
    fit_layout,
    freeze_frequencies,
    frequencies_match,
)
from kvselect.policies.dense import Dense
from kvselect.testing import rel_err

HEAD_DIM = 32
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LAYOUTS = [
    RopeLayout(interleaved, start, dim // 2, cos_layout)  # type: ignore[arg-type]
    for cos_layout in ("cat", "repeat", "half")
    for dim in (HEAD_DIM, HEAD_DIM // 2)
    for interleaved in (False, True)
    for start in sorted({0, HEAD_DIM - dim})
]
ERROR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def model_tables(
    layout: RopeLayout, positions: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin as a model with this layout would make them, [1, seqlen, width]."""
    inv_freq = 1.0 / (1e4 ** (torch.arange(layout.num_pairs) / layout.num_pairs))
    angles = positions[..., None].float() * inv_freq
    if layout.cos_layout == "cat":
        angles = torch.cat((angles, angles), dim=-1)
    elif layout.cos_layout == "repeat":
        angles = angles.repeat_interleave(2, dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def model_rotation(x: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout) -> Tensor:
    """What the model does to ``x`` [1, heads, seqlen, head_dim], in its own dtype, pair by pair."""
    out = x.clone()
    step = 2 if layout.cos_layout == "repeat" else 1
    for pair in range(layout.num_pairs):
        first = layout.start + (2 * pair if layout.interleaved else pair)
        second = first + (1 if layout.interleaved else layout.num_pairs)
        c, s = cos[:, None, :, step * pair], sin[:, None, :, step * pair]
        out[..., first] = x[..., first] * c - x[..., second] * s
        out[..., second] = x[..., second] * c + x[..., first] * s
    return out


def queries_and_keys(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, 4, 7, HEAD_DIM, generator=generator)
    k = torch.randn(1, 2, 7, HEAD_DIM, generator=generator)
    return q.to(dtype), k.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.cos_layout}-{x}".replace(" ", ""))
def test_every_layout_is_found(layout: RopeLayout, dtype: torch.dtype) -> None:
    cos, sin = model_tables(layout, torch.arange(5, 12)[None], dtype)
    unrotated = queries_and_keys(dtype)
    rotated = tuple(model_rotation(x, cos, sin, layout) for x in unrotated)
    found, error = fit_layout(rotated, unrotated, cos, sin)  # type: ignore[arg-type]
    assert found == layout
    assert error <= ERROR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_layer_without_rotation_is_found(dtype: torch.dtype) -> None:
    cos, sin = model_tables(LAYOUTS[0], torch.arange(5, 12)[None], dtype)
    unrotated = queries_and_keys(dtype)
    assert fit_layout(unrotated, unrotated, cos, sin) == (NO_ROPE, 0.0)


def test_what_is_no_rotation_does_not_fit() -> None:
    cos, sin = model_tables(LAYOUTS[0], torch.arange(5, 12)[None], torch.float32)
    unrotated = queries_and_keys(torch.float32)
    q, k = (model_rotation(x, cos, sin, LAYOUTS[0]) for x in unrotated)
    weight = torch.rand(HEAD_DIM, generator=torch.Generator().manual_seed(1)) + 0.5
    for other in (
        (q * weight, k * weight),  # a weighted norm after the rotation
        (q, -k),
        (unrotated[0], k),  # keys only
        (torch.full_like(q, float("nan")), k),
        queries_and_keys(torch.float32, seed=2),
    ):
        assert fit_layout(other, unrotated, cos, sin)[1] > 10 * FIT_TOLERANCE


def test_candidates_fit_the_head() -> None:
    for width in (8, 16, 32):
        for layout in candidate_layouts(width, HEAD_DIM):
            assert layout.start + 2 * layout.num_pairs <= HEAD_DIM
    assert candidate_layouts(64, HEAD_DIM) == [NO_ROPE]
    assert len(set(candidate_layouts(16, HEAD_DIM))) == len(candidate_layouts(16, HEAD_DIM))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: f"{x.cos_layout}-{x}".replace(" ", ""))
@pytest.mark.parametrize("scaling", [1.0, 1.3])
def test_queries_are_rotated_back(layout: RopeLayout, dtype: torch.dtype, scaling: float) -> None:
    positions = torch.randint(0, 3000, (3, 7), generator=torch.Generator().manual_seed(0))
    q = torch.randn(3, 4, 7, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    cos, sin = model_tables(layout, positions, torch.float32)
    cos, sin = (scaling * cos).to(dtype), (scaling * sin).to(dtype)
    rotated = model_rotation(q.to(dtype), cos, sin, layout)
    back = layout.unrotation(cos, sin, HEAD_DIM)(rotated.transpose(1, 2))
    assert back.dtype == torch.float32
    bound = {torch.float32: 3e-7, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]
    assert rel_err(back.transpose(1, 2), q.to(dtype)) <= bound


def test_one_row_of_positions_serves_all_rows() -> None:
    layout = LAYOUTS[0]
    q = torch.randn(3, 4, 5, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    cos, sin = model_tables(layout, torch.arange(100, 105)[None], torch.float32)
    rotated = model_rotation(q, cos, sin, layout)
    back = layout.unrotation(cos, sin, HEAD_DIM)(rotated.transpose(1, 2))
    assert rel_err(back.transpose(1, 2), q) <= 3e-7


@pytest.mark.parametrize("scaling", [1.0, 1.3])
@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_the_inverse_takes_vectors_back_by_position(layout: RopeLayout, scaling: float) -> None:
    inv_freq = 1.0 / (1e4 ** (torch.arange(layout.num_pairs) / layout.num_pairs))
    frequencies = Frequencies(inv_freq, scaling)
    positions = torch.randint(0, 3000, (2, 7), generator=torch.Generator().manual_seed(0))
    q = torch.randn(2, 7, 4, HEAD_DIM, generator=torch.Generator().manual_seed(1))
    device = torch.device("cpu")
    rotated = frequencies.rope(layout, 3000, device).rotate(q, positions)
    back = frequencies.inverse(layout, device).rotate_at(rotated, -positions)
    assert rel_err(back, q) <= 1e-6


class Rotary(nn.Module):
    """A rotary module like transformers' own; ``prefix`` names a layer type."""

    def __init__(self, prefix: str = "") -> None:
        super().__init__()
        self.register_buffer(f"{prefix}inv_freq", torch.tensor([1.0, 0.1]), persistent=False)
        setattr(self, f"{prefix}attention_scaling", 1.5)


def test_frequencies_are_copied() -> None:
    rotary = Rotary()
    frequencies = freeze_frequencies(rotary, None)
    assert frequencies is not None
    rotary.inv_freq.fill_(9.0)  # type: ignore[operator, union-attr]
    assert frequencies.inv_freq.tolist() == pytest.approx([1.0, 0.1])
    assert frequencies.scaling == 1.5


def test_frequencies_of_a_layer_type_come_first() -> None:
    frequencies = freeze_frequencies(Rotary("full_attention_"), "full_attention")
    assert frequencies is not None
    assert frequencies.scaling == 1.5
    assert freeze_frequencies(Rotary("full_attention_"), None) is None
    assert freeze_frequencies(None, None) is None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=str)
def test_frozen_frequencies_are_checked_bit_by_bit(layout: RopeLayout, dtype: torch.dtype) -> None:
    positions = torch.arange(5, 12)[None]
    cos, _ = model_tables(layout, positions, dtype)
    inv_freq = 1.0 / (1e4 ** (torch.arange(layout.num_pairs) / layout.num_pairs))
    assert frequencies_match(Frequencies(inv_freq, 1.0), layout, cos, positions)
    assert not frequencies_match(Frequencies(inv_freq * 1.01, 1.0), layout, cos, positions)
    assert not frequencies_match(Frequencies(inv_freq, 1.1), layout, cos, positions)
    assert not frequencies_match(Frequencies(inv_freq[1:], 1.0), layout, cos, positions)


# --- on models ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*hf_models.FAMILIES, *hf_models.SLIDING, "llama_yarn"])
def test_models_are_calibrated(name: str, dtype: torch.dtype) -> None:
    model = hf_models.model(name).to(dtype)
    with attach(model, hf_models.wide()) as handle:
        report = handle.report()
    for layer in report.layers:
        assert layer.rope == "half [0:32]"
        assert layer.rope_fit_error <= ERROR[dtype]


def test_longrope_is_frozen_in_its_short_state() -> None:
    """Also after a long prompt, which leaves the rotary module in the long one."""
    model = hf_models.build(hf_models.config("phi3_longrope"))
    rotary = model.model.rotary_emb
    with torch.no_grad():
        model(hf_models.tokens(1, 600))
    long = rotary.inv_freq.clone()
    with attach(model, hf_models.wide("compact", topk=64)) as handle:
        plan = handle._plan
        frozen = plan.layers[0].frequencies
        assert plan.trained_length == 512
    assert frozen is not None
    assert torch.equal(frozen.inv_freq, rotary.original_inv_freq)
    assert not torch.equal(frozen.inv_freq, long)


def flip_key_rotation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make Llama rotate its keys the other way: no layout explains both queries and keys."""
    from transformers.models.llama import modeling_llama

    rotate = modeling_llama.apply_rotary_pos_emb

    def flipped(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any) -> Any:
        return rotate(q, q, cos, sin, *args)[0], rotate(k, k, cos, -sin, *args)[1]

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", flipped)


def test_a_rotation_that_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    flip_key_rotation(monkeypatch)
    model = hf_models.model("llama")
    for policy in (hf_models.wide("compact"), hf_models.wide(similarity_threshold=0.9)):
        with pytest.raises(UnsupportedModelError, match="layer 0: no RoPE layout fits") as error:
            attach(model, policy)
        assert "layer 2: no RoPE layout fits" in str(error.value)


@pytest.mark.parametrize(
    "policy",
    [hf_models.listing(dense_prefill=True), Dense()],
    ids=["dense_prefill", "Dense"],
)
def test_policies_that_rotate_nothing_run_without_a_fit(
    policy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip_key_rotation(monkeypatch)
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 40)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    with attach(model, policy):
        assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), expected)
