"""Plans of shared prefixes: the exact one against all partitions, the greedy rule's gap to it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest

from kvselect.prefix_plan import PrefixGroup, plan_prefixes

Prompts = list[list[int]]


def partitions(items: list[int]) -> Iterator[list[list[int]]]:
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for parts in partitions(rest):
        yield [[first], *parts]
        for i, part in enumerate(parts):
            yield [*parts[:i], [first, *part], *parts[i + 1 :]]


def common_tokens(prompts: Prompts, page: int) -> int:
    """Whole pages that all have in common, each without its last token."""
    count = 0
    while all(count < len(p) - 1 and p[count] == prompts[0][count] for p in prompts):
        count += 1
    return count // page * page


def most_saved(prompts: Prompts, page: int) -> int:
    return max(
        sum((len(part) - 1) * common_tokens([prompts[i] for i in part], page) for part in parts)
        for parts in partitions(list(range(len(prompts))))
    )


def random_prompts(rng: random.Random, count: int) -> Prompts:
    """Prompts that branch often: each goes on from some point of an earlier one."""
    prompts = [[rng.randrange(2) for _ in range(rng.randrange(1, 9))]]
    while len(prompts) < count:
        stem = rng.choice(prompts)
        stem = stem[: rng.randrange(len(stem) + 1)]
        prompts.append(stem + [rng.randrange(2) for _ in range(rng.randrange(0, 7))] or [0])
    return prompts


def require_valid(prompts: Prompts, plan: Any, page: int) -> None:
    listed = [member for group in plan.groups for member in group.members]
    assert sorted(listed) == list(range(len(prompts)))
    for group in plan.groups:
        assert group.num_tokens % page == 0
        assert group.num_tokens <= common_tokens([prompts[i] for i in group.members], page)
    stored = sum(map(len, prompts))
    stored -= sum((len(group.members) - 1) * group.num_tokens for group in plan.groups)
    assert plan.physical_tokens == stored and plan.logical_tokens == sum(map(len, prompts))
    assert plan.saving == pytest.approx(1 - stored / plan.logical_tokens)


@pytest.mark.parametrize("page", [1, 2])
def test_exact_equals_brute_force_and_the_rule_is_close(page: int) -> None:
    rng = random.Random(page)
    gaps = []
    for _ in range(120):
        prompts = random_prompts(rng, rng.randrange(2, 7))
        most = most_saved(prompts, page)
        plan = plan_prefixes(prompts, page_block_size=page)
        require_valid(prompts, plan, page)
        assert plan.logical_tokens - plan.physical_tokens == most
        greedy = plan_prefixes(prompts, page_block_size=page, method="re_root")
        require_valid(prompts, greedy, page)
        gaps.append(plan.saving - greedy.saving)
    assert min(gaps) >= 0
    print(f"re_root: worst gap {max(gaps):.3f}, {sum(g > 0 for g in gaps)} of {len(gaps)} not best")
    assert sum(gaps) / len(gaps) <= 0.02


def test_eight_prompts_against_brute_force() -> None:
    rng = random.Random(8)
    for _ in range(3):
        prompts = random_prompts(rng, 8)
        plan = plan_prefixes(prompts)
        assert plan.logical_tokens - plan.physical_tokens == most_saved(prompts, 1)


def test_the_rule_re_roots_where_it_pays() -> None:
    # c: 2 tokens, 5 prompts; below it g: 3 more tokens, 3 prompts: (3 - 1) * 3 - 2 > 0.
    c, g = [1, 1], [2, 2, 2]
    prompts = [[*c, *g, 7], [*c, *g, 8], [*c, *g, 9], [*c, 5, 5], [*c, 6, 6]]
    for method in ("re_root", "exact"):
        plan = plan_prefixes(prompts, method=method)
        assert plan.groups == (PrefixGroup((0, 1, 2), 5), PrefixGroup((3, 4), 2))
        assert plan.physical_tokens == 5 + 3 + 2 + 4
    # One token less in g: 2 * 1 - 2 is not above 0, and both ways store the same.
    prompts = [p[:2] + p[4:] if p[2] == 2 else p for p in prompts]
    assert plan_prefixes(prompts, method="re_root").groups == (PrefixGroup((0, 1, 2, 3, 4), 2),)


def test_a_prompt_keeps_its_last_token() -> None:
    plan = plan_prefixes([[1, 2, 3], [1, 2, 3], [1, 2, 3, 4]])
    assert plan.groups == (PrefixGroup((0, 1, 2), 2),)
    plan = plan_prefixes([[1, 2, 3], [1, 2, 3]], page_block_size=2)
    assert plan.groups == (PrefixGroup((0, 1), 2),)
    assert plan_prefixes([[1], [1]]).groups == (PrefixGroup((0,), 0), PrefixGroup((1,), 0))
    assert plan_prefixes([]).saving == 0.0 and plan_prefixes([[]]).saving == 0.0


def test_long_chains_need_no_recursion() -> None:
    turns = [list(range(n)) for n in range(1, 1500, 7)]
    assert plan_prefixes(turns).saving > 0.5
    assert plan_prefixes(turns, method="re_root").saving > 0.3


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="page_block_size: got 0, allowed: an int >= 1"):
        plan_prefixes([[1]], page_block_size=0)
    with pytest.raises(ValueError, match="method: got 'dp', allowed: 'exact' or 're_root'"):
        plan_prefixes([[1]], method="dp")
