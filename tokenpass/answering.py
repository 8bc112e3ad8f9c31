"""What answers the questions of :mod:`tokenpass.api` itself, because no one graph holds it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from tokenpass.methods import Budget


class Answering(ABC):
    """A model that is no compiled graph and is asked in the same way as one."""

    @abstractmethod
    def set_budget(self, keep: Budget) -> None:
        """Change the budget from the next call on."""

    @abstractmethod
    def kept(self) -> list[Tensor]:
        """For each image of the last call the tokens that stayed, ``(K,)``, ascending."""

    @abstractmethod
    def stats(self) -> Any:
        """What the last call cost."""

    @abstractmethod
    def reset(self) -> None:
        """Forget all earlier calls and budgets."""
