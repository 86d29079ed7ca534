"""`attach` runs a transformers model with a policy; its `Handle` reports, verifies, detaches."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.utils import logging as transformers_logging

from kvselect.checks import UnsupportedModelError, require, require_bool, require_int, require_type
from kvselect.crossovers import break_even_mode
from kvselect.integrations.hf.attention import kvselect_attention
from kvselect.integrations.hf.calibrate import Problem, fit_layers, run_calibration
from kvselect.integrations.hf.dense_border import settle_crossovers
from kvselect.integrations.hf.evicting_layer import settle_evictions
from kvselect.integrations.hf.hooks import install_hooks, remove_copied_hooks
from kvselect.integrations.hf.masks import key_range_mask
from kvselect.integrations.hf.plan import NAME, PLAN_KEY, StackPlan, unrotated_phases
from kvselect.integrations.hf.report import Report, make_report
from kvselect.integrations.hf.shared_prompts import SharedPrompts, share_prefixes
from kvselect.integrations.hf.stack import (
    attention_modules,
    execution_device,
    find_stack,
    implementation_keys,
    plan_layer,
    require_masks_left_alone,
    trained_length,
)
from kvselect.integrations.hf.tiered_layer import make_tiers, require_keep
from kvselect.integrations.hf.verify import VerifyResult, verify_attachment
from kvselect.lru_slots import Replacement
from kvselect.policies.base import Policy, policy_from_dict
from kvselect.policies.eviction import EvictionPolicy
from kvselect.prefix_plan import PrefixPlan


class Handle:
    """A policy on a model, from `attach` until `detach`; as a context manager, until its end."""

    def __init__(self, model: PreTrainedModel, plan: StackPlan, undo: ExitStack) -> None:
        self.model = model
        self._plan = plan
        self._undo: ExitStack | None = undo

    @property
    def policy(self) -> Policy:
        """The attached policy."""
        return self._plan.policy

    @property
    def attached(self) -> bool:
        """False after `detach`."""
        return self._undo is not None

    def report(self) -> Report:
        """What every layer did since `attach`; ``str()`` is a table, ``.to_dict()`` is for JSON."""
        return make_report(self.model, self._plan)

    def share_prefixes(
        self,
        prompts: Sequence[Sequence[int] | Tensor],
        *,
        plan: PrefixPlan | None = None,
        pad_token_id: int | None = None,
        known: SharedPrompts | None = None,
    ) -> SharedPrompts:
        """Read what prompts begin with alike once, for ``model.generate(**shared)``.

        Exact: the tokens are those of prompts read one by one. Each prefix is stored once and, in
        every call after this one, read once for all of its rows.

        Parameters
        ----------
        prompts : sequence of token ids, lists or 1-D tensors
            Whole prompts, without padding; the rows of ``generate`` in this order.
        plan : PrefixPlan or None
            Who shares what (`kvselect.plan_prefixes` of the same prompts); None: the groups that
            store the fewest tokens.
        pad_token_id : int or None
            What stands in padded places; None: the generation configuration's, else 0.
        known : SharedPrompts or None
            Of an earlier call, whose prefixes are used again where they are among those needed.

        Returns
        -------
        SharedPrompts
            A mapping of ``input_ids``, ``attention_mask`` and ``past_key_values``, for one
            ``generate``. New tokens begin at column ``shared.num_columns`` of its result.

        Raises
        ------
        ValueError, TypeError
            If the policy is neither `Dense` nor a `TokenSelect` that can list for a group, the
            model has layers without full attention and a cache of their own or rotates prompts of
            this length otherwise than their prefixes, the plan is not one of these prompts,
            ``known`` is of another model, or the model is detached.
        """
        require(self.attached, "handle", "a detached model", "an attached one")
        return share_prefixes(self.model, self._plan, prompts, plan, pad_token_id, known)

    def verify(
        self,
        *,
        prompt_tokens: int | None = None,
        decode_tokens: int = 4,
        tolerance: float | None = None,
        seed: int = 0,
    ) -> VerifyResult:
        """Compare the model with and without kvselect where nothing is left out: they must agree.

        Runs a random prompt and a few decode steps on the model as it was, then with the attached
        policy widened to keep every token: once by its dense path, once through scores, lists and
        sparse attention.

        Parameters
        ----------
        prompt_tokens, decode_tokens : int
            Length of the two phases [tokens]; None: a prompt of 192, less for a model trained on
            fewer.
        tolerance : float or None
            Bound on ``max |difference| / max |stock|`` of the logits and of every layer's attention
            output; None: by the model's dtype (`verify.TOLERANCE`).
        seed : int
            Of the random tokens.

        Raises
        ------
        VerificationError
            Naming the first layer beyond the bound and its error.
        """
        require(self.attached, "handle", "a detached model", "an attached one")
        return verify_attachment(
            self.model, self._plan, self.stock, prompt_tokens, decode_tokens, tolerance, seed
        )

    @contextmanager
    def stock(self) -> Iterator[None]:
        """Run the model as it was before `attach`, for a while."""
        require(self.attached, "handle", "a detached model", "an attached one")
        plan = self._plan
        plan.mode = "stock"
        self.model.set_attn_implementation(plan.previous)
        try:
            yield
        finally:
            self.model.set_attn_implementation(_selecting(plan.previous))
            plan.mode = "select"

    def detach(self) -> None:
        """Remove the hooks, restore the attention implementations: logits are bit-equal to before.

        A second call does nothing.
        """
        if self._undo is not None:
            undo, self._undo = self._undo, None
            undo.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exc: object) -> None:
        self.detach()

    def __repr__(self) -> str:
        state = "attached" if self.attached else "detached"
        return f"<kvselect.Handle: {self.policy!r} {state}, {type(self.model).__name__}>"


def attach(
    model: PreTrainedModel,
    policy: Policy | None = None,
    *,
    strict: bool = True,
    break_even: str | None = None,
    audit_every: int | None = None,
    audit_layers: Sequence[int] | None = None,
    keep: str | None = None,
    resident_tokens: int | None = None,
    replacement: Replacement | None = None,
) -> Handle:
    """Attach a selection policy to a transformers causal language model, in place and reversibly.

    ``generate``, beams, pipelines and evaluation harnesses work on unchanged.

    Parameters
    ----------
    model : PreTrainedModel
        Its attention must go through transformers' attention interface (Llama, Qwen2, Qwen3,
        Mistral and others).
    policy : Policy or None
        None: the dict at ``model.config.kvselect``, written by ``policy.to_dict()``.
    strict : bool
        True: raise if any layer that should select cannot, naming all of them. False: those layers
        run dense, and the report says why.
    break_even : {"auto", "stored", "off"} or None
        How a policy with ``dense_below_tokens=None`` learns up to which length dense decode steps
        are the faster ones on this machine. "auto": from what is stored, else by measuring for a
        second or two and storing it. "stored": without measuring. "off": the selection budget
        decides, which gives the same results on every machine. None: the environment variable
        ``KVSELECT_BREAK_EVEN``, else "auto".
    audit_every : int or None
        Score every so many decode steps of a layer from its exact keys as well, and report how much
        of the exact top-k its lists held and what mass (`PhaseStatistics.exact_audit`). Each reads
        all keys. None: no step.
    audit_layers : sequence of int or None
        The layers to audit; None: all that select.
    keep : "cpu" or None
        "cpu": the caches of layers that select keep their keys and values in host memory, the
        sketch and `resident_tokens` on the model's device; same tokens, less device memory, rows
        that move (docs/tier.md). For policies whose decode steps read only what they list. None:
        everything on the device.
    resident_tokens : int or None
        With ``keep="cpu"``: tokens per row and KV head that the device holds, at least the longest
        list. None: twice that.
    replacement : "lru", "lru_s" or None
        With ``keep="cpu"``: which of the listed tokens makes room on the device. "lru", or None:
        the least recently listed one. "lru_s": the one that received the least attention, later
        steps counting for more (`TieredKVCache`).

    Returns
    -------
    Handle

    Raises
    ------
    UnsupportedModelError
        If kvselect cannot run this model, or (strict) some of its layers.
    ValueError
        If a policy is attached already, ``output_attentions`` is on, a dense layer does not exist,
        ``break_even`` or ``keep`` is none of its values, the policy cannot go with ``keep``, a list
        does not fit into ``resident_tokens``, or the policy's compact positions exceed the length
        that the model was trained on.
    TypeError
        If the model is not a PreTrainedModel or the policy not a Policy.

    Notes
    -----
    A failing attach leaves the model as it was. The first call registers the name "kvselect" with
    transformers; nothing else outside the model changes. Two forward passes of seven tokens
    calibrate the rotation of each layer.
    """
    require_type(model, PreTrainedModel, "model", "a transformers PreTrainedModel")
    require_bool(strict, "strict")
    mode = break_even_mode(break_even, default="auto")
    policy = _policy_of(model, policy)
    if audit_every is not None:
        require_int(audit_every, "audit_every", 1, "None or an int >= 1")
        allowed = "None for a policy without scores"
        require(type(policy).audit is not Policy.audit, "audit_every", audit_every, allowed)
    room = require_keep(keep, resident_tokens, replacement, policy)
    allowed = "None without audit_every"
    require(audit_every is not None or audit_layers is None, "audit_layers", audit_layers, allowed)
    copied = remove_copied_hooks(model)
    if copied is not None:
        model.set_attn_implementation(copied.previous)
    stack = find_stack(model)
    if PLAN_KEY in stack.__dict__:
        got = f"a model with {type(stack.__dict__[PLAN_KEY].policy).__name__} attached"
        require(False, "model", got, "one without; call handle.detach() first")
    config: Any = stack.config
    require(not config.output_attentions, "config.output_attentions", True, "False")
    modules = attention_modules(stack)
    bad = [index for index in policy.dense_layers if index >= config.num_hidden_layers]
    require(
        not bad,
        "dense_layers",
        bad,
        f"indices of this model's layers, 0..{config.num_hidden_layers - 1}",
    )
    require_masks_left_alone(model, modules)
    length = trained_length(config)
    if policy.caches_unrotated:
        allowed = (
            f"at most {length}, the trained length of {type(model).__name__} "
            f"(positions={policy.positions!r})"
        )
        require(policy.num_positions <= length, "policy.capacity", policy.num_positions, allowed)

    plan = StackPlan(weakref.ref(stack), policy, length, implementation_keys(model, config))
    plan.layers = [plan_layer(module, config, plan) for module in modules]
    with ExitStack() as undo:
        _switch_on(model, stack, modules, plan, undo)
        try:
            probes = run_calibration(stack, plan)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__}: got {type(error).__name__} in a forward pass with the "
                f"registered attention and mask functions ({error}), allowed: models that pass "
                "keywords on to them and leave the mask to them"
            ) from error
        _decide(model, plan, fit_layers(stack, plan, probes), strict)
        if room is not None:
            plan.tiers = make_tiers(plan, policy, room, replacement or "lru")
            allowed = "None for a model without layers that select and have a cache of their own"
            require(bool(plan.tiers), "keep", keep, allowed)
        _join_ranks(plan, config)
        _plan_audits(plan, audit_every, audit_layers)
        settle_crossovers(plan, mode, execution_device(stack).type)
        plan.mode = "select"
        undo.callback(plan.withdraw)
        return Handle(model, plan, undo.pop_all())


def _policy_of(model: PreTrainedModel, policy: Policy | None) -> Policy:
    """The given policy, or the one that rides in the model's configuration."""
    if policy is None:
        settings = getattr(model.config, NAME, None)
        allowed = "a kvselect policy, or model.config.kvselect = policy.to_dict()"
        require(isinstance(settings, dict), "policy", None, allowed)
        assert isinstance(settings, dict)
        return policy_from_dict(settings)
    require_type(policy, Policy, "policy", "a kvselect policy, such as TokenSelect")
    return policy


