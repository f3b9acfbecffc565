"""Tables of text."""

import re
from collections.abc import Iterable, Sequence

NUMBER = re.compile(r"[-+.]?\d.*|-|nan|")


def format_table(rows: Iterable[Sequence[object]], headers: Sequence[str], markdown: bool = False) -> str:
    """Rows under their headers as lines of text, None as `-`; numbers are aligned at the right, words at the left.

    Where all headers are empty there is no line of them.

    Args:
        rows: numbers come with as many digits as shall be seen, as texts.
        markdown: with the borders of Markdown.
    """
    lines = [list(headers), *([("-" if cell is None else str(cell)) for cell in row] for row in rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [len(column) > 1 and all(NUMBER.fullmatch(cell) for cell in column[1:]) for column in columns]
    if markdown:
        lines.insert(1, ["-" * (width - 1) + (":" if r else "-") for width, r in zip(widths, right, strict=True)])
    padded = [
        [cell.rjust(width) if r else cell.ljust(width) for cell, width, r in zip(line, widths, right, strict=True)]
        for line in lines
    ]
    if markdown:
        return "\n".join(f"| {' | '.join(line)} |" for line in padded)
    return "\n".join("  ".join(line).rstrip() for line in padded[0 if any(headers) else 1 :])
