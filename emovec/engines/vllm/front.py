"""The front end's side: requests are checked as they come in, and scores are put on the outputs they belong to."""

from __future__ import annotations

import functools
import weakref
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.logger import init_logger
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.utils.async_utils import make_async
from vllm.v1.engine.output_processor import OutputProcessor, RequestState

from emovec.bank import Bank
from emovec.engines.vllm import config, live, metrics, replies
from emovec.engines.vllm.requests import ADMITTED, FIELDS, Admission
from emovec.engines.vllm.scores import Collector, Scorer, Wanted
from emovec.engines.vllm.seams import after

logger = init_logger("vllm.emovec")


class RefusedError(VLLMValidationError, ValueError):  # type: ignore[misc]
    """A request that is refused: HTTP 400, and a ValueError in Python."""


def install(processor: Any) -> None:
    """Take part in what an input processor does, and in what becomes of its requests' outputs."""
    loaded = config.load(processor.vllm_config)
    assert loaded is not None
    front = _Front(Admission(loaded, processor.model_config.dtype, processor.tokenizer))
    process = processor.process_inputs

    def process_inputs(request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        return process(request_id, prompt, front.admitted(params, kwargs.get("resumable", False)), *args, **kwargs)

    processor.process_inputs = process_inputs
    processor.process_inputs_async = make_async(process_inputs, executor=processor.renderer._executor)
    metrics.show(loaded.metrics)
    live.announce(front.feed)
    _share(front)


class _Front:
    def __init__(self, admission: Admission) -> None:
        self.admission = admission
        self.bank: Bank = admission.config.bank
        self.layers = Scorer(self.bank, admission.config.layers).together
        self.feed = live.Feed(self.bank) if admission.config.live else None

    def admitted(self, params: Any, resumable: bool) -> Any:
        """The parameters as the engine gets them; the caller's are left alone."""
        if not isinstance(params, SamplingParams):
            return params
        if self.feed is not None and not self.feed.served:
            logger.warning_once("emovec: live is configured, but nothing shows it: that takes vLLM's server with emovec's middleware")
        try:
            admitted = self.admission.admit(params.extra_args)
            if admitted is not None and resumable:
                raise ValueError(f"{', '.join(FIELDS)} cannot be used where a prompt goes on after what was generated")
            if admitted is not None and params.logprobs is not None and any(one["do"] == "refuse" for one in admitted.get("guard", ())):
                raise ValueError("a guard that refuses cannot be used with logprobs: the text of a refusal has none")
        except ValueError as error:
            metrics.refused()
            raise RefusedError(str(error)) from None
        extra = params.extra_args or {}
        if admitted is None:
            return params
        if "steer" in admitted:
            metrics.steered()
        params = params.clone()
        ours = (*FIELDS, replies.KEY)
        params.extra_args = {key: value for key, value in extra.items() if key.split(".")[0] not in ours}
        params.extra_args[ADMITTED] = admitted
        if replies.KEY in extra:
            params.extra_args[ADMITTED] = {**admitted, "reply": extra[replies.KEY]}
        scored = [admitted["scores"]["on"]] if "scores" in admitted else []
        if any(on != "generated" for on in [*scored, *(one["on"] for one in admitted.get("guard", ()))]):
            params.skip_reading_prefix_cache = True  # what is read from the cache is not computed, so it has no scores
        return params

    def collector(self, request: Any, index: int, count: int, tokenizer: Any) -> Collector | None:
        """A place for the scores and events of a request, sequence ``index`` of the ``count`` of its prompt; None if it wants none."""
        params = request.sampling_params
        admitted = None if params is None or not params.extra_args else params.extra_args.get(ADMITTED)
        if admitted is None or not ("scores" in admitted or "guard" in admitted):
            return None
        scores = admitted.get("scores", {"on": "generated", "concepts": None, "top": None})
        length = len(request.prompt_token_ids if request.prompt_token_ids is not None else request.prompt_embeds)
        collector = Collector(self.bank, self.layers, Wanted.of(scores), length, request.prompt_token_ids, tokenizer)
        collector.shown = "scores" in admitted
        if "reply" in admitted:
            replies.expect(admitted["reply"], request.external_req_id, index, count, collector, scores["top"])
        return collector

    def receive(self, news: Any, state: Any) -> None:
        """Take in what came with an output; ``state`` is vLLM's of its request, or None if that is gone."""
        if news["counts"]:
            metrics.counted(self.admission.config.metrics, *news["counts"])
        if state is None:
            return
        if self.feed is not None:
            self.feed.scored(state.external_req_id, state.request_index, news["live"])
        collector = getattr(state, "emovec", None)
        if collector is None:
            return
        metrics.scored(collector.add(news["scores"]))
        collector.events += news["events"]
        for event in news["events"]:
            metrics.fired(self.bank, event["of"], event["do"])
            if self.feed is not None:
                self.feed.fired(state.external_req_id, state.request_index, event)


_made: _Front | None = None  # by an input processor, for the output processor of the same engine, which is made next
_last: weakref.ref[_Front] | None = None


def _share(front: _Front) -> None:
    """Outputs are handled by classes that know of no configuration: they are changed once, for all engines of the process."""
    global _made, _last
    first, _made, _last = _last is None, front, weakref.ref(front)
    if not first:
        return
    CompletionOutput.reading, CompletionOutput.events, OutputProcessor.emovec = None, (), None
    from_optional, process, complete = SamplingParams.from_optional, OutputProcessor.process_outputs, RequestState._new_completion_output

    @functools.wraps(from_optional)
    def checked(*args: Any, **kwargs: Any) -> SamplingParams:
        """A server (one engine) builds its parameters before it starts to answer, so a request is refused in time also when it streams."""
        last = None if _last is None else _last()
        try:
            if last is not None:
                last.admission.admit(kwargs.get("extra_args"))
        except ValueError as error:
            metrics.refused()
            raise RefusedError(str(error)) from None
        return from_optional(*args, **kwargs)

    @functools.wraps(process)
    def process_outputs(self: Any, outputs: Any, *args: Any, **kwargs: Any) -> Any:
        for output in outputs:
            if output.kv_transfer_params and ADMITTED in output.kv_transfer_params:
                news = output.kv_transfer_params.pop(ADMITTED)
                output.kv_transfer_params = output.kv_transfer_params or None
                self.emovec.receive(news, self.request_states.get(output.request_id))
        return process(self, outputs, *args, **kwargs)

    @functools.wraps(complete)
    def new_completion_output(self: Any, token_ids: Any, finish_reason: Any, stop_reason: Any) -> Any:
        output = complete(self, token_ids, finish_reason, stop_reason)
        collector = getattr(self, "emovec", None)
        if collector is not None and finish_reason is not None:
            output.reading = collector.reading(self.detokenizer.output_token_ids) if collector.shown else None
            output.events = tuple(collector.events)
        return output

    def collect(_: None, self: Any, request: Any, prompt: Any, parent: Any = None, index: int = 0, queue: Any = None) -> None:
        if self.emovec is not None:
            collector = self.emovec.collector(request, index, 1 if parent is None else parent.n, self.tokenizer)
            self.request_states[request.request_id].emovec = collector

    def adopt(_: None, self: Any, *args: Any, **kwargs: Any) -> None:
        global _made
        self.emovec, _made = _made, None

    def keep(_: None, self: Any, following: Any, aggregate: bool) -> None:
        for completion in following.outputs:
            for known in self.outputs:
                if known.index == completion.index and completion.finish_reason is not None:
                    known.reading, known.events = completion.reading, completion.events

    SamplingParams.from_optional = staticmethod(checked)
    OutputProcessor.process_outputs = process_outputs
    RequestState._new_completion_output = new_completion_output
    after(OutputProcessor, "__init__", adopt)
    after(OutputProcessor, "add_request", collect)
    after(RequestOutput, "add", keep)
