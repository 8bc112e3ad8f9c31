"""``tokenpass.toml``: a tuned budget with the measurements that it was chosen from.

[options]           # what torch.compile(..., options=...) takes
method = "hiprune"
keep = 0.36

[[measured]]        # one for each budget, losses in points
keep = 0.36
flops = 0.65        # share of the model's
ms = 15.5           # an image
loss = 0.4
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenpass.errors import OptionError


@dataclass(frozen=True)
class Config:
    """What a file says.

    Attributes:
        options: What ``torch.compile(..., options=...)`` takes.
        measured: Rows with ``keep``, ``flops``, ``ms`` and ``loss`` at least.
        about: What was measured, on which machine.
    """

    options: Mapping[str, Any]
    measured: Sequence[Mapping[str, Any]] = ()
    about: Mapping[str, Any] = field(default_factory=dict)


def read_config(path: str | os.PathLike[str]) -> Config:
    """The content of a file.

    Raises:
        OptionError: If there is no such file, or it is not of this form.
    """
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"config={str(path)!r} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise OptionError(f"config={str(path)!r} is no TOML: {error}") from error
    options, measured = content.get("options"), content.get("measured", [])
    if not isinstance(options, dict):
        raise OptionError(f"config={str(path)!r} has no table [options]")
    return Config(options, measured, content.get("about", {}))


def as_text(config: Config) -> str:
    """The content of a file."""
    parts = [_table("[about]", config.about), _table("[options]", config.options)]
    parts += [_table("[[measured]]", row) for row in config.measured]
    return "\n".join(part for part in parts if part)


def within(config: Config, max_loss: float) -> dict[str, Any]:
    """The options of the cheapest budget that was measured to lose no more.

    Args:
        config: From a file.
        max_loss: In points.

    Raises:
        OptionError: If none does.
    """
    rows = [row for row in config.measured if {"keep", "flops", "loss"} <= row.keys()]
    good = [row for row in rows if row["loss"] <= max_loss]
    if not good:
        least = min((row["loss"] for row in rows), default=None)
        found = "nothing was measured" if least is None else f"the least that was measured: {least}"
        raise OptionError(f"max_loss={max_loss:g} is not reached: {found}")
    chosen = min(good, key=lambda row: row["flops"])
    return {**config.options, "keep": chosen["keep"]}


def _table(title: str, values: Mapping[str, Any]) -> str:
    lines = [f"{key} = {_value(value)}" for key, value in values.items() if value is not None]
    return "\n".join([title, *lines, ""]) if lines else ""


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
