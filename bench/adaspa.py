"""Does a block mask that is searched twice in fifty steps keep a drifting diffusion loop on course?

Two attention layers in the shape of a video diffusion transformer (frames of a grid, no causal
mask, weights drawn with heads of different reach), fifty denoising steps whose input drifts. The
blocks are those of most exact mass (`RepeatedAttention`, searched at steps 10 and 30), at sparsity
0.8 and 0.9, with and without budgets moved between heads (in two levels, or in proportion to need),
with and without kept normalisers.
Simulated: no trained model. Expected: sparse calls under 0.4 and 0.3 of dense time, the least
recall of any head higher with the split, at equal blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvselect import AdaSpa, block_mass, block_sparse_attention
from kvselect.bench import measure, results
from kvselect.bench.request import parse, script_parser
from kvselect.block_masks import head_recall
from kvselect.repeated_attention import RepeatedAttention
from kvselect.testing import rel_err

SEARCH_AT = (10, 30)
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One way through the loop. Times are of one attention call; recalls and overlap of the last
    step's inputs, least over layers and heads."""

    sparsity: float
    head_split: str | None
    kept_lse: bool
    tokens: int
    steps: int
    num_searches: int
    kept_share: float
    output_error: float
    latent_error: float
    least_recall: float
    mean_recall: float
    kept_lse_overlap: float
    attention_ms: float
    search_ms: float
    search_kept_lse_ms: float
    dense_ms: float
    over_dense: float
    sdpa_ms: float
    threads: int
    clock: str
    samples_ms: dict[str, list[float]]


class Loop:
    """Layers, positions and noise, all drawn once: every way through takes the same ones."""

    def __init__(self, frames: int, side: int, heads: int, head_dim: int, steps: int) -> None:
        self.steps, self.heads, self.head_dim = steps, heads, head_dim
        generator = torch.Generator().manual_seed(0)
        draw = partial(torch.randn, generator=generator)
        width = heads * head_dim
        axes = torch.meshgrid(
            torch.arange(frames), torch.arange(side), torch.arange(side), indexing="ij"
        )
        place = torch.stack(axes, -1).view(-1, 3).float()
        # Random features of a kernel that falls with distance: near tokens have like positions.
        waves = draw(3, width) * torch.tensor([0.5, 0.35, 0.35])[:, None]
        self.positions = (place @ waves + 6.3 * torch.rand(width, generator=generator)).cos() * 1.4
        self.layers = []
        for _ in range(2):
            shared = draw(width, heads, head_dim) / width**0.5
            own = [draw(width, heads, head_dim) / width**0.5 for _ in range(2)]
            # Alike enough that a token looks for tokens like itself; heads from broad to sharp.
            sharp = torch.linspace(0.8, 3.0, heads)[:, None]
            q, k = ((shared + 0.5 * other) * sharp for other in own)
            v, out = draw(width, heads, head_dim) / width**0.5, draw(width, width) / width**0.5
            self.layers.append((q, k, v, out))
        self.noise = draw(steps, place.shape[0], width)
        self.start = draw(place.shape[0], width)

    def run(self, attend: Attend) -> Tensor:
        """The latent after all steps; ``attend`` gets (step * layers + layer, q, k, v)."""
        x = self.start
        for step in range(self.steps):
            level = 1.0 - step / self.steps
            hidden = torch.nn.functional.layer_norm(x, x.shape[-1:]) + self.positions
            for number, (wq, wk, wv, out) in enumerate(self.layers):
                normed = torch.nn.functional.layer_norm(hidden, x.shape[-1:])
                q, k, v = (torch.einsum("tw,whd->thd", normed, w)[None] for w in (wq, wk, wv))
                mixed = attend(2 * step + number, q, k, v)[0].flatten(1)
                hidden = hidden + mixed @ out
            x = x + 0.1 * (hidden - self.positions - x) + 0.03 * level * self.noise[step]
        return x


