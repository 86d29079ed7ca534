"""Attached models that leave tokens out: oracles, rows, drafts, reuse, long contexts.

The oracle needs none of our maths: in a model of one layer, keys and values depend only on each
token's own embedding, so a query that attends to the tokens S must give what the stock model gives
for the text ``tokens[S]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import hf_models
import pytest
import torch
from test_hf_attach import error
from torch import Tensor
from transformers import DynamicCache

from kvselect import StreamingLLM, TokenSelect, attach
from kvselect.integrations.hf import attention

CONTEXT = 601
ORACLE = 2e-6  # of the largest logit, float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded(TokenSelect):
    """TokenSelect that keeps its last lists where the test finds them."""

    last: ClassVar[list[Any]] = []

    def attend(self, queries: Any, cache: Any, selection: Any) -> Any:
        self.last[:] = [selection, queries]
        return super(Recorded, self).attend(queries, cache, selection)


def policy(positions: str, **changes: Any) -> Any:
    """64 tokens of 601, one list for all heads."""
    settings: dict[str, Any] = {
        "topk": 40,
        "num_sink_tokens": 4,
        "num_recent_tokens": 20,
        "overselect": 1.0,
        "sketch": None,
        "scope": "layer",
        "q_block_size": 32,
        "num_tail_tokens": 16,
        "tail_q_block_size": 8,
        "positions": positions,
    }
    return Recorded(**(settings | changes))


def stock_on(model: Any, ids: Tensor, kept: Tensor, positions: str) -> Tensor:
    """Last logits of the stock model for the text ``ids[kept]``, at old places or at new ones."""
    with torch.no_grad():
        places = kept[None] if positions == "original" else None
        return model(ids[kept][None], position_ids=places).logits[0, -1]


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("name", [*hf_models.FAMILIES, "llama_yarn"])
def test_a_decode_step_equals_the_stock_model_on_the_kept_tokens(name: str, positions: str) -> None:
    model = hf_models.build(hf_models.config(name, num_hidden_layers=1))
    ids = hf_models.tokens(2, CONTEXT)
    with torch.no_grad():
        dense = model(ids).logits[:, -1]
    with attach(model, policy(positions)) as handle, torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
        got = model(ids[:, -1:], past_key_values=cache).logits[:, 0]
        selection = Recorded.last[0]
        lists = selection.indices[:, 0].long()
        lengths = selection.topk_length[:, 0].tolist()
        with handle.stock():
            for row in range(2):
                kept = lists[row, : lengths[row]]
                assert len(kept) == 64
                expected = stock_on(model, ids[row], kept, positions)
                assert error(got[row], expected) <= ORACLE
                assert error(dense[row], expected) > 1000 * ORACLE  # the oracle discriminates


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("name", hf_models.FAMILIES)
def test_a_prefill_block_equals_the_stock_model_on_the_kept_tokens(
    name: str, positions: str
) -> None:
    model = hf_models.build(hf_models.config(name, num_hidden_layers=1))
    ids = hf_models.tokens(1, CONTEXT)
    with attach(model, policy(positions)) as handle, torch.no_grad():
        logits = model(ids).logits[0]
        selection, queries = Recorded.last
        begin = CONTEXT - queries.seqlen_q
        with handle.stock():
            for query in range(CONTEXT - 16, CONTEXT):  # the tail: two blocks of eight
                block = sum(offset <= query - begin for offset in queries.offsets) - 1
                kept = selection.indices[0, block, 0]
                kept = kept[(kept >= 0) & (kept <= query)].long()
                assert error(logits[query], stock_on(model, ids[0], kept, positions)) <= ORACLE


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_a_padded_row_equals_the_stock_model_on_its_kept_tokens(positions: str) -> None:
    model = hf_models.build(hf_models.config("qwen3", num_hidden_layers=1))
    ids, mask = hf_models.left_padded((CONTEXT, 333), CONTEXT)
    with attach(model, policy(positions)) as handle, torch.no_grad():
        result = model(ids[:, :-1], attention_mask=mask[:, :-1])
        cache = result.past_key_values
        got = model(ids[:, -1:], attention_mask=mask, past_key_values=cache).logits[:, 0]
        selection = Recorded.last[0]
        with handle.stock():
            for row in range(2):
                kept = selection.indices[row, 0, : selection.topk_length[row, 0]].long()
                assert kept[0] == (mask[row] == 0).sum()
                assert error(got[row], stock_on(model, ids[row], kept, positions)) <= ORACLE


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_streaming_llm_equals_the_stock_model_on_sinks_and_window(positions: str) -> None:
    model = hf_models.build(hf_models.config("llama", num_hidden_layers=1))
    ids = hf_models.tokens(1, CONTEXT)
    kept = torch.cat((torch.arange(4), torch.arange(CONTEXT - 60, CONTEXT)))
    expected = stock_on(model, ids[0], kept, positions)
    streaming = StreamingLLM(num_sink_tokens=4, num_recent_tokens=60, positions=positions)
    with attach(model, streaming), torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
        got = model(ids[:, -1:], past_key_values=cache).logits[0, 0]
    assert error(got, expected) <= ORACLE


# --- rows, drafts, turns --------------------------------------------------------------------------


GREEDY: dict[str, Any] = {
    "max_new_tokens": 10,
    "do_sample": False,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@pytest.mark.parametrize("sketch", [None, "int4"])
@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_a_row_does_not_depend_on_its_batch(scope: str, positions: str, sketch: str | None) -> None:
    """A sketch's blocks count padding: with one, rows agree where padding is whole blocks."""
    lengths = (512, 384, 256) if sketch else (300, 211, 170)
    width = lengths[0]
    settings = {"scope": scope, "sketch": sketch, "num_recent_tokens": 128 if sketch else 12}
    model = hf_models.build(hf_models.config("llama", vocab_size=2048))
    _, mask = hf_models.left_padded(lengths, width)
    ids = hf_models.distinct(3, width, 2048) * mask
    stock = model.generate(ids, attention_mask=mask, **GREEDY)
    with attach(model, hf_models.narrow(positions, **settings)) as handle:
        batched = model.generate(ids, attention_mask=mask, **GREEDY)
        for row, length in enumerate(lengths):
            alone = model.generate(ids[row : row + 1, width - length :], **GREEDY)
            assert torch.equal(alone[0, length:], batched[row, width:])
        report = handle.report()
    assert not torch.equal(stock, batched)
    assert report.layers[0].decode["num_dense_calls"] == 0
    assert report.bytes_ratio is not None
    assert report.bytes_ratio < 1


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize(
    ("settings", "chunk", "length"),
    [({"num_tail_tokens": 0}, 32, 192), ({"dense_prefill": True}, 23, 150)],
    ids=["whole blocks", "dense prefill"],
)
def test_chunks_of_a_prompt_select_as_the_whole(
    settings: dict[str, Any], chunk: int, length: int, positions: str
) -> None:
    """Blocks are cut from the end of each call: chunks of whole blocks cut as one call does."""
    model = hf_models.build(hf_models.config("llama", vocab_size=2048))
    ids = hf_models.distinct(1, length, 2048)
    with attach(model, hf_models.narrow(positions, **settings)) as handle, torch.no_grad():
        cache = DynamicCache(config=model.config)
        parts = [model(part, past_key_values=cache).logits for part in ids.split(chunk, dim=1)]
        whole = model(ids).logits
        assert error(torch.cat(parts, dim=1), whole) <= 1e-5
        expected = model.generate(ids, **GREEDY)
        assert torch.equal(model.generate(ids, prefill_chunk_size=chunk, **GREEDY), expected)
        prefill = handle.report().layers[0].prefill
    selects = prefill["num_dense_calls"] != prefill["num_calls"]
    assert selects == ("dense_prefill" not in settings)


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_a_draft_is_scored_as_so_many_decode_steps(positions: str) -> None:
    model = hf_models.model("llama")
    ids, draft = hf_models.tokens(1, 80), hf_models.tokens(1, 4, seed=1)
    with attach(model, hf_models.narrow(positions)), torch.no_grad():
        cache = model(ids).past_key_values
        together = model(draft, past_key_values=cache).logits
        cache.crop(-4)
        steps = [model(token, past_key_values=cache).logits for token in draft.split(1, dim=1)]
    assert error(together, torch.cat(steps, dim=1)) <= ORACLE


