"""One layer's gate, trained to say which pages get attention: from features alone, the model is not needed.

A gate starts as mean query times mean key, the baseline that it has to beat, and layers know nothing of each
other: a layer that is done is a checkpoint, and the same again whenever it is trained again.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.gate_features import Features, GateKind, Weights
from engine.rope import Rotation

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

    gate: Weights
    before: float  # as mean query times mean key
    after: float


def train_layer(
    kind: GateKind, seen: Features, unseen: Features, rotation: Rotation | None, recipe: Recipe, layer: int
) -> Trained:
    """Features [S, ...] of one layer: those of the pieces to learn from, and of those to judge by."""
    gate = kind.start(seen)
    before = divergence(kind, gate, unseen, rotation, recipe.target)
    optimizer = torch.optim.AdamW(
        [gate.k.requires_grad_(), gate.q.requires_grad_()], lr=recipe.rate, weight_decay=0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, recipe) / recipe.rate)
    draw = torch.Generator().manual_seed(recipe.seed * 1_000_003 + layer)
    count = seen.q.shape[0]
    for _ in range(recipe.steps):
        picked = torch.randint(count, (min(BATCH, count),), generator=draw).to(seen.q.device)
        batch = Features(*(tensor[picked] for tensor in (seen.q, seen.k, seen.top, seen.mass)))
        optimizer.zero_grad()
        loss(kind, gate, batch, rotation, recipe.target).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    done = Weights(gate.k.detach(), gate.q.detach())
    return Trained(done, before, divergence(kind, done, unseen, rotation, recipe.target))


@torch.no_grad()
def divergence(
    kind: GateKind, gate: Weights, features: Features, rotation: Rotation | None, target: str
) -> float:
    """KL of a gate's softmax over pages from the attention they get, in nats: mean of heads and rows."""
    scores, wanted = _said_and_wanted(kind, gate, features, rotation, target)
    return float(_kl(scores, _shares(wanted), kind.pages(features)[0]).mean())


def loss(kind: GateKind, gate: Weights, features: Features, rotation: Rotation | None, target: str) -> Tensor:
    """Divergence over all pages, and over those not read anyway: there, rows count as they look at them.

    The newest page and the first draw most of the attention, and no gate needs to tell. What it has to rank
    are the others, above all in the few heads and rows that look far back.
    """
    scores, wanted = _said_and_wanted(kind, gate, features, rotation, target)
    past, free = kind.pages(features)
    whole = _kl(scores, _shares(wanted), past)
    return (whole + FREE_WEIGHT * _kl(scores, wanted.masked_fill(~free, 0), free)).mean()


def _said_and_wanted(
    kind: GateKind, gate: Weights, features: Features, rotation: Rotation | None, target: str
) -> tuple[Tensor, Tensor]:
    """What a gate says and what it should, of pages that it speaks of: [S, H, R, P]."""
    scores = kind.scores(gate, features, rotation)
    wanted = (features.top if target == "max" else features.mass)[..., -scores.shape[-2] :, :]
    return scores, wanted.masked_fill(~kind.pages(features)[0], 0)


def _shares(wanted: Tensor) -> Tensor:
    return wanted / wanted.sum(-1, keepdim=True)


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
