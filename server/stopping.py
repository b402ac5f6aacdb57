"""StopStrings: cuts an answer before the first stop string, even one spread over several pieces."""


class StopStrings:
    """Holds back the end of the text while it may be the beginning of a stop string."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is safe to hand out now. After `found`, nothing more is."""
        if not self._stops:
            return text
        self._held += text
        # The stop string that ends first wins, so that the cut does not depend on how the text was divided.
        cuts = [(start + len(stop), start) for stop in self._stops if (start := self._held.find(stop)) >= 0]
        if cuts:
            self.found = True
            return self._held[: min(cuts)[1]]
        return self._release(len(self._held) - self._possible_beginning())

    def flush(self) -> str:
        """What was held back, at the end: it was no stop string after all."""
        return self._release(len(self._held))

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        return text

    def _possible_beginning(self) -> int:
        """Characters at the end of the held text that begin a stop string."""
        longest = min(len(self._held), max(map(len, self._stops)) - 1)
        for count in range(longest, 0, -1):
            end = self._held[-count:]
            if any(stop.startswith(end) for stop in self._stops):
                return count
        return 0