def test_assisted_decoding_equals_greedy_search() -> None:
    """All later drafts are verified by the decode rule.

    The prompt is short: transformers' first forward holds prompt and drafts in one call, and
    where that call selects, its query blocks mix both.

    Not with compact positions: there equal tokens have equal keys in the first layer, wherever they
    stand, and which of them wins depends on the last bit of projections that are computed for four
    tokens at once or for one.
    """
    model, assistant = hf_models.model("llama"), hf_models.model("llama")
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    ids = hf_models.tokens(1, 10).repeat(1, 2)
    settings = {**GREEDY, "max_new_tokens": 60}
    stock = model.generate(ids, **settings)
    with attach(model, hf_models.narrow()) as handle:
        expected = model.generate(ids, **settings)
        assert torch.equal(model.generate(ids, prompt_lookup_num_tokens=3, **settings), expected)
        calls = handle.report().layers[0].decode["num_calls"]
        assert torch.equal(model.generate(ids, assistant_model=assistant, **settings), expected)
        assert handle.report().layers[0].decode["num_calls"] - calls < 55  # drafts were accepted
    assert not torch.equal(expected, stock)


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_two_runs_give_the_same_bits(positions: str) -> None:
    model = hf_models.model("qwen2")
    ids = hf_models.tokens(2, 200)
    with attach(model, hf_models.narrow(positions)), torch.no_grad():
        assert torch.equal(model(ids).logits, model(ids).logits)


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
def test_contexts_beyond_the_trained_length(positions: str) -> None:
    """Nothing that the last token sees depends on how long the text is."""
    settings = hf_models.config("llama", num_hidden_layers=1, max_position_embeddings=256)
    model = hf_models.build(settings)
    ids = hf_models.tokens(1, 1200)
    with attach(model, policy(positions)) as handle, torch.no_grad():
        cache = model(ids[:, :-1]).past_key_values
        got = model(ids[:, -1:], past_key_values=cache).logits[0, 0]
        kept = Recorded.last[0].indices[0, 0, :64].long()
        with handle.stock():
            assert error(got, stock_on(model, ids[0], kept, positions)) <= ORACLE
        report = handle.report()
    assert report.trained_length == 256
    assert got.isfinite().all()


