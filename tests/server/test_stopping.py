"""Stop strings are found wherever the text is divided, and nothing but them is lost."""

from hypothesis import given
from hypothesis import strategies as st

from server.stopping import StopStrings

LETTERS = st.text(alphabet="ab\n", max_size=30)
STOPS = st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=4)


def handed_out(parts: list[str], stops: list[str]) -> tuple[str, bool]:
    cutter = StopStrings(tuple(stops))
    text = ""
    for part in parts:
        text += cutter.feed(part)
        if cutter.found:
            return text, True
    return text + cutter.flush(), False


@given(LETTERS, STOPS, st.lists(st.integers(1, 5), min_size=30, max_size=30))
def test_the_cut_does_not_depend_on_how_the_text_was_divided(
    text: str, stops: list[str], sizes: list[int]
) -> None:
    parts, rest = [], text
    for size in sizes:
        parts.append(rest[:size])
        rest = rest[size:]
    assert handed_out(parts, stops) == handed_out([text], stops) == handed_out(list(text), stops)


@given(LETTERS, STOPS)
def test_text_is_cut_where_a_stop_string_begins_and_never_else(text: str, stops: list[str]) -> None:
    said, found = handed_out(list(text), stops)
    assert found == any(stop in text for stop in stops)
    assert text.startswith(said) and not any(stop in said for stop in stops)
    if found:
        assert any(text[len(said) :].startswith(stop) for stop in stops)
    else:
        assert said == text


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    stops = StopStrings(("\n\nUser:",))
    assert [stops.feed(part) for part in ("one\n", "two\n\n", "Us", "ual", "\n\nUser:x")] == [
        "one",
        "\ntwo",
        "",
        "\n\nUsual",
        "",
    ]
    assert stops.found


def test_without_stop_strings_nothing_is_held_back() -> None:
    stops = StopStrings(())
    assert stops.feed("anything\n") == "anything\n" and stops.flush() == ""
