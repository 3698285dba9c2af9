"""Verdicts: how a retrained model did beside the one in production."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal[
    "better", "within noise", "worse within noise", "significantly worse", "cannot judge"
]
Decision = Literal["promoted", "awaiting approval", "not promoted", "refused"]
State = Decision | Literal["production", "replaced"]  # of a version now


@dataclass(frozen=True)
class Difference:
    """Candidate beside promoted on the same `n` items: scores, and their difference.

    Scores are fractions of 1; `low` and `high` bound the middle 95 % of resampled differences.
    """

    verdict: Verdict
    n: int
    candidate: float
    promoted: float
    difference: float
    low: float
    high: float

    def __str__(self) -> str:
        """Show the difference with its interval."""
        return f"{self.difference:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Judgement:
    """The gate's verdict on a candidate.

    `overall` is of the mean over the tasks that both models have. `candidate` and `promoted` name
    their systems, `against` the promoted version. `items` hashes the items of each task, and
    `judged_before` counts the earlier verdicts on the same ones. `latency_ratio` is the candidate's
    time over the promoted one's. `notes` are sentences about what the verdict leaves out.
    `fallback_rates` are the shares of the items' questions that the candidate and the promoted one
    leave to the base model where a person asks; `falls_back_more` tells whether the candidate's is
    too much higher.
    """

    against: str
    candidate: str
    promoted: str
    overall: Difference
    tasks: dict[str, Difference]
    items: dict[str, str]
    judged_before: int
    latency_ratio: float | None
    notes: tuple[str, ...]
    fallback_rates: tuple[float, float] | None = None
    falls_back_more: bool = False

    def __str__(self) -> str:
        """Put the verdict in one paragraph."""
        whole = self.overall
        told = [
            f"{whole.verdict.capitalize()}: on {whole.n} test items of {len(self.tasks)} tasks, "
            f"{self.candidate} scores {whole.candidate:.3f} and {self.promoted} of "
            f"{self.against} {whole.promoted:.3f}; the difference is "
            f"{whole.difference:+.3f} (95 % interval {whole.low:+.3f} to {whole.high:+.3f})."
        ]
        for verdict in ("significantly worse", "better"):
            rows = {task: row for task, row in self.tasks.items() if row.verdict == verdict}
            if rows:
                named = ", ".join(f"{task} {row}" for task, row in rows.items())
                told.append(f"{verdict.capitalize()}: {named}.")
        small = {task: row.n for task, row in self.tasks.items() if row.verdict == "cannot judge"}
        if small:
            named = ", ".join(f"{task} ({n})" for task, n in small.items())
            told.append(f"Of too few items to be judged alone: {named}.")
        if self.judged_before:
            times = "once" if self.judged_before == 1 else f"{self.judged_before} times"
            told.append(
                f"These items have judged {times} before: the more often, the likelier it is that "
                f"a verdict is luck."
            )
        return " ".join([*told, *self.notes])