def test_dense_prefill_stops_at_the_trained_length() -> None:
    model = hf_models.build(hf_models.config("llama", max_position_embeddings=256))
    with attach(model, policy("compact", dense_prefill=True)), torch.no_grad():
        model(hf_models.tokens(1, 256))
        with pytest.raises(ValueError, match=r"got 257, allowed: at most 256"):
            model(hf_models.tokens(1, 257))


# --- un-rotated queries ---------------------------------------------------------------------------


def test_block_means_do_not_depend_on_where_positions_start() -> None:
    """Rotary attention knows distances only; so must the selection, whatever position_ids are."""
    model = hf_models.model("llama")
    ids = hf_models.tokens(2, 200)
    places = torch.arange(200)[None]
    with torch.no_grad():
        stock = model(ids).logits
        with attach(model, hf_models.narrow()):
            plain = model(ids, position_ids=places).logits
            shifted = model(ids, position_ids=places + torch.tensor([[700], [13]])).logits
    assert error(plain, stock) > 1e-2
    assert error(shifted, plain) <= 1e-4  # rotations by other angles round otherwise


def test_queries_are_rotated_back_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_models.model("qwen2")
    ids = hf_models.tokens(2, 200)
    with attach(model, hf_models.narrow()), torch.no_grad():
        expected = model(ids).logits
        monkeypatch.setattr(attention, "QUERIES_AT_ONCE", 7)
        assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("name", ["llama", "llama_yarn"])
@pytest.mark.parametrize("on", ["unrotated", "rotated"])
def test_similarity_is_that_of_queries_before_rope(name: str, on: str) -> None:
    """In one layer a repeated token asks the same query at every step, but for its rotation."""
    model = hf_models.build(hf_models.config(name, num_hidden_layers=1))
    settings = {"similarity_threshold": 0.9999, "similarity_on": on}
    with attach(model, hf_models.narrow(**settings)) as handle, torch.no_grad():
        cache = model(hf_models.tokens(1, 80)).past_key_values
        for _ in range(6):
            model(torch.tensor([[50]]), past_key_values=cache)
        decode = handle.report().layers[0].decode
    assert decode["num_hits"] == (10 if on == "unrotated" else 0)  # two lists, five steps


