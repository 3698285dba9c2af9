"""The page Models: registered versions, the gate's verdicts, promoted and rolled back."""

import shlex
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import gradio as gr
from markupsafe import Markup

from dlplora.app.commands import shown
from dlplora.app.context import Context
from dlplora.app.guard import Changes, drawn
from dlplora.app.html import local, said, table
from dlplora.app.notice import Notice, header, html
from dlplora.app.run_panel import RunPanel
from dlplora.errors import ParamsError
from dlplora.lifecycle.registry import Registry, Version, state_of
from dlplora.project.commands import git
from dlplora.project.worktrees import author

_NOT_COMMITTED = "Not committed, and so not part of a retrain"
_SUBJECT = "Set up tasks and parameters"
_OURS = ("suites", "data/raw", "data/imported")


class ModelsPage:
    """What serves, what served, and what awaits a person's approval."""

    def __init__(self, context: Context, demo: gr.Blocks) -> None:
        self._context = context
        self._registry = Registry(context.root)
        header(
            "Models",
            "A retrain takes in the inbox and what is committed, trains what changed, and compares "
            "the result with the model in production. What is not worse is promoted.",
        )
        self._hint = html()
        self._commit_button = gr.Button("Commit", visible=False)
        with gr.Row():
            retrain = gr.Button("Retrain", variant="primary")
            back = gr.Button("Roll back", variant="stop")
            refresh = gr.Button("Refresh")
        self._notice = Notice(shown("models"))
        self._panel = RunPanel(context, demo)
        self._versions = html()
        with gr.Row():
            self._chosen = gr.Dropdown([], label="Version", scale=2)
            promote = gr.Button("Promote")
        self._verdict = html()
        gr.Markdown("## In production")
        self._history = html()
        self._connect(demo, retrain=retrain, back=back, refresh=refresh, promote=promote)

    def _connect(self, demo: gr.Blocks, **buttons: gr.Button) -> None:
        notice, panel = self._notice, self._panel
        self._listed = gr.State([])  # what the page says is not committed
        parts = [self._hint, self._listed, self._commit_button]
        parts += [self._versions, self._chosen, self._history]
        outputs = [*notice.outputs, *parts]
        look = notice.guarded(self._look)
        demo.load(look, self._chosen, outputs, show_progress="hidden")
        panel.ended.change(look, self._chosen, outputs, show_progress="hidden")
        buttons["refresh"].click(look, self._chosen, outputs)
        commit = notice.guarded(self._commit)
        self._commit_button.click(commit, [self._chosen, self._listed], outputs)
        buttons["retrain"].click(notice.guarded(self._retrain), None, [*notice.outputs, panel.id])
        buttons["promote"].click(notice.guarded(self._promote), self._chosen, outputs)
        buttons["back"].click(notice.guarded(self._roll_back), self._chosen, outputs)
        self._chosen.change(drawn(self._judged), self._chosen, self._verdict)

    def _look(self, chosen: str | None) -> Changes:
        changed = self._changed()
        versions, history = self._registry.versions(), self._registry.history()
        rows = [
            [
                version.name,
                state_of(version, history),
                float(version.card.score),
                version.card.verdict.overall.verdict if version.card.verdict else "the first",
                len(version.card.card.tasks),
                _local(version.card.created),
            ]
            for version in reversed(versions)
        ]
        heads = ["version", "now", "score", "verdict", "tasks", "created"]
        entries = [
            [entry.version, local(datetime.fromisoformat(entry.time))]
            for entry in reversed(history)
        ]
        names = [version.name for version in reversed(versions)]
        return {
            self._hint: said(f"{_NOT_COMMITTED}: {', '.join(changed)}" if changed else ""),
            self._listed: changed,
            self._commit_button: gr.Button(visible=bool(changed)),
            self._versions: table(
                heads, rows, title="Versions", empty="No model is registered yet. Press “Retrain”."
            ),
            self._chosen: gr.Dropdown(
                names, value=chosen if chosen in names else next(iter(names), None)
            ),
            self._history: table(
                ["version", "since"], entries, title="History", empty="No model was promoted yet."
            ),
        }

    def _changed(self) -> list[str]:
        """List what is not committed: tracked files, and new ones of tasks and suites."""
        return sorted({*self._files("diff", "--name-only", "HEAD", "--", "."), *self._new()})

    def _new(self) -> set[str]:
        return self._files("ls-files", "--others", "--exclude-standard", "--", *_OURS)

    def _files(self, command: str, *words: str) -> set[str]:
        relative = ["--relative"] if command == "diff" else []
        listed = git(self._context.root, command, "-z", *relative, *words)
        return {name for name in listed.split("\0") if name}

    def _commit(self, chosen: str | None, listed: Sequence[str]) -> Changes:
        """Commit what the page has listed, and nothing else."""
        root = self._context.root
        self._context.commands.refuse_at_work()
        changed, untracked = self._changed(), self._new()
        files = [name for name in listed if name in changed]
        if not files:
            raise ParamsError("what the page listed is committed already; refresh it")
        new = [name for name in files if name in untracked]
        if new:
            git(root, "add", "--", *new)
        git(root, *author(root), "commit", "--quiet", "-m", _SUBJECT, "--", *files)
        commands = [["git", "add", *new]] if new else []
        commands.append(["git", "commit", "-m", _SUBJECT, "--", *files])
        command = "\n".join(map(shlex.join, commands))
        done = self._notice.good("Committed: the next retrain takes it in.", command)
        return {**self._look(chosen), **done}

    def _judged(self, name: str | None) -> Markup:
        return _verdict_of(self._registry.named(name)) if name else Markup()

    def _retrain(self) -> Changes:
        run = self._context.runs.start("retrain/scheduled", {})
        return {
            **self._notice.good("The retrain has started.", "make retrain"),
            self._panel.id: run,
        }

    def _promote(self, name: str | None) -> Changes:
        if not name:
            raise ParamsError("choose the version to promote")
        told = self._context.commands.run("promote", "--", name)
        return {**self._look(name), **self._notice.good(told, shown("promote", name))}

    def _roll_back(self, chosen: str | None) -> Changes:
        told = self._context.commands.run("rollback")
        return {**self._look(chosen), **self._notice.good(told, shown("rollback"))}


def _verdict_of(version: Version) -> Markup:
    """Tell the gate's verdict in words, and task by task."""
    verdict = version.card.verdict
    if verdict is None:
        return Markup(
            "<p>{} was the first version: there was no earlier version to compare it with.</p>"
        ).format(version.name)
    rows: list[list[Any]] = [
        [
            task,
            row.verdict,
            row.n,
            float(row.candidate),
            float(row.promoted),
            f"{row.difference:+.3f}",
        ]
        for task, row in {"all tasks": verdict.overall, **verdict.tasks}.items()
    ]
    heads = ["task", "verdict", "items", version.name, verdict.against, "difference"]
    return Markup("<p>{}</p>").format(str(verdict)) + table(
        heads, rows, title="Verdict by task", empty=""
    )


def _local(time: str) -> Markup:
    return local(datetime.fromisoformat(time))
