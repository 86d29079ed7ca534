"""The CUDA backend, on CPU tensors: its classes in an engine, and when vLLM picks them."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed here: make test-vllm")

from cuda_on_cpu import Impl, cuda_classes
from vllm_engine import SMALL, attached, engine, prompts, stored

import kvselect
from kvselect.integrations.vllm import config, shim
from kvselect.integrations.vllm.cuda_backend import (
    SelectingCudaBackend,
    SelectingCudaBuilder,
    SelectingCudaImpl,
)
from kvselect.integrations.vllm.plugin import register
from kvselect.policies.base import Policy

ASKED = prompts((40, 128, 129, 255, 384, 777, 1500))
UNCUT = kvselect.TokenSelect(**SMALL, dense_prefill=True)
WINDOW = {"sliding_window": 96, "layer_types": ["sliding_attention", "full_attention"]}


# ---- Triton's backend is what we think it is


@pytest.mark.quick
def test_what_we_override_takes_what_we_think() -> None:
    def arguments(function: Any) -> list[str]:
        return list(inspect.signature(function).parameters)[1:]

    theirs, ours = shim.TritonAttentionImpl, SelectingCudaImpl
    assert arguments(theirs.__init__)[:11] == arguments(ours.__init__)[:11]
    assert arguments(theirs.forward) == arguments(ours.forward)
    update = ["layer", "key", "value", "kv_cache", "slot_mapping"]
    assert arguments(theirs.do_kv_cache_update) == update
    build = ["common_prefix_len", "common_attn_metadata", "fast_build"]
    assert arguments(shim.TritonAttentionMetadataBuilder.build) == build
    assert shim.TritonAttentionBackend.forward_includes_kv_cache_update is False
    names = shim.TritonAttentionMetadata.__dataclass_fields__
    assert {"causal", "slot_mapping"} <= set(names)
    common = import_module("vllm.v1.attention.backend").CommonAttentionMetadata
    names = common.__dataclass_fields__
    assert {"seq_lens", "seq_lens_cpu_upper_bound", "block_table_tensor"} <= set(names)
    offered = {*dir(shim.TritonAttentionBackend), "supports_rswa"}  # which 0.28.0 does not ask for
    assert {name for name in vars(SelectingCudaBackend) if name[0] != "_"} <= offered


@pytest.mark.quick
def test_no_cuda_graph_holds_a_step() -> None:
    assert SelectingCudaBuilder._cudagraph_support is shim.AttentionCGSupport.NEVER
    assert SelectingCudaBackend.forward_includes_kv_cache_update is True


# ---- an engine that runs them, on CPU tensors


@pytest.fixture
def cuda() -> Iterator[None]:
    with cuda_classes():
        yield


def ran(layers: list[Any]) -> list[Any]:
    assert all(type(layer) is Impl for layer in layers)
    return [layer._served for layer in layers]


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
@pytest.mark.parametrize(
    "policy",
    [
        kvselect.TokenSelect(**SMALL),
        kvselect.TokenSelect(**SMALL, positions="compact"),
        kvselect.TokenSelect(**SMALL, scope="layer", sketch=None, dense_layers=(0,)),
        kvselect.Quest(token_budget=224, dense_layers=()),
    ],
    ids=["original", "compact", "layer-exact", "quest"],
)
def test_requests_at_once_equal_attach(
    policy: Policy, layout: str, cuda: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"LBHNC": "HND", "LBNHC": "NHD"}  # those of 0.28.0, which 0.32.0 understands too
    monkeypatch.setenv("VLLM_KV_CACHE_LAYOUT", names[layout])
    with engine(policy) as running:
        got = running.generate(ASKED)
        served = ran(running.layers)
        if policy.dense_layers:
            assert served.pop(0) is None
        for layer in served:
            k, v = layer.cache.k_pages, layer.cache.v_pages
            per_token = k.stride(1), k.stride(2)
            assert (per_token[0] < per_token[1]) == (layout == "LBHNC")
            assert v.data_ptr() - k.data_ptr() == k.shape[-1] * k.itemsize
            counts = layer.state.decode
            assert 0 < counts.tokens_attended < counts.tokens_visible
    assert got == attached(policy, ASKED)


@pytest.mark.quick
def test_chunks_hits_and_preemption(cuda: None) -> None:
    asked = prompts((250, 380, 254, 383, 300, 511, 253, 640))
    options: dict[str, Any] = {
        "num_gpu_blocks_override": 22,
        "max_model_len": 1024,
        "max_num_batched_tokens": 192,
        "enable_prefix_caching": True,
    }
    with engine(UNCUT, **options) as running:
        preempted = 0
        preempt = running.scheduler._preempt_request

        def count(*args: Any, **more: Any) -> Any:
            nonlocal preempted
            preempted += 1
            return preempt(*args, **more)

        running.scheduler._preempt_request = count
        wanted = attached(UNCUT, asked, new_tokens=24)
        assert running.generate(asked, new_tokens=24) == wanted
        assert running.generate(asked, new_tokens=24) == wanted  # what is there still is hit
        assert preempted > 0 and all(served is not None for served in ran(running.layers))


def test_lists_are_reused_as_under_attach(cuda: None) -> None:
    policy = dataclasses.replace(UNCUT, similarity_threshold=0.6, max_age=6)
    asked, hits = ASKED[4:], list[int]()
    wanted = attached(policy, asked, new_tokens=24, hits=hits)
    with engine(policy, max_num_batched_tokens=512, max_num_seqs=2) as running:
        assert running.generate(asked, new_tokens=24) == wanted
        counts = [layer.state.decode for layer in ran(running.layers)]
        assert sum(count.num_hits for count in counts) == sum(hits) > 0


def test_layers_with_a_window_run_tritons(tmp_path: Path) -> None:
    options = stored(tmp_path, "Llama", WINDOW)
    asked = [tokens[:700] for tokens in ASKED[3:]]
    with engine(None, **options) as running:
        own = running.generate(asked)
    streaming = kvselect.StreamingLLM(num_recent_tokens=160, positions="original")
    for policy, streams in ((kvselect.Dense(), False), (streaming, True)):
        with cuda_classes(), engine(policy, **options) as running:
            assert (running.generate(asked) != own) == streams
            local, whole = ran(running.layers)
            assert local is None and whole is not None


def step_of(work: list[tuple[int, int, list[int], bool]], padding: int) -> tuple[Any, int]:
    """vLLM's metadata of requests (tokens before, new ones, blocks, of a prompt), and how many new
    ones there are; ``padding`` requests and tokens more, as its runners have them."""
    count, num_new = len(work), [new for _, new, _, _ in work]
    starts = torch.tensor([0, *num_new], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total = int(starts[-1])
    starts = torch.cat((starts, starts[-1:].expand(padding)))
    lengths = [before + new for before, new, _, _ in work]
    seq_lens = torch.tensor([*lengths, *padding * [0]], dtype=torch.int32)
    table = torch.zeros(count + padding, 8, dtype=torch.int32)
    for row, (_, _, blocks, _) in enumerate(work):
        table[row, : len(blocks)] = torch.tensor(blocks, dtype=torch.int32)
    common = import_module("vllm.v1.attention.backend").CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=count + padding,
        num_actual_tokens=total + padding,
        max_query_len=max(num_new),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.full((total + padding,), -1),
        is_prefilling=torch.tensor([*(part[3] for part in work), *padding * [False]]),
    )
    return common, total


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)], ids=["heads", "tokens"])
def test_steps_equal_the_cpu_backends(order: tuple[int, ...], cuda: None) -> None:
    """Padded steps over blocks of NaN: the same bits as the CPU backend's in its own layout."""
    from vllm.config import set_current_vllm_config

    from kvselect.integrations.vllm.cpu_backend import SelectingCPUImpl

    num_blocks, size = 16, 128
    with engine(UNCUT) as running:
        vllm_config = running.llm.llm_engine.vllm_config
        layers = vllm_config.compilation_config.static_forward_context
        name, layer = next(iter(layers.items()))
        builder = SelectingCudaBuilder(
            layer.get_kv_cache_spec(vllm_config), [name], vllm_config, torch.device("cpu")
        )
        sizes = layer.num_heads, layer.head_size, layer.impl.scale, layer.num_kv_heads
        with set_current_vllm_config(vllm_config):
            ours = Impl(*sizes, None, None, "auto")
            other = SelectingCPUImpl(*sizes, None, None, "auto")
        shape = (num_blocks, layer.num_kv_heads, size, 2 * layer.head_size)
        back = tuple(order.index(dim) for dim in range(4))
        laid_out = torch.full(tuple(shape[dim] for dim in order), torch.nan).permute(back)
        blocks = torch.full(shape, torch.nan)
        generator = torch.Generator().manual_seed(0)
        for work in (
            [(0, 200, [3, 9], True), (0, 300, [7, 1, 12], True)],
            [(300, 1, [7, 1, 12], False), (200, 130, [3, 9, 5], True)],  # a chunk beside a step
            [(256, 60, [3, 9, 4], True), (301, 1, [7, 1, 12], False), (330, 1, [3, 9, 5], False)],
            [(331, 1, [3, 9, 5], False), (316, 1, [3, 9, 4], False), (302, 3, [7, 1, 12], False)],
        ):
            common, total = step_of(work, padding=3)
            metadata = builder.build(0, common)
            parts = [
                torch.randn(total + 3, heads, layer.head_size, generator=generator)
                for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
            ]
            for part in parts:
                part[total:] = torch.nan
            q, k, v = parts
            out, wanted = torch.full_like(q, -7.0), torch.full_like(q, -7.0)
            assert ours.forward(layer, q, k, v, laid_out, metadata, output=out) is out
            other.store(metadata.step, k, v, blocks)
            other.attend(q, blocks, metadata, wanted)
            assert torch.equal(out, wanted) and (out[total:] == -7.0).all()
            assert out[:total].isfinite().all()
        counts = ours._served.state.decode
        assert 0 < counts.tokens_attended < counts.tokens_visible
        message = r"^output_scale: got 'a tensor', allowed: None under kvselect"
        with pytest.raises(ValueError, match=message):
            ours.forward(layer, q, k, v, laid_out, metadata, out, torch.ones(1))
        warm = ours.forward(layer, q, k, v, laid_out, None, output=out)
        assert not warm.any()


