"""How a prompt that was cut goes on once its keys and values are at hand: plain tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tokenpass.errors import OptionError
from tokenpass.prompts import Cut


@dataclass(frozen=True)
class Continued:
    """A prompt whose cache is at hand.

    Attributes:
        cut: What was taken out of it.
        length: Tokens of the full prompt.
        next: Position of the next token, ``(..., B, 1)``; ``None`` where the model counts itself.
    """

    cut: Cut
    length: int
    next: Tensor | None

    def mask(self, given: Tensor | None, cached: int, new: int) -> Tensor | None:
        """The mask of a call behind the prompt, on the tokens that stayed.

        Args:
            given: Over the full prompt and what follows, ``(B, length + ...)``, or ``None``.
            cached: Tokens in the cache.
            new: Tokens of the call.

        Returns:
            ``(B, cached + new)``; ``None`` where there is nothing to mask.
        """
        follows = cached - self.cut.index.shape[1] + new
        if given is None:
            if self.cut.real.all():
                return None
            seen = self.cut.real.new_ones(len(self.cut.real), follows)
            return torch.cat((self.cut.real, seen), 1).long()
        if given.shape[1] != self.length + follows:
            raise OptionError(
                f"attention_mask of {given.shape[1]} columns: expected {self.length} for the full "
                f"prompt and {follows} for what follows"
            )
        return torch.cat((self.cut.apply(given[:, : self.length], 0), given[:, self.length :]), 1)

    def moved(self, tokens: int) -> Continued:
        """After further tokens that were not cut."""
        return Continued(self.cut, self.length, None if self.next is None else self.next + tokens)

    def joined(self, cut: Cut, cached: int, length: int, after: Tensor | None) -> Continued:
        """After a further prompt.

        Args:
            cut: What was taken out of that.
            cached: Tokens in the cache before it.
            length: Its tokens before the cut.
            after: Position of the token behind it.
        """
        rows, stayed = self.cut.index.shape
        start = self.length + cached - stayed
        between = torch.arange(self.length, start, device=cut.index.device).expand(rows, -1)
        index = torch.cat((self.cut.index, between, cut.index + start), 1)
        real = torch.cat((self.cut.real, torch.ones_like(between, dtype=torch.bool), cut.real), 1)
        return Continued(Cut(index, real), start + length, after)
