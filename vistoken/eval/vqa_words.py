"""Words of the visual question answering tasks, and questions as fixed-length rows of ids."""

from __future__ import annotations

from collections.abc import Sequence

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
USER, ASSISTANT = "user:", "assistant:"

NAMES = ("shirt", "trouser", "dress", "sandal", "sneaker", "bag", "boot")
"""Names of garments; T-shirts, pullovers, coats and shirts share one."""
PLURALS = ("shirts", "trousers", "dresses", "sandals", "sneakers", "bags", "boots")
NAME_OF_CLASS = (0, 1, 0, 2, 0, 3, 0, 4, 5, 6)
"""Name of each Fashion-MNIST class."""
REGIONS = (
    "top-left", "top", "top-right",
    "left", "centre", "right",
    "bottom-left", "bottom", "bottom-right",
)  # fmt: skip
"""Cells of the 3 x 3 grid in raster order."""
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")

_FASHION = "what is at the how many are there where only largest smallest garment garments a here"
_EASY = (
    "a black blue brown circle color contain does gray green image in is no not of present "
    "rectangle red shape teal the there triangle what yellow"
)
_MORE = (*_FASHION.split(), *_EASY.split(), "above", "yes", "no", "nothing", "?")

WORDS: tuple[str, ...] = tuple(
    dict.fromkeys(
        (
            *(PAD, BOS, EOS, UNKNOWN, IMAGE, USER, ASSISTANT),
            *(*NAMES, *PLURALS, *REGIONS, *NUMBERS, *sorted(_MORE)),
        )
    )
)
"""The vocabulary of the tiny LLaVA-NeXT; the place of a word is its id, and names, plurals, regions
and numbers follow each other, so that the device finds an id by adding."""
ID = {word: number for number, word in enumerate(WORDS)}


def split_words(text: str) -> list[str]:
    """A question as the tokenizer splits it."""
    return text.lower().replace("?", " ?").split()


def turn(question: str, answer: str) -> list[int]:
    """Ids of one turn behind the image: question, role, answer, end.

    Raises:
        KeyError: a word outside the vocabulary.
    """
    return [ID[word] for word in (*split_words(question), ASSISTANT, answer, EOS)]


def pad_turns(turns: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    """Turns filled up to one length behind their end."""
    return [[*ids, *[ID[PAD]] * (length - len(ids))] for ids in turns]
