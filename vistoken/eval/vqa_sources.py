"""Questions about pictures to evaluate a vision-language model on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from vistoken.errors import ConfigError
from vistoken.eval.easy_vqa import picture_path, read_questions
from vistoken.eval.fashion import load_fashion_mnist
from vistoken.eval.reference import ReferenceScenes
from vistoken.eval.vqa_plan import plan_layout, sort_garments
from vistoken.eval.vqa_questions import KINDS, ask
from vistoken.eval.vqa_scenes import draw
from vistoken.eval.vqa_words import ASSISTANT, WORDS

FASHION, EASY = "fashion_vqa", "easy_vqa"
TEST_SEED = 13
"""Seed of the scenes that published accuracies are on."""
FASHION_QUESTIONS = 2000


@dataclass(frozen=True)
class Item:
    """A picture, a question, its answer, and what kind of question it is.

    Attributes:
        image: PIL picture.
        question: text.
        answer: text; compared without case and spaces around.
        kind: groups accuracies.
    """

    image: Any
    question: str
    answer: str
    kind: str


class Source(Protocol):
    """A sequence of items, made or read when asked for."""

    def __len__(self) -> int: ...

    def items(self, numbers: Sequence[int]) -> list[Item]:
        """The items with these numbers."""


class FashionQuestions:
    """Fashion scenes VQA on garments of the test split: one question per scene, all kinds in turn.

    Args:
        root: folder with Fashion-MNIST; None takes the 1,000 garments in the package.
        count: questions.
        seed: of the scenes.
        device: where they are drawn.
    """

    def __init__(
        self,
        root: str | None = None,
        count: int = FASHION_QUESTIONS,
        seed: int = TEST_SEED,
        device: torch.device | str = "cpu",
    ) -> None:
        if root is None:
            known = ReferenceScenes()
            images, labels = known.garments, known.labels
        else:
            images, labels = load_fashion_mnist(root, "test")
        self.device = torch.device(device)
        self.garments = sort_garments(images, labels).to(self.device)
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def items(self, numbers: Sequence[int]) -> list[Item]:
        """Scenes of these numbers with their questions."""
        from PIL import Image

        index = torch.tensor(list(numbers), device=self.device)
        layout = plan_layout(index, self.seed, self.garments)
        wanted = (index % len(KINDS))[:, None]
        asked = ask(layout, index, self.seed, 1, wanted)
        images = draw(layout, self.garments, index, self.seed)
        images = (images * 255).round().to(torch.uint8).cpu()
        found = []
        for image, ids, kind in zip(images, asked.ids[:, 0], asked.kind[:, 0], strict=True):
            words = [WORDS[i] for i in ids.tolist()]
            cut = words.index(ASSISTANT)
            question = " ".join(words[:cut]).replace(" ?", "?")
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            found.append(Item(picture, question, words[cut + 1], KINDS[int(kind)]))
        return found


class EasyQuestions:
    """The test split of easy-vqa.

    Args:
        root: its data folder; None finds the installed package.
    """

    def __init__(self, root: str | None = None) -> None:
        self.root = root
        self.entries = read_questions(root, "test")

    def __len__(self) -> int:
        return len(self.entries)

    def items(self, numbers: Sequence[int]) -> list[Item]:
        """Questions of these numbers; the kind is what the answer is."""
        found = []
        for number in numbers:
            question, answer, picture = self.entries[number]
            image = _open(picture_path(self.root, "test", picture))
            kind = "yes/no" if answer in ("yes", "no") else "what"
            found.append(Item(image, question, answer, kind))
        return found


class FileQuestions:
    """Lines of JSON with `image` (path beside the file), `question`, `answer`, perhaps `kind`.

    Args:
        path: the file.

    Raises:
        ConfigError: no such file, or a line without these keys.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ConfigError(
                f"--data {path}: there is no such file; a vision-language model takes {FASHION}, "
                f"{EASY}[:FOLDER], or lines of JSON with image, question and answer"
            )
        self.folder = path.parent
        self.entries = []
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                self.entries.append([str(entry[key]) for key in ("image", "question", "answer")])
                self.entries[-1].append(str(entry.get("kind", "all")))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(
                    f"{path}, line {number}: must be JSON with 'image', 'question' and 'answer' "
                    f"({error})"
                ) from error

    def __len__(self) -> int:
        return len(self.entries)

    def items(self, numbers: Sequence[int]) -> list[Item]:
        """The lines with these numbers."""
        chosen = [self.entries[number] for number in numbers]
        return [Item(_open(self.folder / path), *texts) for path, *texts in chosen]


def _open(path: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise ConfigError(f"cannot read the image {path} ({error})") from error


def open_questions(data: str, device: torch.device | str = "cpu") -> Source:
    """The questions behind `--data`: `fashion_vqa[:FOLDER]`, `easy_vqa[:FOLDER]` or a file."""
    name, _, root = data.partition(":")
    if name in (FASHION, "reference"):
        return FashionQuestions(root or None, device=device)
    if name == EASY:
        return EasyQuestions(root or None)
    return FileQuestions(Path(data))


def batches(source: Source, limit: int | None, size: int) -> Iterator[list[Item]]:
    """Items in order, `size` at a time; with a limit every k-th, so that all kinds are in it."""
    total = len(source)
    numbers = list(range(total))
    if limit is not None and limit < total:
        numbers = numbers[:limit] if isinstance(source, FashionQuestions) else [
            index * total // limit for index in range(limit)
        ]  # fmt: skip
    for start in range(0, len(numbers), size):
        yield source.items(numbers[start : start + size])
