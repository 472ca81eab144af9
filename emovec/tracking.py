"""What each forward pass of a model is of: which tokens, of which kind, and which of them are padding.

Follows plain forward passes, with or without a KV cache, and ``generate`` of transformers.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from emovec.models import decoder_path, unwrapped

_MODES = ("greedy_search", "sample", "beam_search", "beam_sample")
_NEVER = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Span:
    """The tokens of one forward pass: ``batch`` sequences of ``width`` columns.

    start: columns of the sequences that came before. prompt: so many columns, from the left, are prompt, the others
    generated. ids: [batch, width] or None. real: [batch, width] bool, false for padding; None: no padding. fresh: the
    sequences begin here. generating: inside ``generate``. prompts: sequences before beams and copies were made of them.
    """

    batch: int
    width: int
    start: int
    prompt: int
    ids: Tensor | None
    real: Tensor | None
    fresh: bool
    generating: bool
    prompts: int

    @property
    def tokens(self) -> int:
        return self.batch * self.width


class Listener(Protocol):
    """Who is told."""

    follows: bool
    """Whether it keeps something per sequence, so that it cannot have beams change places."""

    def begin(self, span: Span) -> None:
        """Before the forward pass."""

    def end(self, span: Span) -> None:
        """After it, unless it failed."""

    def decide(self) -> Mapping[int, int | None]:
        """Before each token is chosen: sequence -> the token it gets instead, or None to end it; asked until it has ended."""


@dataclass
class _Generation:
    """One call of ``generate``; columns are counted from its first forward pass."""

    assistant: Any
    config: Any = None
    prompts: int = 0
    start: int = 0
    columns: int = 0
    boundary: int | None = None  # columns of the prompt, once it is complete
    mask: Tensor | None = None
    limit: Tensor | None = None  # [batch] columns of each sequence until it ended
    ending: tuple[int, ...] = ()  # the sequences that the listener ends


class Tracker:
    """Tells ``listener`` of every forward pass of ``model``, from :meth:`install` to :meth:`remove`."""

    def __init__(self, model: nn.Module, listener: Listener) -> None:
        self.path, self.blocks = decoder_path(unwrapped(model))
        self.active = False
        self._listener = listener
        self._parameters = _parameters(self.path)
        self._handles: dict[nn.Module, tuple[Any, Any]] = {}
        self._patches: list[_Patch] = []
        self._owner: nn.Module | None = None
        self._span: Span | None = None
        self._generation: _Generation | None = None
        self._end, self._batch = 0, 0
        # Dynamo runs the hooks of the module that was compiled outside its graph, as frames of their own: leave those alone.
        self._enter_hook = torch.compiler.disable(self._enter)  # type: ignore[no-untyped-call]
        self._leave_hook = torch.compiler.disable(self._leave)  # type: ignore[no-untyped-call]

    def install(self) -> None:
        """Hook the modules from the model down to the one with the blocks: wrappers call some of them by ``forward``, some by ``()``."""
        for module in self.path:
            self._arm(module)
        generating = [module for module in self.path if hasattr(type(module), "_get_stopping_criteria")]
        for module in generating[-1:]:
            self._patches = [
                _Patch(module, "generate", self._generate),
                _Patch(module, "prepare_inputs_for_generation", self._prepare_inputs),
                _Patch(module, "_get_logits_processor", self._logits_processor),
                _Patch(module, "_get_stopping_criteria", self._stopping_criteria),
            ]

    def remove(self) -> None:
        """Undo :meth:`install`; twice is once."""
        self._release()
        for module in list(self._handles):
            self._disarm(module)
        for patch in self._patches:
            patch.remove()
        self._patches = []

    # --- forward passes -----------------------------------------------------------------------------------------------

    def _arm(self, module: nn.Module) -> None:
        if module not in self._handles:
            self._handles[module] = (
                module.register_forward_pre_hook(self._enter_hook, with_kwargs=True),
                module.register_forward_hook(self._leave_hook, always_call=True),
            )

    def _disarm(self, module: nn.Module) -> None:
        for handle in self._handles.pop(module, ()):
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The hooks of the inner modules go while the outer one runs: a compiled graph would have to break for them.
        self._owner, self.active = module, True
        for other in self.path:
            if other is not module:
                self._disarm(other)
        self._span = self._describe(module, {**dict(zip(self._parameters[module], args, strict=False)), **kwargs})
        self._listener.begin(self._span)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        span, self._span = self._span, None
        self._release()
        if output is not None and span is not None:  # else the forward pass failed
            self._listener.end(span)

    def _release(self) -> None:
        if self._owner is not None:
            self._owner, self.active = None, False
            for module in self.path:
                self._arm(module)

    def _describe(self, module: nn.Module, inputs: dict[str, Any]) -> Span:
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        given = embeds if ids is None else ids
        if not isinstance(given, Tensor) or given.dim() < 2:
            raise ValueError(f"{type(module).__name__} was called without input_ids [batch, tokens] or inputs_embeds [batch, tokens, d]")
        batch, width = given.shape[:2]
        generation = self._generation
        if generation is None:
            past = _cache_length(inputs, captured=self._end)
            fresh = past == 0 or past > self._end or batch != self._batch
            prompt = width if past == 0 or width > 1 else 0
            span = Span(batch, width, past, prompt, ids, _real(inputs.get("attention_mask"), past, width), fresh, False, batch)
        else:
            span = self._describe_generated(generation, inputs, batch, width, ids)
        self._end, self._batch = span.start + width, batch
        return span

    def _describe_generated(self, generation: _Generation, inputs: dict[str, Any], batch: int, width: int, ids: Tensor | None) -> Span:
        fresh = generation.columns == 0
        if fresh:
            generation.start = _cache_length(inputs, unknown=0)
        recomputed = generation.boundary is not None and width > 1  # use_cache=False: the whole sequence again
        first = 0 if recomputed else generation.columns
        prompt = width if generation.boundary is None else generation.boundary if recomputed else 0
        generation.columns = first + width
        real = None if prompt == 0 or generation.mask is None else generation.mask[:, -width:] != 0
        if generation.limit is not None:
            columns = torch.arange(first, first + width, device=generation.limit.device)
            going = columns < generation.limit[:, None]
            real = going if real is None else real & going.to(real.device)
        return Span(batch, width, generation.start + first, prompt, ids, real, fresh, True, generation.prompts)

    # --- generate -----------------------------------------------------------------------------------------------------

    def _generate(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("custom_generate") is not None or kwargs.get("cache_implementation") == "paged":
            raise ValueError("generate(custom_generate=...) and generate(cache_implementation='paged') cannot be followed while attached")
        self._generation = _Generation(assistant=kwargs.get("assistant_model"))
        try:
            return inner(*args, **kwargs)
        finally:
            self._generation = None
            self._release()

    def _prepare_inputs(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note the mask before it is turned into 4-D masks, where padding cannot be told any more."""
        mask = inspect.signature(inner).bind(*args, **kwargs).arguments.get("attention_mask")
        if self._generation is not None:
            self._generation.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        return inner(*args, **kwargs)

    def _logits_processor(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(inner).bind(*args, **kwargs).arguments
        processors = inner(*args, **kwargs)
        if self._generation is not None:
            self._generation.config = given["generation_config"]
            self._generation.prompts = given["encoder_input_ids"].shape[0]
            _refuse(self._generation, self._listener.follows)
            processors.append(_Decision(self))
        return processors

    def _stopping_criteria(self, inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Note which sequences have ended: what the model is fed for them from then on is padding."""
        criteria, tracker = inner(*args, **kwargs), self
        kind: Any = type(criteria)

        class Noted(kind):  # type: ignore[misc]
            def __call__(self, *args: Any, **kwargs: Any) -> Any:
                return tracker._note_ended(super().__call__(*args, **kwargs))

        return Noted(criteria)

    def _note_ended(self, done: Tensor) -> Tensor:
        generation = self._generation
        if generation is None or beams(generation.config) > 1:  # beams: `done` is of candidates, not of sequences
            return done
        for row in generation.ending:
            done[row] = True
        if len(done) > 1:  # a lone sequence ends the loop
            limit = torch.full_like(done, _NEVER, dtype=torch.int64) if generation.limit is None else generation.limit
            generation.limit = torch.where(done, limit.clamp(max=generation.columns), limit)
        return done

    def _choose(self, scores: Tensor) -> Tensor:
        generation = self._generation
        if generation is None:
            return scores
        if generation.boundary is None:
            generation.boundary = generation.columns
        if beams(generation.config) > 1:
            return scores
        decided = self._listener.decide()
        generation.ending = tuple(row for row, token in decided.items() if token is None)
        if decided:
            scores = scores.clone()
            for row, token in decided.items():
                scores[row] = -torch.inf
                scores[row, _filler(generation.config) if token is None else token] = 0.0
        return scores


class _Decision:
    """The last logits processor: the prompt is complete, a token is about to be chosen."""

    def __init__(self, tracker: Tracker) -> None:
        self._tracker = tracker

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self._tracker._choose(scores)


class _Patch:
    """A method of one module replaced by ``around(inner, ...)``. Patches of the same method may be removed in any order."""

    def __init__(self, module: nn.Module, name: str, around: Callable[..., Any]) -> None:
        self.module, self.name = module, name
        self.inner: Any = getattr(module, name)
        self.was_own = name in vars(module)

        @functools.wraps(self.inner)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            return around(self.inner, *args, **kwargs)

        replacement.emovec_patch = self  # type: ignore[attr-defined]
        self.replacement = replacement
        vars(module)[name] = replacement

    def remove(self) -> None:
        top = vars(self.module).get(self.name)
        if top is self.replacement:
            if self.was_own:
                vars(self.module)[self.name] = self.inner
            else:
                del vars(self.module)[self.name]
            return
        while (above := getattr(top, "emovec_patch", None)) is not None:
            if above.inner is self.replacement:
                above.inner, above.was_own = self.inner, self.was_own
                return
            top = above.inner


def _parameters(path: list[nn.Module]) -> dict[nn.Module, list[str]]:
    """The names of each module's positional arguments; a wrapper's ``*args`` are those of the module within."""
    names: dict[nn.Module, list[str]] = {}
    inner: list[str] = []
    for module in reversed(path):
        parameters = inspect.signature(module.forward).parameters.values()
        own = [parameter.name for parameter in parameters if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)]
        passes_on = any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters)
        names[module] = inner = own + inner[len(own) :] if passes_on else own
    return names


def beams(config: Any) -> int:
    return getattr(config, "num_beams", None) or 1


def _refuse(generation: _Generation, follows: bool) -> None:
    """Raise for what ``generate`` can do and a tracker cannot follow."""
    config = generation.config
    mode = getattr(config.get_generation_mode(generation.assistant), "value", None)
    if mode not in _MODES:
        raise ValueError(f"generate in mode {mode!r} cannot be followed while attached; greedy search, sampling and beam search can")
    if config.guidance_scale not in (None, 1, 1.0):
        raise ValueError(
            f"guidance_scale={config.guidance_scale}: the second, unconditional sequence cannot be told from the first while attached"
        )
    if follows and beams(config) > 1:
        raise ValueError(
            f"beams change places, so num_beams={config.num_beams} cannot be read or guarded; num_beams=1 can, or attach(..., read=False)"
        )


def _filler(config: Any) -> int:
    """The token that follows the end of a sequence in a batch."""
    for name in ("pad_token_id", "eos_token_id"):
        value = getattr(config, name, None)
        if value is not None:
            return int(value[0] if isinstance(value, list) else value)
    return 0


def _cache_length(inputs: dict[str, Any], unknown: int | None = None, captured: int = 0) -> int:
    """How many tokens the KV cache among the inputs holds; ``captured``, where the pass is captured and only the GPU knows."""
    cache = next((inputs[name] for name in ("past_key_values", "cache_params") if inputs.get(name) is not None), None)
    if cache is None:
        return 0
    try:
        length = cache.get_seq_length()
        return captured if _is_captured(length) else int(length)
    except (AttributeError, ValueError) as error:
        if unknown is not None:
            return unknown
        raise ValueError(f"cannot tell how many tokens a {type(cache).__name__} holds; inside generate it is not needed") from error


def _is_captured(length: Any) -> bool:
    """Whether a CUDA graph is being captured around ``length``, so that it must stay where it is."""
    return isinstance(length, Tensor) and length.is_cuda and torch.cuda.is_current_stream_capturing()


def _real(mask: Any, past: int, width: int) -> Tensor | None:
    """The columns ``past`` to ``past + width`` of a 2-D attention mask, as bool."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        what = f"a tensor of shape {tuple(mask.shape)}" if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(f"padding can only be told from an attention_mask [batch, tokens], got {what}")
    if mask.shape[1] >= past + width:
        return mask[:, past : past + width] != 0
    if mask.shape[1] == width:
        return mask != 0
    raise ValueError(f"attention_mask has {mask.shape[1]} columns, but there are {past} tokens in the cache and {width} new ones")