def _selecting(previous: dict[str, Any]) -> dict[str, Any]:
    """What moves the stack's configuration, and no other, to our name."""
    return {
        key: _selecting(value) if isinstance(value, dict) else NAME
        for key, value in previous.items()
    }


def _switch_on(
    model: PreTrainedModel,
    stack: nn.Module,
    modules: list[nn.Module],
    plan: StackPlan,
    undo: ExitStack,
) -> None:
    """Register the name, move the model to it, install the hooks; ``undo`` takes it all back."""
    AttentionInterface.register(NAME, kvselect_attention)
    AttentionMaskInterface.register(NAME, key_range_mask)
    undo.callback(model.set_attn_implementation, plan.previous)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # what it warns of is refused below, in our words
    try:
        model.set_attn_implementation(_selecting(plan.previous))
    finally:
        transformers_logging.set_verbosity(verbosity)
    config: Any = stack.config
    if config._attn_implementation != NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__}: got attention outside transformers' attention interface, "
            "allowed: models whose attention implementation can be set (Llama, Qwen2, Qwen3, "
            "Mistral, ...)"
        )
    for module in (stack, *modules):
        undo.callback(module.__dict__.pop, PLAN_KEY, None)
    for hook in install_hooks(stack, modules, plan):
        undo.callback(hook.remove)