def test_custom_without_a_policy_is_refused(cuda: None) -> None:
    with pytest.raises(Exception, match=r"policy: got None, allowed: one \(KVSELECT"), engine(None):
        pass


def test_without_cuda_kernels(cuda: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Impl, "require_backend", SelectingCudaImpl.require_backend)
    message = r"kvselect's CUDA module: got 'none', allowed: one beside a torch with CUDA"
    with pytest.raises(Exception, match=message), engine(kvselect.Dense()):
        pass


# ---- when vLLM's CUDA platform picks them


@pytest.fixture
def platform(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """vLLM's own, on an imagined H100; its compiled parts are not asked for anything."""
    for name in ("vllm._C_stable_libtorch", "vllm._C"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    cuda = import_module("vllm.platforms.cuda").CudaPlatformBase
    capability = import_module("vllm.platforms.interface").DeviceCapability
    monkeypatch.setattr(cuda, "get_device_capability", lambda device_id=0: capability(9, 0))
    monkeypatch.setattr(shim, "platform_name", lambda: "cuda")
    registry = import_module("vllm.v1.attention.backends.registry")
    monkeypatch.setattr(registry, "_ATTN_OVERRIDES", {})
    loaded = {"cuda_loaded": True, "cuda_archs": ["90a"], "torch": "2.13.0"}
    monkeypatch.setattr(config, "build_info", lambda: loaded)
    register()
    yield cuda


def picked(
    platform: Any, policy: Policy | None, attention: dict[str, Any], **layer: Any
) -> type[Any]:
    """The class that a layer gets."""
    from vllm.config import AttentionConfig, CacheConfig, VllmConfig, set_current_vllm_config

    asked = None if policy is None else {"kvselect": policy.to_dict()}
    options = {} if asked is None else {"additional_config": asked}
    vllm_config = VllmConfig(
        attention_config=AttentionConfig(**attention), cache_config=CacheConfig(), **options
    )
    selector = import_module("vllm.v1.attention.selector").AttentionSelectorConfig
    facts = {"head_size": 128, "dtype": torch.bfloat16, "kv_cache_dtype": "auto"}
    facts |= {"block_size": None} | layer
    with set_current_vllm_config(vllm_config):
        path = platform.get_attn_backend_cls(
            vllm_config.attention_config.backend, selector(**facts)
        )
    return shim.class_of(path)


@pytest.mark.quick
def test_the_user_picks_it(platform: Any) -> None:
    found = picked(platform, UNCUT, {"backend": "CUSTOM"})
    assert found is SelectingCudaBackend and found.get_impl_cls() is SelectingCudaImpl
    assert picked(platform, UNCUT, {"backend": "CUSTOM"}, has_sliding_window=True) is found
    assert picked(platform, UNCUT, {"backend": "CUSTOM"}, block_size=256) is found
    assert found.get_preferred_block_size(16) == 128
    assert found.get_builder_cls() is SelectingCudaBuilder


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ({"block_size": 64}, "block_size not supported"),
        ({"use_mla": True}, "MLA not supported"),
        ({"use_non_causal": True}, "non-causal attention not supported"),
        ({"use_batch_invariant": True}, "batch invariance not supported"),
        ({"use_adaptive_verification": True}, "device-cpu query lens mismatch not supported"),
    ],
)
def test_layers_that_do_not_fit(layer: dict[str, Any], reason: str, platform: Any) -> None:
    with pytest.raises(ValueError, match=f"CUSTOM.*{reason}"):
        picked(platform, UNCUT, {"backend": "CUSTOM"}, **layer)


