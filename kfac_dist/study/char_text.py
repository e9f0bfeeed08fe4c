"""English text that travels with Python, as windows of characters: the language reference behind ``help()``.

``pydoc_data.topics`` holds some 460,000 characters (Python 3.11), about modules, statements and expressions. Its words
differ a little from one version of Python to the next; the vocabulary does not.
"""

from __future__ import annotations

import string

import torch
from torch import Tensor

from kfac_dist.study.in_memory import InMemoryDataModule, Split

OTHER = "\N{REPLACEMENT CHARACTER}"
"""Stands for every character that is not in the vocabulary."""
VOCABULARY = OTHER + "\n " + string.digits + string.ascii_letters + string.punctuation
"""A character's number is its place here: 97 of them, whatever the text."""


def python_topics() -> str:
    """All topics of the Python language reference, in the order of their names."""
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415  some distributions leave it out
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this Python came without pydoc_data, the text behind help(): install its complete standard library"
        ) from error
    return "\n".join(topics[name] for name in sorted(topics))


def encode(text: str) -> Tensor:
    """Numbers (len(text),) int64 of the characters."""
    number = {character: i for i, character in enumerate(VOCABULARY)}
    return torch.tensor([number.get(character, 0) for character in text])


def decode(numbers: Tensor) -> str:
    """The text of ``numbers`` (S,)."""
    return "".join(VOCABULARY[i] for i in numbers.tolist())


def windows(numbers: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Windows side by side, and for each character the one that follows it; what does not fill a window is left out.

    Args:
        numbers: (S,).
        length: characters of a window.

    Returns:
        Inputs and targets, each (N, length) with N = (S - 1) // length; targets[:, :-1] is inputs[:, 1:].
    """
    count = (len(numbers) - 1) // length
    inputs = numbers[: count * length].view(count, length)
    return inputs, numbers[1 : count * length + 1].view(count, length)


class CharText(InMemoryDataModule):
    """Windows of text as batches (inputs (B, length), targets (B, length)), the targets one character ahead.

    The last part of the text is held out, and no window crosses the border. Windows lie side by side; the training ones
    are served in an order that the global random stream draws.

    Args:
        batch_size: windows per batch and process.
        length: characters of a window.
        held_out: share of the text that is held out, between 0 and 1.

    Raises:
        ValueError: a length below 1, or splits that do not hold one window each.
    """

    def __init__(self, batch_size: int = 64, length: int = 128, held_out: float = 0.1) -> None:
        super().__init__(batch_size)
        if length < 1:
            raise ValueError(f"length={length} must be at least 1")
        if not 0 < held_out < 1:
            raise ValueError(f"held_out={held_out} must lie between 0 and 1: the share of the text that is held out")
        self.length = length
        self.held_out = held_out

    def load(self) -> tuple[Split, Split]:
        """Windows of the first and of the last part of the text."""
        numbers = encode(python_topics())
        border = len(numbers) - round(len(numbers) * self.held_out)
        train, val = (windows(part, self.length) for part in (numbers[:border], numbers[border:]))
        if min(len(train[0]), len(val[0])) < 1:
            raise ValueError(
                f"length={self.length}, held_out={self.held_out}: parts of {border} and {len(numbers) - border} "
                "characters do not hold one window each; choose a smaller length"
            )
        return train, val