def _decide(
    model: PreTrainedModel, plan: StackPlan, problems: dict[int, Problem], strict: bool
) -> None:
    """Settle which layers select.

    Raises for what must not run; with ``strict``, for any layer that should select and cannot.
    """
    if plan.policy.positions == "original" and not unrotated_phases(plan.policy):
        problems = {index: problem for index, problem in problems.items() if not problem.rotation}
    meant = {layer.index for layer in plan.layers if layer.selects}
    raised = {
        index: problem
        for index, problem in sorted(problems.items())
        if problem.fatal or (strict and index in meant)
    }
    if raised:
        lines = "".join(f"\n  layer {index}: {problem.text}" for index, problem in raised.items())
        fatal = any(problem.fatal for problem in raised.values())
        advice = "" if fatal else "\nstrict=False runs these layers dense."
        if not fatal and all(problem.rotation for problem in raised.values()):
            advice += (
                "\nA policy that undoes no rotation runs as it is: positions='original', "
                "average_queries='after_rope', and similarity_on='rotated' if it reuses lists."
            )
        raise UnsupportedModelError(
            f"{type(model).__name__}: got layers that cannot select, allowed: causal softmax "
            f"attention with RoPE{lines}{advice}"
        )
    plan.foreign_layers = frozenset(problems)
    for layer in plan.layers:
        if layer.selects and layer.index in problems:
            layer.reason = problems[layer.index].text
    if plan.policy.caches_unrotated:
        _settle_shared_keys(plan)
    selecting = [layer for layer in plan.layers if layer.selects]
    read = {layer.index: layer.source for layer in plan.layers}
    plan.latent_layers = frozenset(layer.index for layer in selecting if layer.source is None)
    plan.sketches = [None] * (max(read, default=-1) + 1)
    for layer in selecting:
        if layer.source is not None:
            plan.sketches[layer.source] = plan.policy.required_sketch
    if isinstance(plan.policy, EvictionPolicy):
        plan.evicting_layers = settle_evictions(plan)
    for layer in plan.layers:
        layer.use(plan.policy)


