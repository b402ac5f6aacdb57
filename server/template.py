"""ChatTemplate: a chat as text, by the template that comes with a model: sandboxed, and ended in time."""

import json
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

SECONDS = 5.0  # of a thread's own time, for one chat; ten thousand messages take 0.3
MAX_CHARACTERS = 2**27  # of a chat as text; more than any body has room for
MAX_PRODUCT = 2**20  # characters, items or bits of what `*` and `**` make
# What templates raise with messages that they do not expect, or where they want too much.
FAILURES = (
    *(jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError),
    *(AttributeError, RuntimeError, MemoryError),
)

_deadline: ContextVar[float] = ContextVar("deadline")  # time.thread_time() at which the rendering here ends


class ChatTemplate:
    """One model's template. Raises one of FAILURES if it cannot be compiled or does not render."""

    def __init__(self, source: str) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
        )
        # Names that HuggingFace's chat templates rely on.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        tree = environment.parse(source)
        for loop in tree.find_all(jinja2.nodes.For):
            look_at_clock = jinja2.nodes.EnvironmentAttribute("look_at_clock")
            call = jinja2.nodes.Call(look_at_clock, [], [], None, None)
            loop.body.insert(0, jinja2.nodes.ExprStmt(call, lineno=loop.lineno))
        code = environment.compile(tree)
        self._template = jinja2.Template.from_code(environment, code, environment.make_globals(None))

    def render(self, **names: Any) -> str:
        """The text, with these names in the template's reach."""
        before = _deadline.set(time.thread_time() + SECONDS)
        try:
            return "".join(_bounded(self._template.generate(**names)))
        finally:
            _deadline.reset(before)


class _Environment(ImmutableSandboxedEnvironment):
    """Whatever can repeat itself looks at the clock: loops, calls (so recursion), filters and tests of items.
    Between two looks products and powers are bounded, which could hold the whole process."""

    intercepted_binops = frozenset({"*", "**"})

    def look_at_clock(self) -> None:
        if time.thread_time() > _deadline.get():
            raise SecurityError(f"it takes more than {SECONDS} seconds")

    def call(self, context: jinja2.runtime.Context, what: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.look_at_clock()
        return super().call(context, what, *args, **kwargs)

    def call_filter(self, *args: Any, **kwargs: Any) -> Any:
        self.look_at_clock()
        return super().call_filter(*args, **kwargs)

    def call_test(self, *args: Any, **kwargs: Any) -> Any:
        self.look_at_clock()
        return super().call_test(*args, **kwargs)

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        if _size_of_product(operator, left, right) > MAX_PRODUCT:
            raise SecurityError(f"'{operator}' makes something too large")
        return super().call_binop(context, operator, left, right)


def _size_of_product(operator: str, left: Any, right: Any) -> int:
    """Bits of a number, or characters or items."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
    for many, count in ((left, right), (right, left)):
        if isinstance(many, Sequence) and isinstance(count, int):
            return len(many) * count
    return 0


def _bounded(parts: Iterator[str]) -> Iterator[str]:
    total = 0
    for part in parts:
        total += len(part)
        if total > MAX_CHARACTERS:
            raise SecurityError(f"it writes more than {MAX_CHARACTERS} characters")
        yield part


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks the assistant's words for training; for serving it is only its content."""

    tags = {"generation"}

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML, which models were not trained on.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
