"""Stage `evaluate`: score one system in all its settings."""

from pathlib import Path

from dlplora.evaluation.answer_store import kept_answers
from dlplora.evaluation.items import TaskItems
from dlplora.evaluation.run import evaluate, num_prompts
from dlplora.evaluation.settings import systems_in
from dlplora.models import load_base
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.records.examples import read_examples
from dlplora.records.files import written_folder
from dlplora.runtime import set_up
from dlplora.stage import code_file, progress, run, write_timing
from dlplora.systems.load import build
from dlplora.systems.system import Inputs
from dlplora.words import NUM_QUESTIONS


def main(
    system: str,
    base: Path,
    adapters: Path,
    artifact: Path,
    router: Path,
    tests: Path,
    scores: Path,
    timing: Path,
) -> None:
    """Answer the TESTS by SYSTEM, made of BASE, ADAPTERS, ARTIFACT and ROUTER; write to SCORES."""
    params = load_params()
    entry, tasks = named(params.systems, system, "systems"), sorted(params.tasks)
    place = set_up(params.runtime, seed=params.seed)
    loaded = load_base(base, place=place)
    inputs = Inputs(loaded, base, adapters, artifact, router, tasks, params.seed)
    items = [
        TaskItems(read_examples(tests / f"{task}.parquet"), params.tasks[task]) for task in tasks
    ]
    max_mib = params.answers.max_mib
    store = kept_answers(code=code_file(), base=base, place=place, max_mib=max_mib)
    settings = [setting for setting in NUM_QUESTIONS if system in systems_in(setting, params)]
    seconds: dict[str, float] = {}
    title, total = f"evaluate {system}", num_prompts(settings, items, params.evaluation)
    with store, progress(title, total=total) as advance:
        for setting, found in evaluate(
            build(entry, inputs),
            items,
            name=system,
            settings=settings,
            evaluation=params.evaluation,
            seed=params.seed,
            store=store,
            advance=advance,
        ):
            found.save(scores / setting / system)
            seconds[setting] = found.seconds
    for setting in NUM_QUESTIONS.keys() - seconds.keys():  # DVC wants every folder, none empty
        with written_folder(scores / setting / system) as folder:
            (folder / "not_asked").touch()
    write_timing(timing, parts=seconds)


if __name__ == "__main__":
    run(main)
