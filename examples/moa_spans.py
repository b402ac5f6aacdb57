"""A plan file for the policy `moa`: how far back each KV head of a model looks, within a mean span.

    python examples/moa_spans.py smollm2 --text examples/texts/pride-and-prejudice.txt --out spans.json

One forward over a text, page by page of 64 tokens: how much of its attention each head pays to pages at each
distance, beside the first page, which MoA always keeps. Every head then gets a span of some sixteenths of the
text, so that as little attention as can be is lost at the mean that was asked for. MoA as published weighs
what is lost by its influence on the loss of answers, which takes a backward pass and many questions: this is
the short way.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from torch import Tensor

from configs.model import PAGE_SIZE
from configs.schema import EngineConfig
from engine.models import load_model, prepare_model

STEPS = 16  # a span is one of so many parts of the text
NAME = "looking"  # transformers knows our attention by it


class Looking:
    """Exact attention that notes how far back heads look: `lost[l][h, d]` beyond d pages, mean over rows."""

    def __init__(self) -> None:
        self.lost: list[Tensor] = []  # by layer [Hkv, P + 1]

    def __call__(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: float, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """q [1, Hq, N, D], k and v [1, Hkv, N, D] -> [1, N, Hq, D]. N is a whole number of pages."""
        num_kv_heads, length = k.shape[1], k.shape[2]
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        outs, lost = [], []
        for head in range(num_kv_heads):
            group = q[0].view(num_kv_heads, -1, length, q.shape[3])[head]
            weights = (scaling * (group @ k[0, head].T)).masked_fill_(later, -torch.inf).softmax(-1)
            outs.append(weights @ v[0, head])
            lost.append(_lost_beyond(weights))
        self.lost.append(torch.stack(lost))
        return torch.cat(outs).transpose(0, 1)[None], None


def _lost_beyond(weights: Tensor) -> Tensor:
    """Attention to pages farther back than each distance, the first page aside: [G, N, N] -> [P + 1]."""
    pages = weights.shape[1] // PAGE_SIZE
    by_page = weights.view(weights.shape[0], pages, PAGE_SIZE, pages, PAGE_SIZE).sum((2, 4)).mean(0)  # [P, P]
    by_page[:, 0] = 0
    at_distance = torch.stack([by_page.diagonal(-distance).sum() for distance in range(pages)])
    return torch.cat((at_distance.flip(0).cumsum(0).flip(0), at_distance.new_zeros(1))) / weights.shape[1]


def near_pages(steps: Tensor, pages: int) -> Tensor:
    """Pages a head reads of a text of so many pages, its own among them, as the policy computes them."""
    return (-(-steps * pages // STEPS)).clamp(min=2) - 1


def choose(lost: Tensor, mean: float) -> Tensor:
    """Steps by head [R], at most mean * STEPS on average, that lose least attention. lost [R, P + 1]."""
    steps = torch.arange(1, STEPS + 1)
    cost = lost[:, near_pages(steps, lost.shape[1] - 1)]  # [R, STEPS]
    low, high = 0.0, 1.0  # the price of a step
    for _ in range(50):
        price = (low + high) / 2
        chosen = (cost + price * steps).argmin(1) + 1
        low, high = (low, price) if chosen.float().mean() <= mean * STEPS else (price, high)
    return (cost + high * steps).argmin(1) + 1


@torch.inference_mode()
def look(model: Any, tokens: list[int]) -> Tensor:
    """[L, Hkv, P + 1]."""
    looking = Looking()
    transformers.AttentionInterface.register(NAME, looking)
    model(input_ids=torch.tensor([tokens]), use_cache=False, logits_to_keep=1)
    return torch.stack(looking.lost)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="as for `farspan serve`")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048, help="of the text, a multiple of 64")
    parser.add_argument("--mean", type=float, default=0.5, help="mean span, as a part of the text")
    asked = parser.parse_args()
    folder = prepare_model(EngineConfig(model=asked.model))
    transformers.AttentionInterface.register(NAME, Looking())
    model = load_model(folder, dtype="float32", device="cpu", attention=NAME)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokens = tokenizer.encode(asked.text.read_text()).ids
    lost = look(model, tokens[: asked.tokens])
    shape = lost.shape[:2]
    steps = choose(lost.flatten(0, 1), asked.mean)
    betas = (steps / STEPS).view(shape)
    asked.out.write_text(json.dumps({"alphas": torch.zeros(shape).tolist(), "betas": betas.tolist()}) + "\n")
    unseen = look(model, tokens[-asked.tokens :]).flatten(0, 1)
    pages = unseen.shape[1] - 1
    uniform = near_pages(torch.tensor([round(asked.mean * STEPS)]), pages)
    print(
        f"mean span {float(betas.mean()):.3f} of the text; of the attention to another part of it,"
        f" {100 * float(unseen.gather(1, near_pages(steps, pages)[:, None]).mean()):.2f}% is lost,"
        f" {100 * float(unseen[:, uniform].mean()):.2f}% with one span for all heads"
    )


if __name__ == "__main__":
    main()
