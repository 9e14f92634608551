"""Stop strings, wherever the borders between tokens fall."""

from collections.abc import Sequence

from irkit.tokenizer.answers import overlap


class StopStrings:
    """Passes text on until one of `stops` appears; holds back an ending that could become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that may be shown now; once `found`, nothing more will be."""
        if self.found:
            return ""
        text = self._held + text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.found, self._held = True, ""
            # The one complete first: which begins first, of two that overlap, might be known only after more text.
            return text[: min(found)[1]]
        keep = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def flush(self) -> str:
        """What is still held back, when no more text will come."""
        held, self._held = self._held, ""
        return held
