"""Who stands beside kvselect: attention and selection as somebody would write them with torch."""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor
from torch.nn.functional import embedding, scaled_dot_product_attention

from kvselect.cache import KVCache
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
    "exact_dtype",
    "exact_mass",
    "folded",
    "matmul_attention",
    "require_agreement",
    "selection_from",
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
    """[batch, 1, num_q_heads, head_dim] as [batch, num_kv_heads, group, head_dim]."""
    return q.view(q.shape[0], num_kv_heads, -1, q.shape[-1])


def dense_attention(name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One of `TORCH_DENSE`; ``q`` [batch, 1, num_q_heads, head_dim], ``k``, ``v`` [batch,
    num_kv_heads, seqlen_k, head_dim]."""
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
    k, v : Tensor, [batch, num_kv_heads, seqlen_k, head_dim], contiguous
    num_sink_tokens, num_recent_tokens : int
    """

    def __init__(self, k: Tensor, v: Tensor, num_sink_tokens: int, num_recent_tokens: int) -> None:
        self._k = k
        heads, n = k.shape[0] * k.shape[1], k.shape[2]
        self._rows = [x.reshape(-1, x.shape[-1]) for x in (k, v)]
        self._head_start = (torch.arange(heads, device=k.device) * n)[:, None]
        self._first, self._last = num_sink_tokens, n - num_recent_tokens
        ends = torch.cat([torch.arange(self._first), torch.arange(self._last, n)]).to(k.device)
        self._ends = ends.expand(heads, -1)
        self._ones = torch.ones(1, 1, device=k.device)

    def indices(self, q: Tensor, topk: int) -> Tensor:
        """Positions listed, [batch * num_kv_heads, tokens]: sinks, recent tokens, picked ones."""
        rows = folded(q, self._k.shape[1]) * q.shape[-1] ** -0.5
        weights = torch.softmax(rows @ self._k.transpose(2, 3), -1, dtype=torch.float32)
        votes = (self._ones.expand(1, weights.shape[2]) @ weights).flatten(0, 2)
        votes = votes[:, self._first : self._last]
        picked = votes.topk(topk, -1, sorted=False).indices.sort(-1).values + self._first
        return torch.cat([self._ends, picked], 1)

    def step(self, q: Tensor, topk: int) -> Tensor:
        """One decode step, selection included: [batch, num_kv_heads, group, head_dim]."""
        listed = (self.indices(q, topk) + self._head_start).view(*self._k.shape[:2], -1)
        k, v = (embedding(listed, rows) for rows in self._rows)
        return matmul_attention(folded(q, self._k.shape[1]), k, v)

    def selection(self, q: Tensor, topk: int) -> Selection:
        """What `step` attends to, as kvselect's ops take it."""
        index = self.indices(q, topk).sort(-1).values.int()
        return selection_from(index.view(*self._k.shape[:2], -1))


def selection_from(index: Tensor) -> Selection:
    """Full lists of ascending positions, [batch, num_kv_heads, count], as kvselect's ops take
    them."""
    count = index.shape[-1]
    width = -(-count // LIST_ALIGNMENT) * LIST_ALIGNMENT
    indices = index.new_full((*index.shape[:2], width), -1, dtype=torch.int32)
    indices[..., :count] = index.int()
    return Selection(indices, index.new_full(index.shape[:2], count, dtype=torch.int32))


def attention_over(q: Tensor, k: Tensor, v: Tensor, selection: Selection | None) -> Tensor:
    """Attention over what a Selection lists, one KV head at a time.

    What every contender's output is compared with: in float32, on a GPU in float64.

    Parameters
    ----------
    q : Tensor, [batch, 1, num_q_heads, head_dim]
    k, v : Tensor, [batch, num_kv_heads, seqlen_k, head_dim]
    selection : Selection or None
        None: everything.

    Returns
    -------
    Tensor, [batch, num_kv_heads, group, head_dim]
    """
    exact = exact_dtype(q.device)
    rows, outs = folded(q, k.shape[1]).to(exact), []
    for row, head in product(range(k.shape[0]), range(k.shape[1])):
        keys, values = k[row, head], v[row, head]
        if selection is not None:
            count = int(selection.topk_length[row, head])
            listed = selection.indices[row, head, :count].long()
            keys, values = keys[listed], values[listed]
        logits = rows[row, head] @ keys.to(exact).T * q.shape[-1] ** -0.5
        outs.append(torch.softmax(logits, -1) @ values.to(exact))
    return torch.stack(outs).view(rows.shape)


def exact_mass(q: Tensor, cache: KVCache, selection: Selection) -> Tensor:
    """Share of each query head's attention mass inside its list, [batch, num_q_heads].

    What `kvselect.recovered_mass` gives, by torch operators on any device.
    """
    exact, heads = exact_dtype(q.device), cache.num_kv_heads
    rows, found = folded(q, heads).to(exact), []
    for row, head in product(range(q.shape[0]), range(heads)):
        logits = rows[row, head] @ cache.k[row, :, head].to(exact).T * q.shape[-1] ** -0.5
        count = int(selection.topk_length[row, head])
        listed = selection.indices[row, head, :count].long()
        found.append(torch.softmax(logits, -1)[:, listed].sum(-1))
    return torch.stack(found).view(q.shape[0], -1)


def exact_dtype(device: torch.device) -> torch.dtype:
    """Of what outputs are compared with: float64 costs a CPU too much, and a GPU nothing."""
    return torch.float64 if device.type == "cuda" else torch.float32
