"""The command that shows prompts of several questions."""

import json
from pathlib import Path
from typing import Annotated

import typer

_COUNT = 5


def prompts(
    questions: Annotated[int, typer.Option(min=2, help="How many questions a prompt has.")] = 2,
    count: Annotated[int, typer.Option(min=1, help="How many prompts.")] = _COUNT,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    data: Annotated[Path, typer.Option(help="The folder that the pipeline writes to.")] = Path(
        "data"
    ),
) -> None:
    """Show prompts of several test questions, each of another task, as systems are evaluated.

    Example: dlplora prompts --questions 3
    """
    from dlplora.errors import DataError
    from dlplora.evaluation.items import TaskItems
    from dlplora.evaluation.multi_question import draw_prompts, numbered_text
    from dlplora.params.load import load_params
    from dlplora.records.examples import examples_path, read_examples

    params = load_params(data.parent / "params.yaml")
    files = {task: examples_path(data / "examples", "test", task) for task in params.tasks}
    made = {task: file for task, file in files.items() if file.exists()}
    if questions > len(made):
        raise DataError(
            f"{questions} questions, each of another task: examples of {len(made)} of "
            f"{len(files)} tasks are made; add tasks, or run `dlplora repro ingest`"
        )
    tests = [TaskItems(read_examples(file), params.tasks[task]) for task, file in made.items()]
    drawn = draw_prompts(tests, questions=questions, count=count, seed=params.seed)
    told = [
        {
            "tasks": [part.task for part in parts],
            "prompt": numbered_text([part.question for part in parts]),
            "answers": [list(part.answers) for part in parts],
        }
        for parts in drawn
    ]
    if as_json:
        typer.echo(json.dumps(told, ensure_ascii=False))
    else:
        typer.echo("\n\n".join(str(one["prompt"]) for one in told))
