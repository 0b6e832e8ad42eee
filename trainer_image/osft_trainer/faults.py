"""What is wrong with the data: collected and told all at once, or skipped and counted.

Lives here: the list of faults, and the choice between an error and going on. Filled by `json_rows`,
`tables` and `samples`, emptied by `data.prepare`. Must never: drop a fault that it does not count.
"""

import logging
from dataclasses import dataclass, field
from typing import Literal

MAX_FAULTS = 5
"""Enough to see a pattern, few enough for a termination message."""

ROWS_AFTER_THE_FIRST = 10_000
"""Read on for so many rows: some seconds of usual conversations, where all the data may take hours.
"""

OnBadSample = Literal["error", "skip"]

logger = logging.getLogger(__name__)


@dataclass
class Faults:
    """What is wrong with the data so far; raises when the list is full, or reading on is no use."""

    on_bad_sample: OnBadSample = "error"
    found: list[str] = field(default_factory=list)
    rows: int = 0
    """Rows read, sound or not; counted by the readers."""
    skipped: int = 0
    """Bad ones that were left out, in mode skip."""
    _rows_at_first: int = 0

    def bad(self, place: str, reason: str) -> None:
        """Note a sample that cannot be used: an error, or left out and counted.

        Raises:
            ValueError: as `add`, in mode error.
        """
        if self.on_bad_sample == "error":
            self.add(place, reason)
            return
        self.skipped += 1
        if self.skipped <= MAX_FAULTS:
            more = " (further ones are only counted)" if self.skipped == MAX_FAULTS else ""
            logger.warning("skipped %s: %s%s", place, reason, more)

    def add(self, place: str, reason: str) -> None:
        """Note one fault that is an error in either mode.

        Raises:
            ValueError: MAX_FAULTS have been found; more reading would not help the user.
        """
        if not self.found:
            self._rows_at_first = self.rows
        self.found.append(f"{place}: {reason}")
        if len(self.found) >= MAX_FAULTS:
            self.raise_if_any()

    def raise_if_far(self) -> None:
        """Raise when ROWS_AFTER_THE_FIRST have been read after the first fault."""
        if self._is_far():
            self.raise_if_any()

    def _is_far(self) -> bool:
        return bool(self.found) and self.rows - self._rows_at_first > ROWS_AFTER_THE_FIRST

    def raise_if_any(self) -> None:
        """Raise one ValueError that holds every fault."""
        if self.found:
            count = len(self.found)
            more = f" (reading stopped {ROWS_AFTER_THE_FIRST:,} rows behind the first)"
            if count >= MAX_FAULTS:
                more = " (reading stopped here)"
            elif not self._is_far():
                more = ""
            problems = "1 problem" if count == 1 else f"{count} problems"
            raise ValueError(
                "\n  ".join([f"data_path: {problems} in the data{more}:", *self.found])
            )
