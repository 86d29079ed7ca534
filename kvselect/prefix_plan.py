"""Which requests share which prefix: prompts become groups, with one level of sharing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvselect.checks import require_choice, require_int

__all__ = ["PrefixGroup", "PrefixPlan", "plan_prefixes"]


class PrefixGroup(NamedTuple):
    """Prompts that attend to their first ``num_tokens`` tokens together."""

    members: tuple[int, ...]  # ascending
    num_tokens: int  # of the shared prefix; 0 where nothing is shared


class PrefixPlan(NamedTuple):
    """Groups of all prompts, and what they save."""

    groups: tuple[PrefixGroup, ...]  # by first member
    logical_tokens: int  # of all prompts
    physical_tokens: int  # that are stored

    @property
    def saving(self) -> float:
        """``(logical - physical) / logical``; 0 without tokens."""
        return 1.0 - self.physical_tokens / self.logical_tokens if self.logical_tokens else 0.0


@dataclass(slots=True, eq=False)
class _Node:
    """What the prompts below it have in common; ``depth`` pages from the start of a prompt."""

    depth: int
    parent: _Node | None = None
    prompts: list[int] = field(default_factory=list)  # that share nothing longer
    children: list[_Node] = field(default_factory=list)


def plan_prefixes(
    prompts: Sequence[Sequence[int]], *, page_block_size: int = 1, method: str = "exact"
) -> PrefixPlan:
    """Groups of prompts, each with a prefix that all of its members begin with.

    Parameters
    ----------
    prompts : sequence of token sequences
    page_block_size : int
        Prefixes are whole pages [tokens]. Every prompt keeps its last token, whose query it is.
    method : "exact" or "re_root"
        "exact": the groups that store the fewest tokens. "re_root": BatchLLM's greedy rule,
        bottom-up over the radix tree: child ``c`` of ``d_c`` own tokens with inner child ``g`` of
        ``d_g`` own tokens and ``n_g`` prompts gives it away, ``c``'s tokens before ``g``'s, if
        ``(n_g - 1) * d_g - d_c > 0``.

    Returns
    -------
    PrefixPlan

    Raises
    ------
    ValueError, TypeError
        If ``page_block_size`` or ``method`` is not one of these.

    Notes
    -----
    Source: BatchLLM, arXiv:2412.03594. "exact" settles for every node of the tree whether it is a
    shared prefix, given the deepest one above it; a prompt belongs to its deepest one. That is
    ``num_nodes * height`` cases.
    """
    require_int(page_block_size, "page_block_size", 1)
    require_choice(method, "method", ("exact", "re_root"))
    nodes = _radix_tree([_pages(prompt, page_block_size) for prompt in prompts])
    shared = _re_rooted(nodes) if method == "re_root" else _fewest_tokens(nodes)
    members: dict[int, list[int]] = {}
    groups = []
    for prompt, node in shared.items():
        if node.depth == 0:
            groups.append(PrefixGroup((prompt,), 0))
        else:
            members.setdefault(id(node), []).append(prompt)
    depths = {id(node): node.depth for node in nodes}
    for node_id, group in members.items():
        num_tokens = depths[node_id] * page_block_size if len(group) > 1 else 0
        groups.append(PrefixGroup(tuple(sorted(group)), num_tokens))
    logical = sum(len(prompt) for prompt in prompts)
    saved = sum((len(group.members) - 1) * group.num_tokens for group in groups)
    return PrefixPlan(tuple(sorted(groups)), logical, logical - saved)


def _pages(prompt: Sequence[int], size: int) -> list[tuple[int, ...]]:
    """The whole pages before a prompt's last token."""
    return [tuple(prompt[i : i + size]) for i in range(0, len(prompt) - size, size)]


def _radix_tree(prompts: list[list[tuple[int, ...]]]) -> list[_Node]:
    """All nodes, the root first, others by depth."""
    nodes = [_Node(0)]
    path = [nodes[0]]
    previous: list[tuple[int, ...]] = []
    for number in sorted(range(len(prompts)), key=prompts.__getitem__):
        pages = prompts[number]
        common = 0
        while common < min(len(pages), len(previous)) and pages[common] == previous[common]:
            common += 1
        below = None
        while path[-1].depth > common:
            below = path.pop()
        if path[-1].depth < common:  # a fork inside the stretch of tokens that leads to `below`
            assert below is not None
            fork = _Node(common, path[-1])
            below.parent = fork
            nodes.append(fork)
            path.append(fork)
        if len(pages) > path[-1].depth:
            leaf = _Node(len(pages), path[-1])
            nodes.append(leaf)
            path.append(leaf)
        path[-1].prompts.append(number)
        previous = pages
    nodes.sort(key=lambda node: node.depth)
    for node in nodes[1:]:
        assert node.parent is not None
        node.parent.children.append(node)
    return nodes


def _fewest_tokens(nodes: list[_Node]) -> dict[int, _Node]:
    """The shared prefix of every prompt, by number; the root where it shares none."""
    # saved[node][above]: pages saved at and below a node whose deepest shared prefix is `above`.
    saved: dict[int, dict[int, int]] = {}
    taken: dict[int, int] = {}  # the same if the node itself is one
    for node in reversed(nodes):
        count, own = len(node.prompts), id(node)
        taken[own] = (count - 1) * node.depth + sum(saved[id(c)][own] for c in node.children)
        saved[own] = {}
        above = node.parent
        while above is not None:
            skipped = count * above.depth + sum(saved[id(c)][id(above)] for c in node.children)
            saved[own][id(above)] = max(skipped, taken[own])
            above = above.parent
    shared: dict[int, _Node] = {}
    deepest = {id(nodes[0]): nodes[0]}
    for node in nodes:
        if node.parent is not None:
            above = deepest[id(node.parent)]
            deepest[id(node)] = node if taken[id(node)] > _skipped(node, above, saved) else above
        shared |= dict.fromkeys(node.prompts, deepest[id(node)])
    return shared


def _skipped(node: _Node, above: _Node, saved: dict[int, dict[int, int]]) -> int:
    below = sum(saved[id(child)][id(above)] for child in node.children)
    return len(node.prompts) * above.depth + below


def _re_rooted(nodes: list[_Node]) -> dict[int, _Node]:
    """As `_fewest_tokens`, by the greedy rule: the prefixes are the root's children at the end."""
    num_leaves: dict[int, int] = {}
    for node in reversed(nodes):
        num_leaves[id(node)] = len(node.prompts) + sum(num_leaves[id(c)] for c in node.children)
        kept: list[_Node] = []
        waiting = node.children
        while waiting:
            child = waiting.pop()
            own = child.depth - node.depth
            for inner in [c for c in child.children if num_leaves[id(c)] > 1]:
                if (num_leaves[id(inner)] - 1) * (inner.depth - child.depth) > own:
                    child.children.remove(inner)
                    num_leaves[id(child)] -= num_leaves[id(inner)]
                    kept.append(inner)
            if not child.prompts and len(child.children) == 1:
                waiting.append(child.children[0])
            elif child.prompts or child.children:
                kept.append(child)
        node.children = kept
    shared = dict.fromkeys(nodes[0].prompts, nodes[0])
    for group in nodes[0].children:
        waiting = [group]
        while waiting:
            node = waiting.pop()
            shared |= dict.fromkeys(node.prompts, group)
            waiting += node.children
    return shared
