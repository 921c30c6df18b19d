"""The picture of windows shows what loops over an axis say."""

import numpy as np
import pytest
from naive_neighborhood import axis_keys

import vistoken
from vistoken.view import Query, draw_windows
from vistoken.view.sheet import Cell, origin
from vistoken.view.windows import EXAMPLES, KEY, OTHER, QUERY, paint

GRID, SCALE = (9, 11), 6
QUERIES = [
    Query((4, 5), window=3),
    Query((0, 10), window=5),
    Query((8, 1), window=3, dilation=3),
    Query((3, 3), window=4, stride=2),
]


def expected(query: Query) -> np.ndarray:
    mask = np.zeros(GRID, dtype=bool)
    rows, columns = (
        axis_keys(length, at, query.window, query.stride, query.dilation)
        for length, at in zip(GRID, query.cell, strict=True)
    )
    mask[np.ix_(rows, columns)] = True
    return mask


@pytest.mark.parametrize("query", QUERIES, ids=str)
def test_keys(query):
    assert (query.keys(GRID) == expected(query)).all()


def test_colours_on_the_sheet():
    pytest.importorskip("PIL")
    sheet = np.asarray(draw_windows(QUERIES, GRID, SCALE))
    blank = Cell(np.zeros((GRID[0] * SCALE, GRID[1] * SCALE, 3), dtype=np.uint8), "")
    for place, query in enumerate(QUERIES):
        top, left = origin(0, place, blank)
        mask = expected(query)
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                middle = (top + row * SCALE + SCALE // 2, left + column * SCALE + SCALE // 2)
                wanted = (
                    QUERY if (row, column) == query.cell else KEY if mask[row, column] else OTHER
                )
                assert tuple(sheet[middle]) == wanted


def test_default_picture_and_errors():
    assert len(EXAMPLES) == 3
    assert {int(query.keys((14, 14)).sum()) for query in EXAMPLES} == {49}
    assert paint(np.ones((2, 3), dtype=bool), (0, 0), 4).shape == (8, 12, 3)
    with pytest.raises(vistoken.ConfigError, match="on the grid of 9 x 11"):
        Query((9, 0)).keys(GRID)
    with pytest.raises(vistoken.ConfigError, match="spans 14"):
        Query((0, 0), dilation=2).keys(GRID)
