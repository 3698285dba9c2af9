"""Stage `import_adapter`: make a LoRA adapter that was trained elsewhere one task's adapter."""

from pathlib import Path

from dlplora.imports import import_adapter
from dlplora.stage import run, write_timing


def main(task: str, source: Path, base: Path, out: Path, timing: Path) -> None:
    """Check PEFT's folder SOURCE against BASE and write it to OUT as the adapter of TASK."""
    import_adapter(source, task=task, base=base).save(out)
    write_timing(timing)


if __name__ == "__main__":
    run(main)
