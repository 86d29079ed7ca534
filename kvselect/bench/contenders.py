"""Who stands beside kvselect: attention and selection as somebody would write them with torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from kvselect.selection import LIST_ALIGNMENT, Selection

__all__ = [
    "BOUND",
    "ENABLE_GQA",
    "FOLDED",
    "MATMUL",
    "TORCH_DENSE",
    "TORCH_TOKEN_SELECT",
    "DisagreementError",
    "TorchTokenSelect",
    "attention_over",
    "dense_attention",
    "matmul_attention",
    "require_agreement",
]

# Of an output against float32. Values are random, so an output is a small mean of large numbers,
# and arrangements that round the weights to the storage dtype lose more than one rounding.
BOUND = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3.2e-2}

ENABLE_GQA = "torch SDPA, enable_gqa"
FOLDED = "torch SDPA, group folded"
MATMUL = "torch matmul-softmax-matmul"
TORCH_DENSE = (ENABLE_GQA, FOLDED, MATMUL)
TORCH_TOKEN_SELECT = "TokenSelect as torch ops"


class DisagreementError(RuntimeError):
    """An output is further from float32 than its dtype explains: nothing is timed then."""


def require_agreement(name: str, tokens: int, error: float, bound: float) -> None:
    """Raise DisagreementError unless ``error <= bound``."""
    if not error <= bound:
        raise DisagreementError(
            f"{name}, {tokens} tokens: got an output {error:.1e} from float32, "
            f"allowed: {bound:.1e}; nothing was timed"
        )


def folded(q: Tensor, num_kv_heads: int) -> Tensor:
    """[1, 1, num_q_heads, head_dim] as [1, num_kv_heads, group, head_dim]."""
    return q.view(1, num_kv_heads, -1, q.shape[-1])


def dense_attention(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One of `TORCH_DENSE`; ``q`` [1, 1, num_q_heads, head_dim], ``k``, ``v`` [1, num_kv_heads,
    seqlen_k, head_dim]."""
    if name == ENABLE_GQA:
        return scaled_dot_product_attention(q.transpose(1, 2), k, v, enable_gqa=True)
    rows = folded(q, k.shape[1])
    if name == FOLDED:
        return scaled_dot_product_attention(rows, k, v)
    return matmul_attention(rows, k, v)


def matmul_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Group folded into the query length, two batched products: torch's best on CPU at batch 1.

    The scale goes to the query and the softmax stays in the storage dtype (float32 inside): passes
    over the weights in float32 cost a quarter more.
    """
    return torch.softmax((q * q.shape[-1] ** -0.5) @ k.transpose(2, 3), -1) @ v


class TorchTokenSelect:
    """TokenSelect's decode step on exact keys, step for step with torch operators.

    Each step is the fastest way found: votes added by a product with ones (a sum over a middle dim
    takes 20 times as long), rows fetched by `embedding` (20 times faster than gather).

    Parameters
    ----------
    k, v : Tensor, [1, num_kv_heads, seqlen_k, head_dim], contiguous
    num_sink_tokens, num_recent_tokens : int
    """

    def __init__(self, k: Tensor, v: Tensor, num_sink_tokens: int, num_recent_tokens: int) -> None:
        self._k = k
        heads, n = k.shape[1:3]
        self._rows = [x.reshape(-1, x.shape[-1]) for x in (k, v)]
        self._head_start = (torch.arange(heads) * n)[:, None]
        self._first, self._last = num_sink_tokens, n - num_recent_tokens
        ends = torch.cat([torch.arange(self._first), torch.arange(self._last, n)])
        self._ends = ends.expand(heads, -1)

    def indices(self, q: Tensor, topk: int) -> Tensor:
        """Positions listed, [num_kv_heads, tokens]: sinks, recent tokens, the picked ones."""
        rows = folded(q, self._k.shape[1]) * q.shape[-1] ** -0.5
        weights = torch.softmax(rows @ self._k.transpose(2, 3), -1, dtype=torch.float32)[0]
        votes = (torch.ones(1, weights.shape[1]) @ weights)[:, 0, self._first : self._last]
        picked = votes.topk(topk, -1, sorted=False).indices.sort(-1).values + self._first
        return torch.cat([self._ends, picked], 1)

    def step(self, q: Tensor, topk: int) -> Tensor:
        """One decode step, selection included: [1, num_kv_heads, group, head_dim]."""
        listed = self.indices(q, topk) + self._head_start
        k, v = (embedding(listed, rows)[None] for rows in self._rows)
        return matmul_attention(folded(q, self._k.shape[1]), k, v)

    def selection(self, q: Tensor, topk: int) -> Selection:
        """What `step` attends to, as kvselect's ops take it."""
        index = self.indices(q, topk).sort(-1).values.int()
        heads, count = index.shape
        width = -(-count // LIST_ALIGNMENT) * LIST_ALIGNMENT
        padded = torch.full((1, heads, width), -1, dtype=torch.int32)
        padded[0, :, :count] = index
        return Selection(padded, torch.full((1, heads), count, dtype=torch.int32))


def attention_over(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None) -> Tensor:
    """Attention over what a Selection lists, in float32, one KV head at a time.

    What every contender's output is compared with.

    Parameters
    ----------
    q : Tensor, [1, 1, num_q_heads, head_dim]
    k, v : Tensor, [1, num_kv_heads, seqlen_k, head_dim]
    selection : Selection or None
        None: everything.

    Returns
    -------
    Tensor, [num_kv_heads, group, head_dim], float32
    """
    rows, outs = folded(q, k.shape[1])[0].float(), []
    for head in range(k.shape[1]):
        keys, values = k[0, head], v[0, head]
        if selection is not None:
            count = int(selection.topk_length[0, head])
            listed = selection.indices[0, head, :count].long()
            keys, values = keys[listed], values[listed]
        logits = rows[head] @ keys.float().T * q.shape[-1] ** -0.5
        outs.append(torch.softmax(logits, -1) @ values.float())
    return torch.stack(outs)