def run_one(loop: Loop, policy: AdaSpa, kept_lse: bool, rounds: int) -> Row:
    layers = [
        RepeatedAttention(policy, search_at=SEARCH_AT, keep_lse=kept_lse) for _ in loop.layers
    ]
    size = policy.block_size
    sizes = {"q_block_size": size, "kv_block_size": size, "causal": False}
    errors: list[float] = []
    last: list[tuple[Tensor, Tensor, Tensor]] = []
    stale: dict[int, Tensor] = {}

    def dense(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        blocks = -(-k.shape[1] // size)
        full = torch.ones(1, 1, blocks, blocks, dtype=torch.bool)
        out, lse = block_sparse_attention(q, k, v, full, **sizes)  # type: ignore[arg-type]
        return out, lse

    def sparse(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step, layer = divmod(number, len(loop.layers))
        out, _ = layers[layer](q, k, v)
        if step == SEARCH_AT[0]:
            stale[layer] = dense(q, k, v)[1]
        if step > SEARCH_AT[0] and step % 5 == 0:
            errors.append(rel_err(out, dense(q, k, v)[0]))
        if step == loop.steps - 1:
            last.append((q, k, v))
        return out

    latent = loop.run(sparse)
    wanted = loop.run(lambda _, q, k, v: dense(q, k, v)[0])
    recalls, overlaps, shares = [], [], []
    for layer, (q, k, _) in enumerate(last):
        mask = layers[layer].mask
        assert mask is not None
        mass = block_mass(q, k, **sizes)  # type: ignore[arg-type]
        old = block_mass(q, k, lse=stale[layer], **sizes)  # type: ignore[arg-type]
        recalls.append(head_recall(mass, mask.unpack()))
        shares.append(float(mask.unpack().float().mean()))
        fresh, cached = (kept_blocks(policy, m) for m in (mass, old))
        overlaps.append(float((fresh & cached).sum() / fresh.sum()))
    q, k, v = last[0]
    mask = layers[0].mask
    assert mask is not None
    unpacked = mask.unpack()
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    calls = {
        "sparse": partial(block_sparse_attention, q, k, v, unpacked, **sizes),
        "dense": partial(dense, q, k, v),
        "sdpa": partial(torch.nn.functional.scaled_dot_product_attention, *heads),
        "search": partial(block_mass, q, k, **sizes),
        "search, kept lse": partial(block_mass, q, k, lse=stale[0], **sizes),
    }
    contenders = {name: measure.Contender(call=call) for name, call in calls.items()}
    with measure.threads(1):
        samples = measure.interleaved_ms(contenders, rounds, num_threads=1)
    ms = {name: measure.quantiles(times).median for name, times in samples.items()}
    recall = torch.cat(recalls)
    return Row(
        sparsity=policy.sparsity,
        head_split=None if policy.recall_threshold is None else policy.head_split,
        kept_lse=kept_lse,
        tokens=q.shape[1],
        steps=loop.steps,
        num_searches=layers[0].num_searches,
        kept_share=sum(shares) / len(shares),
        output_error=max(errors),
        latent_error=rel_err(latent, wanted),
        least_recall=float(recall.min()),
        mean_recall=float(recall.mean()),
        kept_lse_overlap=min(overlaps),
        attention_ms=ms["sparse"],
        search_ms=ms["search"],
        search_kept_lse_ms=ms["search, kept lse"],
        dense_ms=ms["dense"],
        over_dense=ms["sparse"] / ms["dense"],
        sdpa_ms=ms["sdpa"],
        threads=1,
        clock=measure.clock_name(1),
        samples_ms=samples,
    )


def kept_blocks(policy: AdaSpa, mass: Tensor) -> Tensor:
    """What a search by ``mass`` keeps, without mandatory blocks."""
    batch, _, num_q_blocks, num_blocks = mass.shape
    visible = torch.full((batch, num_q_blocks), num_blocks)
    none = torch.zeros(batch, num_q_blocks, num_blocks, dtype=torch.bool)
    return policy.search(mass, visible, none).unpack()


def show(rows: Sequence[Row]) -> None:
    first = rows[0]
    columns = ("sparsity", "split", "kept lse", "kept", "sparse ms", "over dense", "search ms")
    more = (
        "(kept lse)",
        "dense ms",
        "SDPA ms",
        "error",
        "latent",
        "least recall",
        "mean",
        "overlap",
    )
    results.print_table(
        f"{first.tokens} tokens, {first.steps} steps, searched at {SEARCH_AT}, 1 thread "
        f"({first.clock} time); error: worst step's attention against dense; overlap: blocks that "
        "masses by the normalisers of step 10 and by fresh ones agree on at the end",
        (*columns, *more),
        [
            (
                f"{row.sparsity}",
                row.head_split or "no",
                "yes" if row.kept_lse else "no",
                f"{row.kept_share:.1%}",
                f"{row.attention_ms:.1f}",
                f"{row.over_dense:.2f}",
                f"{row.search_ms:.1f}",
                f"{row.search_kept_lse_ms:.1f}",
                f"{row.dense_ms:.1f}",
                f"{row.sdpa_ms:.1f}",
                f"{row.output_error:.3f}",
                f"{row.latent_error:.4f}",
                f"{row.least_recall:.3f}",
                f"{row.mean_recall:.3f}",
                f"{row.kept_lse_overlap:.3f}",
            )
            for row in rows
        ],
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = script_parser(__doc__, __file__)
    parser.add_argument("--frames", type=int, default=6)
    parser.add_argument("--side", type=int, default=16, help="rows and columns of a frame")
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    quick = {"frames": 2, "side": 8, "heads": 4, "head_dim": 32, "steps": 32, "rounds": 1}
    options = parse(parser, arguments, quick=quick | {"block_size": 16})
    loop = Loop(options.frames, options.side, options.heads, options.head_dim, options.steps)
    rows = []
    for sparsity in (0.8, 0.9):
        sizes: dict[str, Any] = {"sparsity": sparsity, "block_size": options.block_size}
        even, split = AdaSpa(**sizes, recall_threshold=None), AdaSpa(**sizes)
        needed = AdaSpa(**sizes, head_split="proportional")
        for policy, kept_lse in ((even, False), (split, False), (split, True), (needed, False)):
            rows.append(run_one(loop, policy, kept_lse, options.rounds))
    show(rows)
    print("written:", results.save(options.out, parser.description or "", vars(options), rows))


if __name__ == "__main__":
    main()
