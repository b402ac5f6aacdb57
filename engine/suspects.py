"""Suspects: which open request the engine may have died of. One that it died of twice is not run again."""

from collections.abc import Iterable

DEATHS = 2  # of one request, without a new token in between


class Suspects:
    """Counts deaths by request. Where several have seen two, they run again one at a time: who is on trial
    when the engine dies once more is to blame, and nobody else is counted."""

    def __init__(self) -> None:
        self._deaths: dict[str, int] = {}
        self._held: list[str] = []  # wait for their trial
        self.on_trial: str | None = None

    def after_death(self, open_requests: Iterable[str]) -> str | None:
        """The engine has died with these requests: the one to blame, if that is certain."""
        present = list(open_requests)
        if self.on_trial is not None:
            culprit, self.on_trial = self.on_trial, None
            self._deaths.pop(culprit, None)
            return culprit
        self._deaths = {request: self._deaths.get(request, 0) + 1 for request in present}
        accused = [request for request, deaths in self._deaths.items() if deaths >= DEATHS]
        if len(accused) == 1:
            del self._deaths[accused[0]]
            return accused[0]
        self._held = accused
        return None

    def holds(self, request: str) -> bool:
        """May it not run yet?"""
        return request in self._held

    def clear(self, request: str) -> None:
        """It has brought a token since, or has ended: the engine does not die of it."""
        self._deaths.pop(request, None)
        if request in self._held:
            self._held.remove(request)
        if self.on_trial == request:
            self.on_trial = None

    def next_trial(self) -> str | None:
        """Who may run now, if the last trial is over and somebody waits."""
        if self.on_trial is not None or not self._held:
            return None
        self.on_trial = self._held.pop(0)
        return self.on_trial
