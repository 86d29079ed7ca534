"""Votes of a layer whose heads are spread over the ranks of a process group."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["ProcessGroup", "num_ranks", "sum_over_ranks"]

ProcessGroup: TypeAlias = "torch.distributed.ProcessGroup"


def num_ranks(group: ProcessGroup | None) -> int:
    """Ranks that share a layer's heads; None: one has them all."""
    return 1 if group is None else group.size()


def sum_over_ranks(votes: Tensor, group: ProcessGroup | None) -> Tensor:
    """``votes`` summed over all ranks, the same bits on each; in place where they are contiguous.

    One all-reduce of 4 bytes per token, row and query block. Without it ranks would choose
    different tokens for what is meant to be one list.
    """
    if group is None:
        return votes
    votes = votes.contiguous()
    torch.distributed.all_reduce(votes, group=group)
    return votes
