"""What a check of a data set found."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from diffperception.data.summary import Summary


@dataclass(frozen=True)
class Problem:
    """One kind of problem and every place where it was found.

    Attributes:
        level: an "error" makes training or its measurement fail or be wrong; a "warning" may be meant.
        kind: a short name, the same for the same kind of problem in every data set.
        message: what is wrong and what follows from it.
        places: one text for each entry, image or file concerned; empty where it concerns the data set as a whole.
    """

    level: Literal["error", "warning"]
    kind: str
    message: str
    places: list[str] = field(default_factory=list)

    def text(self, shown: int) -> str:
        """A headline and the first `shown` places."""
        count = f" ({len(self.places)} times)" if len(self.places) > 1 else ""
        lines = [f"{self.level}: {self.message}{count}", *(f"    {place}" for place in self.places[:shown])]
        if len(self.places) > shown:
            lines.append(f"    and {len(self.places) - shown} more")
        return "\n".join(lines)


@dataclass(frozen=True)
class Report:
    """All problems of a data set, errors first, and what it holds (None where the file cannot be read at all)."""

    problems: list[Problem]
    summary: Summary | None

    @property
    def errors(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "error"]

    @property
    def warnings(self) -> list[Problem]:
        return [problem for problem in self.problems if problem.level == "warning"]

    def text(self, shown: int = 10) -> str:
        """The summary, the problems with at most `shown` places each, and a verdict, as lines."""
        blocks = [self.summary.text()] if self.summary else []
        blocks += [problem.text(shown) for problem in self.problems]
        blocks.append(f"{_plural(len(self.errors), 'error')} and {_plural(len(self.warnings), 'warning')}")
        return "\n\n".join(blocks)

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return {
            "problems": [asdict(problem) for problem in self.problems],
            "summary": asdict(self.summary) if self.summary else None,
        }


def _plural(count: int, noun: str) -> str:
    return f"{count} kind{'' if count == 1 else 's'} of {noun}" if count else f"no {noun}s"
