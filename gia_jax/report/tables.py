"""Tables in plain text."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table in plain text, with the first column aligned left and the others aligned right.

    Args:
        header: Headings of the columns.
        rows: Rows of the table, each with a cell for every column.

    Returns:
        The lines of the table, without a line break at the end.

    Raises:
        ValueError: If a row has another number of cells than the header.

    Examples:
        >>> from gia_jax.report import table
        >>> print(table(["attack", "PSNR"], [["DLG", "31.5"], ["iDLG", "9.0"]]))
        attack  PSNR
        ------------
        DLG     31.5
        iDLG     9.0
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows must have {len(header)} cells like the header, got {len(row)} in {list(row)}")
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        first, *rest = (cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(cells, widths)))
        return "  ".join((first, *rest)).rstrip()

    return "\n".join([line(header), "-" * (sum(widths) + 2 * (len(widths) - 1)), *map(line, rows)])
