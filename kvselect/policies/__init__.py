"""Selection methods, one file each; `POLICIES` knows them by name."""

from kvselect.policies.act_qkv import ActQKV
from kvselect.policies.base import POLICIES, Policy, PolicyState, policy_from_dict
from kvselect.policies.dense import Dense
from kvselect.policies.infllm import InfLLM
from kvselect.policies.landmark import Landmark
from kvselect.policies.quest import Quest
from kvselect.policies.spatten import SpAtten
from kvselect.policies.streaming_llm import StreamingLLM
from kvselect.policies.token_select import TokenSelect

__all__ = [
    "POLICIES",
    "ActQKV",
    "Dense",
    "InfLLM",
    "Landmark",
    "Policy",
    "PolicyState",
    "Quest",
    "SpAtten",
    "StreamingLLM",
    "TokenSelect",
    "policy_from_dict",
]
