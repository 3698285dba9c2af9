"""Commands that ask: answers, routes and the scores of options."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dlplora.errors import GenerationError, ParamsError
from dlplora.words import Policy, Visible

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from dlplora.engine.answers import Answer
    from dlplora.engine.runner import Runner
    from dlplora.records.routes import Route
    from dlplora.records.scores import OptionScores


def _fallback(told: str) -> float | Literal["auto"]:
    """Read a threshold of confidence."""
    try:
        return "auto" if told == "auto" else float(told)
    except ValueError as error:
        raise typer.BadParameter(f"{told!r} is neither a number nor auto") from error


PromptArgument = Annotated[str, typer.Argument(help="The prompt, or - to read it from stdin.")]
DataOption = Annotated[Path, typer.Option(help="The folder that the pipeline writes to.")]
SystemOption = Annotated[
    str | None,
    typer.Option(
        help="A system of params.yaml, with the task where it needs one, such as single:TASK.",
        show_default="default_system of params.yaml",
    ),
]
FallbackOption = Annotated[
    Any,  # float | Literal["auto"]
    typer.Option(
        parser=_fallback,
        metavar="0…1|auto",
        help="Less sure routes go to the base model; auto: the threshold that validation gives.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def generate(
    prompt: PromptArgument,
    system: SystemOption = None,
    compare: Annotated[
        str | None, typer.Option(metavar="A,B,…", help="Answer by several systems side by side.")
    ] = None,
    policy: Annotated[
        Policy | None,
        typer.Option(
            help="Split the prompt into its questions and route each; route the prompt once; or "
            "again at each sentence, the cache kept or re-prefilled.",
            show_default="split; the systems' own with --compare",
        ),
    ] = None,
    visible: Annotated[
        Visible, typer.Option(help="What a question of a prompt that is split may see.")
    ] = "own",
    options_of: Annotated[
        str | None,
        typer.Option(metavar="TASK", help="Answer by the likeliest of this task's options."),
    ] = None,
    trace: Annotated[bool, typer.Option("--trace", help="Colour sentences by adapters.")] = False,
    as_json: JsonOption = False,
    max_new_tokens: Annotated[int, typer.Option(help="The longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw from the k likeliest tokens; 0: all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw from the likeliest that sum to p.")] = 1.0,
    repetition_penalty: Annotated[float, typer.Option(help="More than 1 repeats less.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed draws the same answer.")] = 0,
    stop: Annotated[
        list[str] | None, typer.Option(help="End before this text; may be given again.")
    ] = None,
    fallback_below: FallbackOption = "auto",
    log: Annotated[Path | None, typer.Option(help="Append every decision to this file.")] = None,
    data: DataOption = Path("data"),
) -> None:
    """Answer a prompt, word by word, by a system: adapters, and a router that chooses them.

    Example: dlplora generate "Today I paint. Yesterday I " --trace
    """
    from dlplora.cli import display
    from dlplora.engine.requests import Request
    from dlplora.sampling import Sampling
    from dlplora.systems.load import Systems

    sampling = Sampling(
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop or ()),
    )
    asked = _read(prompt)
    names = [] if compare is None else [name.strip() for name in compare.split(",")]
    if names and (system is not None or len(set(names)) < len(names)):
        wrong = "a --system" if system is not None else f"{compare!r}"
        raise ParamsError(f"--compare takes different systems A,B,… and no --system; found {wrong}")
    systems = Systems(data, names or [system])
    request = Request(
        asked, sampling, policy=policy or (None if names else "split"), visible=visible
    )

    def running(name: str | None) -> "AbstractContextManager[Runner]":
        chosen = systems.named(name)
        decisions = systems.decision_log(log, name, chosen)
        return chosen.running(fallback_below=chosen.threshold(fallback_below), log=decisions)

    def answered(name: str | None) -> "Answer":
        with running(name) as runner:
            return runner.generate([request])[0]

    if options_of is not None:
        if names:
            raise ParamsError("--options-of weighs options by one system; leave out --compare")
        labels = systems.labels(options_of)
        with running(system) as runner:
            found, scores = _weighed(runner, asked, labels)
        _show_options(found, scores, as_json=as_json, only_best=not trace)
    elif as_json:
        told = {name: asdict(answered(name)) for name in names} or asdict(answered(system))
        typer.echo(json.dumps(told, ensure_ascii=False))
    elif names:
        display.side_by_side({name: answered(name) for name in names}, trace=trace)
    else:
        with running(system) as runner:
            display.stream(runner.stream(request), trace=trace)


def route(
    text: PromptArgument,
    system: SystemOption = None,
    as_json: JsonOption = False,
    fallback_below: FallbackOption = "auto",
    data: DataOption = Path("data"),
) -> None:
    """Show which adapters a system would choose and, where its router knows, how sure it is.

    Example: dlplora route "Today I paint. Yesterday I "
    """
    from dlplora.cli import display
    from dlplora.systems.load import Systems

    asked = _read(text)
    chosen = Systems(data, [system]).named(system)
    threshold = chosen.threshold(fallback_below)
    with chosen.running(fallback_below=threshold) as runner:
        (found,) = runner.route([asked])
    probabilities = chosen.probabilities(asked)
    if as_json:
        told = {
            "route": asdict(found),
            "probabilities": probabilities,
            "fallback_below": threshold,
        }
        typer.echo(json.dumps(told, ensure_ascii=False))
    else:
        display.bars(probabilities or {}, found, threshold=threshold)


def score(
    prompt: PromptArgument,
    option: Annotated[list[str], typer.Option(help="An answer to weigh; give two or more.")],
    system: SystemOption = None,
    fallback_below: FallbackOption = "auto",
    as_json: JsonOption = False,
    data: DataOption = Path("data"),
) -> None:
    """Weigh the options of a multiple-choice question.

    Example: dlplora score "Sequence: ( ( ] Valid/Invalid? " --option Valid --option Invalid
    """
    from dlplora.systems.load import Systems

    asked = _read(prompt)
    if len(option) < 2:
        raise GenerationError(f"found one option, {option[0]!r}; expected at least two to weigh")
    if len(set(option)) < len(option):
        raise GenerationError(f"found the options {option}; expected all different")
    chosen = Systems(data, [system]).named(system)
    with chosen.running(fallback_below=chosen.threshold(fallback_below)) as runner:
        found, scores = _weighed(runner, asked, option)
    _show_options(found, scores, as_json=as_json, only_best=False)


def _weighed(
    runner: "Runner", asked: str, options: "Sequence[str]"
) -> tuple["Route", "OptionScores"]:
    """Route a prompt, and score options as its answer by that route."""
    (found,) = runner.route([asked])
    return found, runner.score(asked, options, route=found)


def _show_options(
    found: "Route", scores: "OptionScores", *, as_json: bool, only_best: bool
) -> None:
    from dlplora.cli import display

    if as_json:
        told = {"route": asdict(found), "best": scores.best, **asdict(scores)}
        typer.echo(json.dumps(told, ensure_ascii=False))
    elif only_best:
        typer.echo(scores.best)
    else:
        display.options(scores, found)


def _read(prompt: str) -> str:
    """Return a prompt, or what is on stdin; `GenerationError` if it is empty or not UTF-8."""
    try:
        text = sys.stdin.read().strip() if prompt == "-" else prompt
        text.encode()
    except UnicodeError as error:
        raise GenerationError("the prompt is not UTF-8") from error
    if not text.strip():
        raise GenerationError("the prompt is empty")
    return text
