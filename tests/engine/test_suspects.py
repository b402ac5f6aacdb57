"""Of several requests that were open when the engine died, the one that it dies of is found."""

from engine.suspects import Suspects


def test_one_request_that_two_deaths_saw_is_to_blame() -> None:
    suspects = Suspects()
    assert suspects.after_death(["a", "b"]) is None
    assert not suspects.holds("a") and not suspects.holds("b")
    assert suspects.after_death(["b", "c"]) == "b"
    assert not suspects.holds("b") and not suspects.holds("c")


def test_a_request_that_moved_on_is_counted_anew() -> None:
    suspects = Suspects()
    suspects.after_death(["a"])
    suspects.clear("a")
    assert suspects.after_death(["a"]) is None
    assert suspects.after_death(["a"]) == "a"


def test_of_several_only_the_one_on_trial_is_blamed() -> None:
    suspects = Suspects()
    suspects.after_death(["a", "b", "c"])
    assert suspects.after_death(["a", "b", "c"]) is None
    assert [suspects.holds(name) for name in "abcd"] == [True, True, True, False]
    assert suspects.next_trial() == "a" and not suspects.holds("a")
    assert suspects.next_trial() is None, "one at a time"
    suspects.clear("a")  # it brought a token
    assert suspects.next_trial() == "b"
    assert suspects.after_death(["a", "b", "c", "d"]) == "b"
    assert suspects.next_trial() == "c"
    suspects.clear("c")
    assert suspects.next_trial() is None
    assert suspects.after_death(["a", "c", "d"]) is None, "deaths of another are not theirs"


def test_one_that_left_is_not_tried() -> None:
    suspects = Suspects()
    suspects.after_death(["a", "b"])
    suspects.after_death(["a", "b"])
    suspects.clear("a")
    assert suspects.next_trial() == "b"
