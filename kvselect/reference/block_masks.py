"""Kept blocks by mass, and how heads share them out."""

from __future__ import annotations

from torch import Tensor


def largest_blocks(
    mass: Tensor, sparsity: Tensor, num_visible: Tensor, mandatory: Tensor
) -> list[list[list[set[int]]]]:
    """Kept blocks, as sets by row, head and q block.

    Parameters
    ----------
    As `kvselect.block_masks.largest_blocks`.
    """
    batch, num_heads, num_q_blocks, _ = mass.shape
    kept: list[list[list[set[int]]]] = []
    for row in range(batch):
        kept.append([])
        for head in range(num_heads):
            kept[row].append([])
            for block in range(num_q_blocks):
                visible = int(num_visible[row, block])
                share = (1 - float(sparsity[row, head])) * visible
                count = min(max(1, round(share)), visible)
                line = mass[row, head, block].double().nan_to_num(0.0).tolist()
                must = mandatory[row, block].tolist()
                order = sorted(range(len(line)), key=lambda i: (not must[i], -line[i], i))
                kept[row][head].append({*order[:count], *(i for i in order if must[i])})
    return kept


def head_recall_split(recall: list[float], sparsity: float, threshold: float) -> list[float]:
    """A sparsity per head of one row; as `kvselect.block_masks.head_recall_split`."""
    order = sorted(range(len(recall)), key=lambda h: (-recall[h], h))
    moved = min(sum(r > threshold for r in recall), len(recall) // 2)
    split = [sparsity] * len(recall)
    for head in order[:moved]:
        split[head] = (1 + sparsity) / 2
    for head in order[len(order) - moved :]:
        split[head] = (3 * sparsity - 1) / 2
    return split
