"""The page and the picture that the demo leaves behind."""

from __future__ import annotations

from pathlib import Path

from emovec.cli import demo_steps as steps
from emovec.monitor import Reading
from emovec.report import page
from emovec.report.charts import bars, lines
from emovec.report.heatmap import heatmap
from emovec.report.markup import Html
from emovec.report.picture import heatmap_svg
from emovec.report.prose import samples, text
from emovec.report.tables import bounds, figures, matrix, odds_table

PICTURED = ("peaceful", "terrified", "enraged", "relieved")


def write_page(
    directory: Path,
    name: str,
    readings: list[Reading],
    steered: steps.Steered,
    clamped: steps.Clamped,
    guarded: steps.Guarded,
    timed: list[steps.Timed],
) -> Path:
    """Write ``index.html`` and ``picture.svg`` into ``directory``; the page's path."""
    prompts, story = readings[:-1], readings[-1]
    title = "What a model reads in a story (smoothed over a few tokens)"
    heatmap_svg(story.smooth(3)[1:], list(PICTURED), directory / "picture.svg", title=title)
    sections = [
        _summary(story, clamped, guarded, timed),
        heatmap(story, list(PICTURED), title="A story, token by token", note="Pick a concept; point at a token for its strongest ones."),
        lines(story, list(PICTURED), title="Over the story"),
        bars(
            {words: reading.top(5) for words, reading in zip(steps.PROMPTS, prompts, strict=True)},
            title="Six prompts, their strongest concepts",
            unit=f"mean {story.unit}",
        ),
        matrix(
            {words: reading.families() for words, reading in zip(steps.PROMPTS, prompts, strict=True)},
            title="The same prompts by family",
            note="Each cell is the mean over a family's members.",
        ),
        odds_table(
            steered.odds,
            title="A bias changes what the model says of a feeling",
            note=f"Odds of the word that “{steps.FEELS}” goes on with, among these {len(steps.FEELINGS)}.",
        ),
        samples(
            list(zip(steered.labels, steered.texts, strict=True)),
            prompt=steps.WRITE,
            title="One batch, a bias for each sequence",
            note="The likeliest tokens; strengths are shares of the stream's typical norm at each steered layer.",
        ),
        bounds(
            list(zip(clamped.names, clamped.before, clamped.after, clamped.targets, clamped.targets, strict=True)),
            title="Two correlated concepts, each set to a score of its own",
            note=f"Means of {clamped.tokens} tokens. The cosine of the two directions is {clamped.cosine:.2f}. With both rules together no "
            f"token is off by more than {max(clamped.off):.2f}; with one rule after the other, by up to {max(clamped.in_turn):.2f}.",
        ),
        _guard(guarded),
        text(
            "A score is a z-score of a projection against ordinary text. It says how active a direction is that was made from stories "
            "about an emotion; it does not say that a model feels anything. The model is small and its bank comes from one writer's "
            "stories: on other texts the right word is often not the first, and neighbours in meaning take its place.",
            title="How to read this",
        ),
    ]
    return page.write(
        directory / "index.html", f"emovec on {name}", sections, lede="Reading, steering, clamping and guarding a real model."
    )


def _summary(story: Reading, clamped: steps.Clamped, guarded: steps.Guarded, timed: list[steps.Timed]) -> Html:
    prefill, decode = timed
    stopped = "none" if guarded.event is None else f"token {guarded.event.position}"
    return figures(
        [
            (str(len(story.names)), "concepts read at every token", f"at {story.where}"),
            (
                f"{prefill.share:.2%}",
                f"of a forward pass of {prefill.tokens} tokens",
                f"{prefill.op * 1e3:.2f} of {prefill.forward * 1e3:.0f} ms",
            ),
            (f"{decode.share:.2%}", "of that of one token", f"{decode.op * 1e6:.0f} µs of {decode.forward * 1e3:.1f} ms"),
            (f"{clamped.cosine:.2f}", "cosine of two concepts that are set apart", f"off by at most {max(clamped.off):.2f}"),
            (stopped, "the guard stopped the generation", f"{guarded.threshold.label} above {guarded.threshold.above:+.2f}"),
        ]
    )


def _guard(guarded: steps.Guarded) -> Html:
    threshold, event = guarded.threshold, guarded.event
    events = {} if event is None else {event.position: "stopped"}
    note = (
        f"The threshold is what {guarded.ordinary} ordinary conversations cross with a probability of {steps.FALSE_ALARMS:.0%}; "
        f"{threshold.hold} tokens in a row must be above it. Without the guard: “{guarded.unguarded}”"
    )
    name = threshold.label
    return lines(
        guarded.reading,
        [name],
        halflife=threshold.halflife,
        thresholds={name: threshold.above},
        events=events,
        title="The guard",
        note=note,
    )
