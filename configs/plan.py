"""The envelope of a plan file: which method, policy and decode method, and what holds for any of them."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator

from configs.model import PAGE_SIZE
from configs.schema import parse_count


class _Part(BaseModel):
    """Known keys are fields; all others are options of the named plug-in, checked when the plan is
    resolved."""

    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class PrefillPart(_Part):
    """What prefill may leave unread."""

    method: str = "dense"
    dense_below: Annotated[int, BeforeValidator(parse_count), Field(ge=0)] | Literal["auto"] = Field(
        0, description="prompts shorter than this many tokens run dense"
    )
    chunk: Annotated[int, BeforeValidator(parse_count), Field(ge=PAGE_SIZE)] = Field(
        2048, description="tokens of a prompt in one forward: the grid of grid methods; whole pages"
    )
    layers: dict[str, str] = Field(
        default_factory=dict, description="other methods for some layers: {'0-1': dense, '7': dense}"
    )
    recall_floor: float | None = Field(
        None, gt=0, le=1, description="a head whose sampled attention recall is lower reads everything"
    )
    delta: int | None = Field(
        None, ge=1, le=PAGE_SIZE, description="every so many rows one is read densely and corrects the others"
    )

    @field_validator("chunk")
    @classmethod
    def _whole_pages(cls, chunk: int) -> int:
        if chunk % PAGE_SIZE:
            raise ValueError(f"{chunk} is not a multiple of {PAGE_SIZE} (the tokens of a page)")
        return chunk

    @field_validator("delta")
    @classmethod
    def _divides_pages(cls, delta: int | None) -> int | None:
        if delta is not None and PAGE_SIZE % delta:
            raise ValueError(f"{delta} does not divide the {PAGE_SIZE} tokens of a page, where chunks begin")
        return delta

    @field_validator("layers", mode="before")
    @classmethod
    def _layer_names(cls, layers: Any) -> Any:
        if isinstance(layers, dict):
            layers = {str(key): value for key, value in layers.items()}  # YAML reads `7:` as a number
            for key in layers:
                if not re.fullmatch(r"\d+(-\d+)?", key):
                    raise ValueError(f"{key!r} is not a layer such as 7 or a range such as 0-1")
        return layers


class KVPart(_Part):
    """What the cache may forget."""

    policy: str = "keep_all"


class DecodePart(_Part):
    """What decode may leave unread."""

    method: str = "full"


class PlanFile(BaseModel):
    """One plan as written. `source` is the file it came from: relative paths in it start from there."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefill: PrefillPart = PrefillPart()
    kv: KVPart = KVPart()
    decode: DecodePart = DecodePart()

    name: str = Field(exclude=True)
    source: Path = Field(exclude=True)
