"""One layer's gate, trained to say which pages get attention: from features alone, the model is not needed.

A gate starts as mean query times mean key, the baseline that it has to beat, and layers know nothing of each
other: a layer that is done is a checkpoint, and the same again whenever it is trained again.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.gate_features import Features
from engine.rope import Rotation
from sparse.gate_files import Gate
from sparse.seerattention import gate_scores

WARM_UP = 20  # steps
LAST_RATE = 1e-5
BATCH = 4  # pieces a step
FREE_WEIGHT = 4.0  # of pages that are not read anyway, in the loss
TARGETS = ("max", "sum")


@dataclass(frozen=True)
class Recipe:
    """How gates learn."""

    steps: int = 600
    rate: float = 3e-3  # of AdamW, after the warm-up
    target: str = "max"  # of a page's attention: its largest probability, as published, or its sum
    seed: int = 0


@dataclass(frozen=True)
class Trained:
    """A gate, and its divergence (KL in nats, see `divergence`) from the attention of pieces it never saw."""

    gate: Gate
    before: float  # as mean query times mean key
    after: float


def train_layer(
    seen: Features, unseen: Features, rotation: Rotation | None, recipe: Recipe, layer: int
) -> Trained:
    """Features [S, ...] of one layer: those of the pieces to learn from, and of those to judge by."""
    gate = mean_gate(seen)
    assert gate.q is not None
    before = divergence(gate, unseen, rotation, recipe.target)
    weights = [gate.k.requires_grad_(), gate.q.requires_grad_()]
    optimizer = torch.optim.AdamW(weights, lr=recipe.rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe) / recipe.rate)
    draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + layer)
    count = seen.q.shape[0]
    for _ in range(recipe.steps):
        picked = torch.randint(count, (min(BATCH, count),), generator=draw).to(seen.q.device)
        batch = Features(*(tensor[picked] for tensor in (seen.q, seen.k, seen.top, seen.mass)))
        optimizer.zero_grad()
        loss(gate, batch, rotation, recipe.target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    done = Gate(gate.k.detach(), gate.q.detach())
    return Trained(done, before, divergence(done, unseen, rotation, recipe.target))


def mean_gate(features: Features) -> Gate:
    """A gate that multiplies mean queries and mean keys as they are."""
    num_heads, size = features.q.shape[1], features.q.shape[3]
    own = torch.eye(size, device=features.q.device)
    k = torch.cat((torch.zeros(2 * size, size, device=own.device), own))
    return Gate(k.repeat(features.k.shape[1], 1, 1), own.repeat(num_heads, 1, 1))


@torch.no_grad()
def divergence(gate: Gate, features: Features, rotation: Rotation | None, target: str) -> float:
    """KL of a gate's softmax over pages from the attention they get, in nats: mean of heads and blocks."""
    scores, wanted, past = _scores(gate, features, rotation, target)
    return float(_kl(scores, wanted / wanted.sum(-1, keepdim=True), past).mean())


def loss(gate: Gate, features: Features, rotation: Rotation | None, target: str) -> Tensor:
    """Divergence over all pages, and over those not read anyway: there, blocks count as they look at them.

    A block's own page and the first draw most of its attention, and no gate needs to tell. What it has to
    rank are the others, above all in the few heads and blocks that look far back.
    """
    scores, wanted, past = _scores(gate, features, rotation, target)
    num_pages = past.shape[1]
    page = torch.arange(num_pages, device=past.device)
    free = past & (page != 0) & (page < page[-past.shape[0] :, None])
    whole = _kl(scores, wanted / wanted.sum(-1, keepdim=True), past)
    return (whole + FREE_WEIGHT * _kl(scores, wanted.masked_fill(~free, 0), free)).mean()


def _scores(
    gate: Gate, features: Features, rotation: Rotation | None, target: str
) -> tuple[Tensor, Tensor, Tensor]:
    """What a gate says and what it should, [S, Hq, B, P], and bool [B, P]: pages that a block may read."""
    num_pages = features.q.shape[-2]
    page = torch.arange(num_pages, device=features.q.device)
    blocks = page[num_pages // 4 :]  # early ones have little to choose from, and would rule the mean
    scores = gate_scores(gate, features.q[..., num_pages // 4 :, :], features.k, blocks, rotation)
    wanted = (features.top if target == "max" else features.mass)[..., num_pages // 4 :, :]
    return scores, wanted, page <= blocks[:, None]


def _kl(scores: Tensor, wanted: Tensor, among: Tensor) -> Tensor:
    """Sum of wanted * log(share / softmax) over some pages: [S, Hq, B]. Shares are of what is wanted."""
    said = scores.masked_fill(~among, float("-inf")).log_softmax(-1).masked_fill(~among, 0)
    total = wanted.sum(-1)
    return torch.xlogy(wanted, wanted).sum(-1) - torch.xlogy(total, total) - (wanted * said).sum(-1)


def _rate(step: int, recipe: Recipe) -> float:
    """Rises over the first steps, then falls along a cosine."""
    rise = min(1.0, (step + 1) / WARM_UP)
    fall = (1 + math.cos(math.pi * min(1.0, step / recipe.steps))) / 2
    return rise * (LAST_RATE + (recipe.rate - LAST_RATE) * fall)