def test_older_gpus_do_not_fit(platform: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    turing = import_module("vllm.platforms.interface").DeviceCapability(7, 5)
    monkeypatch.setattr(platform, "get_device_capability", lambda device_id=0: turing)
    with pytest.raises(ValueError, match=r"CUSTOM.*compute capability not supported"):
        picked(platform, UNCUT, {"backend": "CUSTOM"})


@pytest.mark.quick
def test_without_a_policy_vllm_picks_its_own(platform: Any) -> None:
    registry = import_module("vllm.v1.attention.backends.registry").AttentionBackendEnum
    own = import_module("vllm.v1.attention.backends.triton_attn").TritonAttentionBackend
    assert registry.TRITON_ATTN.get_class() is own  # outside of an engine
    assert picked(platform, None, {"backend": "TRITON_ATTN"}) is own
    assert picked(platform, None, {}).__module__.startswith("vllm.")


@pytest.mark.quick
@pytest.mark.parametrize(
    "attention",
    [{}, {"backend": "TRITON_ATTN"}],
    ids=["vllm-picks", "another"],
)
def test_a_policy_is_not_ignored_in_silence(attention: dict[str, Any], platform: Any) -> None:
    message = r"^attention backend: got '\w+', allowed: CUSTOM with a policy of kvselect \(--att"
    with pytest.raises(ValueError, match=message):
        picked(platform, UNCUT, attention)


def test_others_stay_what_they_are_beside_it(platform: Any) -> None:
    """A vision tower asks for its own, whatever full attention runs."""
    from vllm.config import AttentionConfig, VllmConfig, set_current_vllm_config

    registry = import_module("vllm.v1.attention.backends.registry").AttentionBackendEnum
    asked = VllmConfig(
        attention_config=AttentionConfig(backend="CUSTOM"),
        additional_config={"kvselect": UNCUT.to_dict()},
    )
    with set_current_vllm_config(asked):
        found = registry.FLASH_ATTN.get_class()
        message = r"^attention backend: got 'FLASH_ATTN_DIFFKV', allowed: CUSTOM with a policy"
        with pytest.raises(ValueError, match=message):  # which a model picks by itself
            registry.FLASH_ATTN_DIFFKV.get_class()
    assert found.__module__ == "vllm.v1.attention.backends.flash_attn"


def test_names_that_vllm_does_not_have() -> None:
    from kvselect.integrations.vllm import cuda_choice

    with pytest.raises(AttributeError, match=r"cuda_choice' has no attribute 'NOTHING'$"):
        cuda_choice.NOTHING  # noqa: B018
