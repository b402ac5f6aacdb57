"""What clients may ask an answer to look like, in the words of OpenAI and of vLLM."""

from typing import Annotated, Any, Literal

import msgspec
from pydantic import Field, StringConstraints, field_validator, model_validator

from server.bounds import MAX_CHOICES
from server.checking import Body

ChoiceText = Annotated[str, StringConstraints(min_length=1, max_length=4096)]


class JsonSchema(Body):
    """What OpenAI's SDKs send for a class of the caller's. It is obeyed whether `strict` or not."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=64)]
    schema_: dict[str, Any] = Field(alias="schema")
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Body):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> "ResponseFormat":
        if (self.json_schema is not None) != (self.type == "json_schema"):
            raise ValueError("'json_schema' goes with type 'json_schema', and only with it")
        return self


class StructuredOutputs(Body):
    """vLLM's ways to say what an answer must look like: exactly one of them."""

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: Annotated[str, StringConstraints(min_length=1)] | None = None
    choice: Annotated[list[ChoiceText], Field(min_length=1, max_length=MAX_CHOICES)] | None = None
    grammar: Annotated[str, StringConstraints(min_length=1)] | None = None
    json_object: Literal[True] | None = None

    @field_validator("json_schema", mode="before")
    @classmethod
    def _as_text(cls, schema: Any) -> Any:
        """A schema may come as JSON inside a string."""
        if not isinstance(schema, str):
            return schema
        try:
            return msgspec.json.decode(schema)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ValueError("must be a JSON schema") from error

    @model_validator(mode="after")
    def _exactly_one(self) -> "StructuredOutputs":
        given = [name for name in StructuredOutputs.model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("must have exactly one of json, regex, choice, grammar and json_object")
        return self
