"""Stage `ingest`: validate one task's raw files and split them."""

from pathlib import Path

from dlplora.data.ingest import ingest
from dlplora.data.limits import ItemLimit
from dlplora.data.wordings import apply_wordings, read_wordings
from dlplora.params.fields import named
from dlplora.params.load import load_params
from dlplora.records.examples import check_primary, examples_path, write_examples
from dlplora.records.findings import write_findings
from dlplora.stage import run, write_timing


def main(
    task: str,
    raw: Path,
    own: Path,
    wordings: Path,
    base: Path,
    examples: Path,
    findings: Path,
    timing: Path,
) -> None:
    """Split the items of TASK in RAW and OWN, to be asked of BASE also in other WORDINGS.

    Writes EXAMPLES and FINDINGS.
    """
    params = load_params()
    settings = named(params.tasks, task, "tasks")
    limit = ItemLimit.load(base, max_tokens=params.adapter.max_tokens)
    other = read_wordings(wordings)
    ingested = ingest(
        raw,
        task,
        keys=settings.keys,
        on_bad_row=settings.on_bad_row,
        splits=params.splits,
        more=[own],
        limit=limit,
    )
    check_primary(settings.primary, ingested.findings.kind, task=task)
    for split, part in ingested.examples.items():
        write_examples(
            examples_path(examples, split, task), apply_wordings(other, part, split, limit=limit)
        )
    write_findings(findings, ingested.findings)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