def _plan_audits(plan: StackPlan, every: int | None, layers: Sequence[int] | None) -> None:
    """Tell the layers how often they are audited.

    Raises
    ------
    ValueError
        If one that is asked for does not select.
    """
    selecting = [layer.index for layer in plan.layers if layer.selects]
    wanted = selecting if layers is None else list(layers)
    bad = [index for index in wanted if index not in selecting]
    require(not bad, "audit_layers", bad, f"layers that select: {selecting}")
    for layer in plan.layers:
        layer.audit_every = every if layer.index in wanted else None


def _join_ranks(plan: StackPlan, config: Any) -> None:
    """Find out whether this process holds a share of the heads only (tensor parallel).

    Raises
    ------
    ValueError
        If the policy needs all heads, or wants one list for all of them and remembers something
        about it, which ranks would have to agree on; or if other processes take part.
    """
    shares = {
        config.num_attention_heads // layer.num_q_heads
        for layer in plan.layers
        if layer.selects and layer.num_q_heads
    }
    if not shares or max(shares) <= 1:
        return
    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    got = f"1 of {max(shares)} shares of the heads, in {ranks} processes"
    require(shares == {ranks}, "tensor parallel", got, "as many processes as shares")
    policy: Any = plan.policy
    reason = policy.needs_all_heads
    allowed = f"a policy that does with a share of the heads ({reason})"
    require(reason is None, "tensor parallel", f"a policy {type(policy).__name__}", allowed)
    if not policy.joins_heads:
        return  # every head decides for itself
    for name in ("similarity_threshold", "num_segments"):
        value = getattr(policy, name, None)
        allowed = "None with scope='layer' in tensor parallel (ranks would have to agree), or scope"
        require(value is None, name, value, f"{allowed}='kv_head'")
    plan.process_group = torch.distributed.group.WORLD


def _settle_shared_keys(plan: StackPlan) -> None:
    """Layers that read the same keys must agree on whether these are rotated."""
    for layer in plan.layers:
        readers = [other for other in plan.layers if other.source == layer.source is not None]
        dense = [other.index for other in readers if not other.selects]
        if layer.selects and dense:
            layer.reason = f"shares its keys with layer {dense[0]}, which runs dense"
