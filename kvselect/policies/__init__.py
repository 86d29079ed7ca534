"""Selection methods, one file each; `POLICIES` knows them by name."""

from kvselect.policies.act_qkv import ActQKV
from kvselect.policies.adaspa import AdaSpa
from kvselect.policies.base import POLICIES, Policy, PolicyState, policy_from_dict
from kvselect.policies.column_rank import ColumnRank
from kvselect.policies.coverage import Coverage
from kvselect.policies.dense import Dense
from kvselect.policies.dilate import Dilate
from kvselect.policies.dilated import Dilated
from kvselect.policies.infllm import InfLLM
from kvselect.policies.landmark import Landmark
from kvselect.policies.layer_schedule import LayerSchedule
from kvselect.policies.max_min import MaxMin
from kvselect.policies.quest import Quest
from kvselect.policies.region_quota import RegionQuota
from kvselect.policies.snapkv import SnapKV
from kvselect.policies.spatten import SpAtten
from kvselect.policies.streaming_llm import StreamingLLM
from kvselect.policies.token_select import TokenSelect

__all__ = [
    "POLICIES",
    "ActQKV",
    "AdaSpa",
    "ColumnRank",
    "Coverage",
    "Dense",
    "Dilate",
    "Dilated",
    "InfLLM",
    "Landmark",
    "LayerSchedule",
    "MaxMin",
    "Policy",
    "PolicyState",
    "Quest",
    "RegionQuota",
    "SnapKV",
    "SpAtten",
    "StreamingLLM",
    "TokenSelect",
    "policy_from_dict",
]
