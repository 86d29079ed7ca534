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


def needed_share(
    lines: list[list[float]], num_visible: list[int], must: list[list[bool]], recall: float
) -> float:
    """Of one head, by trying every share; as `kvselect.block_masks.needed_shares`."""
    shares = {(i + 0.5) / max(v, 1) for v in num_visible for i in range(len(lines[0]))}
    total = sum(map(sum, lines))
    for share in sorted(shares):
        kept = 0.0
        for line, visible, required in zip(lines, num_visible, must):
            rank = [(not r, 0.0 if r else -x, i) for i, (x, r) in enumerate(zip(line, required))]
            order = [i for _, _, i in sorted(rank)]
            count = sum((place + 0.5) / max(visible, 1) <= share for place in range(len(line)))
            kept += sum(line[i] for i in order[:count])
        if kept >= recall * total:
            return min(share, 1.0)
    return 1.0


def apportioned(need: list[float], total: int, most: int) -> list[int]:
    """Blocks of every head, one by one; as `kvselect.block_masks.apportioned_blocks`."""
    counts = [min(1, most)] * len(need)
    while sum(counts) < min(total, most * len(need)):
        open_ = [h for h in range(len(need)) if counts[h] < most]
        counts[max(open_, key=lambda h: (need[h] / (counts[h] + 0.5), -h))] += 1
    return counts


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
