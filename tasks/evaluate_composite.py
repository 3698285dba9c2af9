"""Stage `evaluate_composite`: answer several questions in one prompt, by every policy."""

from pathlib import Path

from dlplora.adapters import read_adapters
from dlplora.engine.runner import Runner
from dlplora.evaluation.composites import answer_by_policies, draw_composites, readable
from dlplora.evaluation.settings import POLICIES
from dlplora.lora.attach import attached
from dlplora.models import load_base
from dlplora.params import load_params, named
from dlplora.records.examples import read_examples
from dlplora.routing.build import build_router
from dlplora.runtime import set_up
from dlplora.stage import progress, run, write_timing


def main(
    setting: str, base: Path, adapters: Path, artifact: Path, tests: Path, out: Path, timing: Path
) -> None:
    """Answer composites of TESTS by BASE, ADAPTERS and the router in ARTIFACT; write to OUT."""
    params = load_params()
    chosen, tasks = named(params.composites, setting, "composites"), sorted(params.tasks)
    loaded = load_base(base, place=set_up(params.runtime, seed=params.seed), attention="sdpa")
    router = build_router(
        params.systems[chosen.system], artifact, base, tasks=tasks, seed=params.seed
    )
    examples = {task: read_examples(tests / f"{task}.parquet") for task in tasks}
    drawn = draw_composites(examples, parts=chosen.parts, count=chosen.count, seed=params.seed)
    folders = [adapters / task for task in tasks]
    pool = read_adapters(folders, base_fingerprint=loaded.fingerprint)
    with attached(loaded.model, pool) as attached_pool:
        places = params.evaluation.batch_size
        engine = Runner(loaded, attached_pool, router=router, places=places)
        composites = readable(engine, drawn, params.tasks)
        title = f"{setting}: {len(composites)} of {len(drawn)} fit the model"
        with progress(title, total=len(POLICIES) * len(composites)) as advance:
            runs = answer_by_policies(
                engine, composites, params.tasks, setting=setting, seed=params.seed, advance=advance
            )
    out.mkdir(parents=True, exist_ok=True)  # empty with fewer tasks than parts
    for policy, answered in runs.items():
        answered.scores.save(out / policy)
    write_timing(timing, parts={policy: answered.seconds for policy, answered in runs.items()})


if __name__ == "__main__":
    run(main)
