"""A vision-language model that gives its language model fewer visual tokens."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tokenpass.answering import Answering
from tokenpass.errors import NothingRecordedError, OptionError
from tokenpass.methods import Budget, HiPrune, check_budget, check_choice
from tokenpass.prompts import Cut, cut_arguments, cut_prompts
from tokenpass.visual_choice import Chosen, choose
from tokenpass.visual_tokens import Selector
from tokenpass.vlm_caches import Continued
from tokenpass.vlm_compiled import CompiledPrefill
from tokenpass.vlm_cost import PromptStats, prompt_stats
from tokenpass.vlm_protocol import (
    PRECOMPUTED,
    Protocol,
    forward_positions,
    generation_positions,
    protocol_of,
)

Positions = Literal["original", "compact"]


class VisionLanguageModel(Answering):
    """Used like the model that it holds: what it does not define itself is the model's.

    :func:`tokenpass.kept`, :func:`tokenpass.stats`, :func:`tokenpass.set_budget` and
    :func:`tokenpass.reset` take it as they take a compiled model.

    Attributes:
        model: The original, unchanged.
        method: What is selected.
    """

    def __init__(
        self,
        model: Any,
        method: HiPrune,
        selector: Selector | None,
        positions: Positions,
        inner: str | Callable[..., Any] | None = None,
    ) -> None:
        self.model = model
        self.method = method
        self._given_method = method
        self._selector = selector
        self._positions = positions
        self._protocol: Protocol = protocol_of(model)
        self._compiled: CompiledPrefill | None = None
        if inner is not None:
            self._compiled = CompiledPrefill(model, self._protocol.decoder, inner)
        self._continued: weakref.WeakKeyDictionary[Any, Continued] = weakref.WeakKeyDictionary()
        self._last: tuple[list[Chosen], PromptStats] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    # ------------------------------------------------------------ questions

    def set_budget(self, keep: Budget) -> None:
        """Change the budget; the next call uses it, and nothing is compiled."""
        check_budget("keep", keep)
        self.method = self.method.with_budget(keep)

    def kept(self, modality: str = "image") -> list[Tensor]:
        """For each image of the last call the visual tokens that stayed, ``(K,)``, ascending.

        Raises:
            NothingRecordedError: If no call had such inputs.
        """
        for chosen in self._recorded()[0]:
            if chosen.modality.name == modality:
                return [kept.clone() for kept in chosen.kept]
        raise NothingRecordedError(f"the last call had no {modality}")

    def stats(self) -> PromptStats:
        """Tokens, prefill FLOPs and cache bytes of the last call, before and after.

        Raises:
            NothingRecordedError: If no call had visual inputs.
        """
        return self._recorded()[1]

    def reset(self) -> None:
        """Forget earlier calls and what was found out about the encoders; the budget goes back.

        Caches of earlier calls are not continued any more.
        """
        self.method = self._given_method
        self._continued.clear()
        self._last = None
        for modality in self._protocol.modalities:
            modality.encoder.forget()

    def _recorded(self) -> tuple[list[Chosen], PromptStats]:
        if self._last is None:
            raise NothingRecordedError("no call with visual inputs yet: call the model first")
        return self._last

    # ------------------------------------------------------------ calls

    def forward(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """As the model's ``forward``; logits and losses are those of the shorter prompts."""
        arguments = {"input_ids": input_ids, **kwargs}
        state = self._state(kwargs.get("past_key_values"))
        if state is not None and self._protocol.given(arguments):
            return self._continue_seeing(arguments, state)
        if not self._prunes(arguments):
            if state is None:
                return self.model(**arguments)
            return self._continue(arguments, state)
        self._refuse_started(kwargs.get("past_key_values"))
        self._refuse_flash()
        chosen = self._choose(arguments)
        if self._keeps_all(chosen, arguments):
            return self.model(**self._with_outputs({}, chosen, "output", encoders_too=arguments))
        cut = self._cut(arguments, chosen)
        full = self._without_pixels(arguments)
        if self._positions == "compact" or full.get("position_ids") is not None:
            positions = full.get("position_ids")
        else:
            positions = forward_positions(
                self._protocol, self._with_outputs(full, chosen, "full", encoders_too=arguments)
            )
        made = self._applied(cut, full, positions)
        output = self._callee()(**self._with_outputs(made, chosen, "output"))
        counted = made.get("position_ids") if positions is None else positions
        self._remember(output, cut, arguments, counted)
        return output

    def generate(self, input_ids: Tensor | None = None, **kwargs: Any) -> Any:
        """As the model's ``generate``; the sequences begin with the full prompts."""
        given = kwargs.pop("inputs", None)
        arguments = {"input_ids": given if input_ids is None else input_ids, **kwargs}
        if not self._prunes(arguments):
            if self._state(kwargs.get("past_key_values")) is not None:
                raise OptionError(
                    "past_key_values of a prompt that was cut: pass the whole conversation"
                )
            return self.model.generate(**arguments)
        self._refuse_started(kwargs.get("past_key_values"))
        self._refuse_packing(kwargs)
        chosen = self._choose(arguments)
        if self._keeps_all(chosen, arguments):
            made = self._with_outputs({}, chosen, "output", encoders_too=arguments)
            return self.model.generate(**made)
        cut = self._cut(arguments, chosen)
        positions = kwargs.get("position_ids")
        if positions is None and self._positions == "original":
            positions = generation_positions(self._protocol, arguments)
        made = self._applied(cut, self._without_pixels(arguments), positions)
        before, after = arguments["input_ids"], made["input_ids"]
        for limit in ("max_length", "min_length"):
            if made.get(limit) is not None:
                made[limit] -= before.shape[1] - after.shape[1]
        output = self._callee().generate(**self._with_outputs(made, chosen, "output"))
        return _with_prompts(output, before, after.shape[1])

    # ------------------------------------------------------------ steps

    def _prunes(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call has visual inputs of which some may leave."""
        if not self._protocol.given(arguments) or self.method.full:
            return False
        if arguments["input_ids"] is None:
            raise OptionError("pass input_ids: embeddings do not show where the placeholders are")
        if arguments.get(PRECOMPUTED) is not None:
            raise OptionError(f"{PRECOMPUTED}: pass pixels, whose attention ranks the tokens")
        mask = arguments.get("attention_mask")
        if mask is not None and getattr(mask, "shape", None) != arguments["input_ids"].shape:
            raise OptionError("attention_mask must be (B, L), as input_ids are: others are not cut")
        return True

    def _callee(self) -> Any:
        """What is given the shorter prompts."""
        return self.model if self._compiled is None else self._compiled.model()

    def _choose(self, arguments: Mapping[str, Any]) -> list[Chosen]:
        return [
            choose(modality, self.method, self._selector, arguments)
            for modality in self._protocol.given(arguments)
        ]

    def _keeps_all(self, chosen: list[Chosen], arguments: Mapping[str, Any]) -> bool:
        """Whether the budget was enough for everything, so that the prompts stay as they are."""
        if self._positions == "compact" or not all(bool(one.mask.all()) for one in chosen):
            return False
        self._cut({**arguments, "attention_mask": None}, chosen)
        return True

    def _without_pixels(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments without those of the encoders."""
        encoders = {name for m in self._protocol.given(arguments) for name in m.arguments}
        return {name: value for name, value in arguments.items() if name not in encoders}

    def _with_outputs(
        self,
        arguments: Mapping[str, Any],
        chosen: list[Chosen],
        which: Literal["full", "output"],
        encoders_too: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The arguments with visual tokens; with ``encoders_too`` also what tells their grids."""
        made = dict(arguments)
        for name, value in (encoders_too or {}).items():
            if not (isinstance(value, Tensor) and value.is_floating_point()):
                made.setdefault(name, value)
        for one in chosen:
            made.pop(one.modality.pixels, None)
        made[PRECOMPUTED] = {one.modality.name: getattr(one, which) for one in chosen}
        return made

    def _cut(self, arguments: Mapping[str, Any], chosen: list[Chosen]) -> Cut:
        prompts = arguments["input_ids"]
        kept = [(one.modality.placeholder, one.mask) for one in chosen]
        cut = cut_prompts(prompts, arguments.get("attention_mask"), kept)
        self._last = (chosen, prompt_stats(self._protocol, prompts, cut, kept))
        return cut

    def _applied(
        self, cut: Cut, arguments: Mapping[str, Any], positions: Tensor | None
    ) -> dict[str, Any]:
        """The arguments of the shorter prompts, with their positions."""
        made = cut_arguments({**arguments, "position_ids": positions}, cut, self._pad_token())
        if self._positions == "compact":
            made["position_ids"] = self._compact(made, positions)
        return made

    def _pad_token(self) -> int:
        """Any token that is no placeholder: what is padded is masked."""
        placeholders = {modality.placeholder for modality in self._protocol.modalities}
        given = getattr(self.model.config.get_text_config(), "pad_token_id", None)
        candidates = [given, *range(len(placeholders) + 1)]
        return next(int(c) for c in candidates if c is not None and c not in placeholders)

    @staticmethod
    def _compact(arguments: Mapping[str, Any], positions: Tensor | None) -> Tensor:
        """Positions of the shorter prompts, counted anew."""
        if positions is not None:
            raise OptionError('position_ids contradict positions="compact": pass one of them')
        mask: Tensor = arguments["attention_mask"].long()
        return (mask.cumsum(-1) - 1).clamp(min=0)

    # ------------------------------------------------------------ caches

    def _state(self, cache: Any) -> Continued | None:
        return None if cache is None else self._continued.get(cache)

    @staticmethod
    def _refuse_started(cache: Any) -> None:
        if cache is not None and cache.get_seq_length() > 0:
            raise OptionError(
                "past_key_values of another call and new visual inputs: pass the whole "
                "conversation without a cache"
            )

    def _refuse_packing(self, arguments: Mapping[str, Any]) -> None:
        """Positions with gaps and no mask would be read as several sequences in one."""
        if self._positions == "original" and arguments.get("use_cache") is False:
            raise OptionError(
                "use_cache=False: without a cache, positions with gaps are read as several packed "
                'prompts; use the cache, or positions="compact"'
            )
        self._refuse_flash()

    def _refuse_flash(self) -> None:
        kind = str(getattr(self.model.config.get_text_config(), "_attn_implementation", ""))
        if self._positions == "original" and "flash" in kind:
            raise OptionError(
                "flash attention reads positions with gaps as several packed prompts: use "
                'attn_implementation="sdpa", or positions="compact"'
            )

    def _remember(
        self, output: Any, cut: Cut, arguments: Mapping[str, Any], positions: Tensor | None
    ) -> None:
        cache = getattr(output, "past_key_values", None)
        if cache is None:
            return
        after = None if positions is None else positions[..., -1:] + 1
        self._continued[cache] = Continued(cut, arguments["input_ids"].shape[1], after)

    def _continue(self, arguments: dict[str, Any], state: Continued) -> Any:
        """A call that goes on behind a prompt that was cut."""
        given, cache = arguments.get("input_ids"), arguments["past_key_values"]
        new = given if given is not None else arguments["inputs_embeds"]
        mask = arguments.get("attention_mask")
        if mask is None or mask.dim() == 2:
            arguments["attention_mask"] = state.mask(mask, cache.get_seq_length(), new.shape[1])
        if arguments.get("position_ids") is None and state.next is not None:
            steps = torch.arange(new.shape[1], device=new.device)
            arguments["position_ids"] = state.next + steps
            state = state.moved(new.shape[1])
        output = self.model(**arguments)
        after = getattr(output, "past_key_values", None)
        if after is not None:
            self._continued[after] = state
        return output

    def _continue_seeing(self, arguments: dict[str, Any], state: Continued) -> Any:
        """A call with new images behind a prompt that was cut: they are cut, too."""
        prompts, cache = arguments["input_ids"], arguments["past_key_values"]
        if prompts is None or state.next is None or arguments.get("position_ids") is not None:
            raise OptionError("new visual inputs behind a cache: pass input_ids, no position_ids")
        self._refuse_flash()
        length, cached = prompts.shape[1], cache.get_seq_length()
        mask = state.mask(arguments.get("attention_mask"), cached, length)
        part = {k: v for k, v in arguments.items() if k != "past_key_values"}
        part["attention_mask"] = None if mask is None else mask[:, cached:]
        chosen = self._choose(part)
        cut = self._cut(part, chosen)
        full, positions = self._without_pixels(part), None
        if self._positions == "original":
            alone = {**full, "attention_mask": None}
            positions = forward_positions(
                self._protocol, self._with_outputs(alone, chosen, "full", encoders_too=part)
            )
            positions = positions - positions[..., :1] + state.next
        made = self._applied(cut, full, positions)
        if positions is None:
            positions = made["position_ids"] = made["position_ids"] + state.next
        before = state.cut.real.new_ones(len(prompts), cached) if mask is None else mask[:, :cached]
        made["attention_mask"] = torch.cat((before.long(), made["attention_mask"]), 1)
        output = self.model(**self._with_outputs(made, chosen, "output"), past_key_values=cache)
        after = positions[..., -1:] + 1
        self._continued[cache] = state.joined(cut, cached, length, after)
        return output


def _with_prompts(output: Any, prompts: Tensor, length: int) -> Any:
    """Generated sequences behind the full prompts in place of the cut ones."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    full = prompts.repeat_interleave(len(sequences) // len(prompts), 0)
    made = torch.cat((full.to(sequences.device), sequences[:, length:]), 1)
    if isinstance(output, Tensor):
        return made
    output.sequences = made
    return output


def vlm(
    model: Any,
    method: HiPrune | None = None,
    *,
    selector: Selector | None = None,
    positions: Positions = "original",
    inner: str | Callable[..., Any] | None = None,
) -> VisionLanguageModel:
    """A vision-language model whose language model is given fewer visual tokens.

    Args:
        model: Of ``transformers``, or anything with its protocol (docs/vlm.md); it is not changed.
        method: Budget and layers; ``keep`` counts visual tokens of an image or video. Default
            ``HiPrune(where="output")``.
        selector: Another way to choose; default is the rule of the method.
        positions: ``"original"``: what stays keeps the positions of the full prompt;
            ``"compact"``: positions are counted anew.
        inner: A backend of ``torch.compile`` for the language model over shorter prompts; another
            budget compiles nothing anew. Default: it runs as it is.

    Raises:
        OptionError: If the model lacks a piece of the protocol, or an option is not valid.
    """
    check_choice("positions", positions, ("original", "compact"))
    wanted = method or HiPrune(where="output")
    if not isinstance(wanted, HiPrune):
        raise OptionError(f"method={wanted!r}: expected HiPrune(...)")
    if wanted.stages is not None:
        raise OptionError("stages cut inside an encoder: a language model is given its output")
    return VisionLanguageModel(model, wanted, selector, positions, inner)
