"""A sheet of captioned panels as one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vistoken.view.picture import Pixels

MARGIN, GAP, CAPTION, TITLE, LEGEND = 24, 16, 66, 56, 40
INK, FAINT, PAPER = (24, 24, 27), (105, 105, 112), (255, 255, 255)
LEGEND_TEXT = (
    "kept patches as they are   ·   merged groups in their mean colour, outlined   ·   "
    "pruned patches dark and hatched"
)


@dataclass(frozen=True)
class Cell:
    """A panel with two lines of caption.

    Attributes:
        pixels: `[H, W, 3]` uint8.
        caption: first line.
        detail: second line, paler.
    """

    pixels: Pixels
    caption: str
    detail: str = ""


def origin(row: int, column: int, cell: Cell) -> tuple[int, int]:
    """Pixel row and column on the sheet at which a panel begins; all panels have one size."""
    height, width = cell.pixels.shape[:2]
    return TITLE + row * (height + CAPTION), MARGIN + column * (width + GAP)


def compose(rows: Sequence[Sequence[Cell]], title: str = "", legend: str = LEGEND_TEXT) -> Any:
    """Arrange panels of one size in rows.

    Args:
        rows: panels, one list per row of the sheet.
        title: above all.
        legend: below all.

    Returns:
        A PIL image.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = max(len(row) for row in rows)
    bottom, right = origin(len(rows), columns, rows[0][0])
    sheet = Image.new("RGB", (right - GAP + MARGIN, bottom + LEGEND), PAPER)
    pen = ImageDraw.Draw(sheet)
    large, small = ImageFont.load_default(26), ImageFont.load_default(20)
    pen.text((MARGIN, TITLE / 2), title, INK, large, anchor="lm")
    for y, row in enumerate(rows):
        for x, cell in enumerate(row):
            top, left = origin(y, x, cell)
            height, width = cell.pixels.shape[:2]
            sheet.paste(Image.fromarray(cell.pixels), (left, top))
            below = top + height
            pen.text((left, below + 19), fit(pen, cell.caption, small, width), INK, small, "lm")
            detail = fit(pen, cell.detail, small, width)
            pen.text((left, below + 43), detail, FAINT, small, "lm")
    pen.text((MARGIN, bottom + LEGEND / 2 - 4), legend, FAINT, small, anchor="lm")
    return sheet


def fit(pen: Any, text: str, font: Any, width: int) -> str:
    """The text, cut with dots where it is wider than `width` pixels."""
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + " ...", font) > width:
        text = text[:-1]
    return text + " ..."
