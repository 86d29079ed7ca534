"""From what a user types (``4k,16x``, ``token_select:topk=64``) to objects, or a clear refusal."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from kvselect.checks import require
from kvselect.eval.report import Length
from kvselect.policies.base import POLICIES, Policy, policy_from_dict
from kvselect.policies.token_select import TokenSelect

PUBLISHED = "paper_compat"  # TokenSelect as it was published; see TokenSelect.paper_compat


def split_list(text: str) -> list[str]:
    """The entries of a comma-separated list, blanks around them dropped, empty ones too."""
    return [entry.strip() for entry in text.split(",") if entry.strip()]


def parse_lengths(text: str, window_tokens: int) -> tuple[Length, ...]:
    """Lengths such as "4096", "16k" (1k = 1024 tokens) or "4x" (trained windows), ascending.

    Raises
    ------
    ValueError
        Naming the first entry that is none of these.
    """
    lengths = {}
    for entry in split_list(text):
        found = re.fullmatch(r"(\d+)([kx]?)", entry.lower())
        tokens = 0
        if found is not None:
            tokens = int(found[1]) * {"": 1, "k": 1024, "x": window_tokens}[found[2]]
        allowed = "tokens (4096), thousands (16k) or trained windows (4x)"
        require(tokens >= 1, "lengths", entry, allowed)
        lengths[tokens] = Length(label=entry.lower(), tokens=tokens)
    require(bool(lengths), "lengths", text, "at least one, such as 4k,16k or 1x,4x")
    return tuple(lengths[tokens] for tokens in sorted(lengths))


def policy_names() -> dict[str, str]:
    """Names on the command line and those of the classes: token_select is TokenSelect."""
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower(): name for name in sorted(POLICIES)}


def parse_policy(text: str) -> Policy:
    """A policy with settings, such as ``token_select:topk=2048,positions=compact``.

    Values: ints, floats, true, false, none, words; entries of a tuple are joined by "+"
    (``dense_layers=0+1``).

    Raises
    ------
    ValueError
        If the policy or a setting is unknown, a setting is not of the form name=value, or a value
        is out of bounds.
    TypeError
        If a value has the wrong type.
    """
    name, _, rest = text.partition(":")
    names = policy_names()
    allowed = ", ".join([*names, PUBLISHED])
    require(name in names or name == PUBLISHED, "policies", name, allowed)
    class_name = "TokenSelect" if name == PUBLISHED else names[name]
    kinds: dict[str, Any] = {
        field.name: type(field.default) for field in dataclasses.fields(POLICIES[class_name])
    }
    settings: dict[str, Any] = {}
    for entry in split_list(rest):
        field, equals, value = entry.partition("=")
        require(bool(equals), f"settings of {name}", entry, "name=value")
        require(field not in settings, f"settings of {name}", f"{field} twice", "each once")
        if kinds.get(field) is tuple:
            settings[field] = [_value(part) for part in value.split("+")]
        else:
            settings[field] = _value(value)
    if name == PUBLISHED:
        settings = TokenSelect.paper_compat().to_dict() | settings
    return policy_from_dict({"policy": class_name, **settings})


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def parse_policies(texts: list[str]) -> dict[str, Policy]:
    """Label -> policy, in the order given; a label is what was typed, without punctuation.

    Raises
    ------
    ValueError, TypeError
        As `parse_policy`; also if two are the same.
    """
    policies: dict[str, Policy] = {}
    for text in texts:
        policy = parse_policy(text)
        require(policy not in policies.values(), "policies", f"{text} twice", "each once")
        policies[text.replace(":", " ").replace(",", " ")] = policy
    require(bool(policies), "policies", "none", "at least one")
    return policies
