"""RopeScaling: how far RoPE is stretched when a model loads, so that it reads more than it was made for."""

import math
from dataclasses import dataclass

KINDS = ("linear", "yarn")  # static ones: others change with the longest sequence of a batch


@dataclass(frozen=True)
class RopeScaling:
    """One of KINDS, and by how much the context grows."""

    kind: str
    factor: float

    @classmethod
    def parse(cls, text: str) -> "RopeScaling":
        """From KIND:FACTOR. Raises ValueError with what would fit."""
        kind, _, number = text.partition(":")
        try:
            factor = float(number)
        except ValueError:
            factor = math.nan
        if kind not in KINDS or not 1 < factor < math.inf:
            raise ValueError(
                f"{text!r} is not {' or '.join(f'{kind}:FACTOR' for kind in KINDS)} with a factor above 1,"
                " such as yarn:2 for twice the context"
            )
        return cls(kind, factor)


def check_rope_scaling(text: str) -> str:
    """The text, if it can be read as one."""
    RopeScaling.parse(text)
    return text
