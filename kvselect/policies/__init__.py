"""Selection methods, one file each; `POLICIES` knows them by name."""

from kvselect.policies.adaspa import AdaSpa
from kvselect.policies.base import POLICIES, Policy, PolicyState, policy_from_dict
from kvselect.policies.coverage import Coverage
from kvselect.policies.dense import Dense
from kvselect.policies.dilate import Dilate
from kvselect.policies.dilated import Dilated
from kvselect.policies.layer_schedule import LayerSchedule
from kvselect.policies.max_min import MaxMin
from kvselect.policies.region_quota import RegionQuota
from kvselect.policies.snapkv import SnapKV
from kvselect.policies.streaming_llm import StreamingLLM
from kvselect.policies.token_select import TokenSelect

__all__ = [
    "POLICIES",
    "AdaSpa",
    "Coverage",
    "Dense",
    "Dilate",
    "Dilated",
    "LayerSchedule",
    "MaxMin",
    "Policy",
    "PolicyState",
    "RegionQuota",
    "SnapKV",
    "StreamingLLM",
    "TokenSelect",
    "policy_from_dict",
]
