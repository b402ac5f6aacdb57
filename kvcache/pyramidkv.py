"""PyramidKV: SnapKV whose lower layers keep more and higher layers less. https://arxiv.org/abs/2406.02069"""

from dataclasses import dataclass

from torch import Tensor

from kvcache.pool import pages_for
from kvcache.snapkv import SnapKV, largest


@dataclass
class PyramidKV(SnapKV):
    """`budget` is the mean over the layers; the heads of a layer keep alike."""

    beta: int = 20  # the last layer keeps 1 / beta of the mean (its window aside); 1 = every layer alike

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise ValueError(f"beta ({self.beta}) must be at least 1 (1 = every layer alike)")

    def pages_after_prefill(self, prompt: int, total: int) -> int:
        if prompt <= self.budget:
            return super().pages_after_prefill(prompt, total)
        always = self.query_window + total - prompt
        return self._num_kv_heads * sum(pages_for(past + always) for past in self.past_by_layer(prompt))

    def past_by_layer(self, prompt: int) -> list[int]:
        """Tokens before the window that each layer keeps of a prompt beyond the budget: [L], never rising.

        Published with steps cut to whole tokens, which keeps more than the budget. Here layer l and the l-th
        from the end mirror each other around the mean, so that the sum is exactly L times it.
        """
        mean = self._past_budget
        most = 2 * mean - mean // self.beta
        if prompt < 2 * mean:
            most = mean  # too short a prompt to be worth a slope
        most = min(most, prompt - self.query_window)
        fall = 2 * (most - mean)  # from the first layer to the last
        lower = [most - layer * fall // (self._num_layers - 1) for layer in range(self._num_layers // 2)]
        middle = [mean] * (self._num_layers % 2)
        return [*lower, *middle, *(2 * mean - past for past in reversed(lower))]

    def _choose(self, layer: int, scores: Tensor) -> Tensor:
        return largest(scores, self.past_by_layer(scores.shape[1] + self.query_window)[layer])
