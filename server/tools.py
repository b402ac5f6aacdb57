"""The functions that a model may call, and whether it must."""

from typing import Annotated, Any, Literal

from pydantic import StringConstraints, model_validator

from server.checking import Body

FunctionName = Annotated[str, StringConstraints(pattern="^[a-zA-Z0-9_.-]{1,64}$")]


class FunctionTool(Body):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] = {"type": "object", "properties": {}}  # JSON schema
    strict: bool | None = None


class Tool(Body):
    """OpenAI has other types, which its own servers run."""

    type: Literal["function"]
    function: FunctionTool


class NamedFunction(Body):
    name: FunctionName


class ToolChoice(Body):
    """A word, or `function` and the name of one."""

    type: Literal["none", "auto", "required", "function"]
    function: NamedFunction | None = None

    @model_validator(mode="after")
    def _name_where_it_belongs(self) -> "ToolChoice":
        if (self.function is not None) != (self.type == "function"):
            raise ValueError("a 'function' goes with type 'function', and only with it")
        return self