# --- reuse ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", hf_models.POSITIONS)
@pytest.mark.parametrize("scope", ["kv_head", "layer"])
def test_the_selection_cache_runs_and_is_reported(scope: str, positions: str) -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 80)
    reuse = {"scope": scope, "similarity": "flat" if scope == "layer" else None}
    with attach(model, hf_models.narrow(positions, **reuse)):
        fresh = model.generate(ids, **GREEDY)
    always = hf_models.narrow(positions, similarity_threshold=1e-6, max_age=4, **reuse)
    with attach(model, always) as handle:
        model.generate(ids, **GREEDY)
        hits = [layer.decode["hit_rate"] for layer in handle.report().layers]
        assert all(rate is not None and 0 < rate < 1 for rate in hits)
        model.generate(ids, num_beams=2, **GREEDY)
    with attach(model, always) as handle:
        model.generate(ids, num_beams=2, **GREEDY)
        assert all(not layer.decode["num_hits"] for layer in handle.report().layers)
    never = hf_models.narrow(positions, similarity_threshold=1.0, **reuse)
    with attach(model, never) as handle:
        assert torch.equal(model.generate(ids, **GREEDY), fresh)
        assert all(not layer.decode["num_hits"] for layer in handle.report().layers)


def test_a_crop_voids_what_was_selected() -> None:
    """After crop and other tokens, a list of the old text must not come back."""
    model = hf_models.model("llama")
    ids, other = hf_models.tokens(1, 80), hf_models.tokens(1, 81, seed=7)
    reuse = hf_models.narrow(similarity_threshold=1e-6)
    with attach(model, reuse), torch.no_grad():
        cache = DynamicCache(config=model.config)
        for text in (ids, other[:, :40], other[:, 40:80]):
            if text is not ids:
                held = cache.get_seq_length()
                cache.crop(-held if text.shape[1] == 40 and held > 40 else 0)
            model(text, past_key_values=cache)
            model(text[:, :1], past_key_values=cache)
            cache.crop(-1)
        got = model(other[:, 80:], past_key_values=cache).logits
        fresh = DynamicCache(config=model.config)
        model(other[:, :40], past_key_values=fresh)
        model(other[:, 40:80], past_key_values=fresh)
        assert torch.equal(got, model(other[:, 80:], past_key_values=fresh).logits)


@pytest.mark.filterwarnings("ignore:kvselect. layer . runs dense. padding with holes")
def test_a_hole_in_the_padding_of_a_single_token_step_counts() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 31)
    mask = torch.ones(1, 31, dtype=torch.int64)
    mask[0, 5:25] = 0

    def last_step() -> Tensor:
        with torch.no_grad():
            cache = model(ids[:, :30]).past_key_values
            step = model(ids[:, 30:], attention_mask=mask, past_key_values=cache)
            return step.logits

    stock = last_step()
    with attach(model, TokenSelect()) as handle:
        assert error(last_step(), stock) <= 1e-5
        assert "holes" in str(handle.report())


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_left_padding_does_not_move_the_sketch(positions: str) -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 630)
    padded = torch.cat((torch.zeros(1, 70, dtype=ids.dtype), ids), dim=1)
    mask = (torch.arange(700) >= 70).long()[None]
    settings = {"num_recent_tokens": 128, "topk": 64, "num_sink_tokens": 4, "max_age": 1}
    with attach(model, TokenSelect(positions=positions, **settings)), torch.no_grad():
        alone = model(ids)
        place = (torch.arange(700) - 70).clamp(min=0)[None]  # as generate gives them
        together = model(padded, attention_mask=mask, position_ids=place)
        alone = model(ids[:, :1], past_key_values=alone.past_key_values).logits
        mask = torch.cat((mask, mask.new_ones(1, 1)), dim=1)
        together = model(
            ids[:, :1],
            attention_mask=mask,
            position_ids=torch.tensor([[630]]),
            past_key_values=together.past_key_values,
        )
        assert error(together.logits, alone) <= 1e-5


def test_inference_mode_leaves_nothing_behind() -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 12)
    with attach(model, hf_models.narrow("compact")):
        with torch.inference_mode():
            first = model(ids).logits.clone()
        assert torch.equal(model(ids).logits, first)


def test_a_failed_pass_does_not_mislabel_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    model = hf_models.model("llama")
    ids = hf_models.tokens(1, 12)
    cache = DynamicCache(config=model.config)

    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("planted")

    with attach(model, hf_models.narrow("compact")), monkeypatch.context() as patch:
        patch.setattr(model.model.layers[0].self_attn.v_proj, "forward", broken)
        with pytest.raises(RuntimeError, match="planted"), torch.no_grad():
            model(ids, past_key_values=cache)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert [layer.rope_state for layer in cache.layers] == ["rotated"] * len(cache.layers)
