"""A pipeline of the real one's shape whose stages copy text, and do what words of it say.

`bad` fails, `once` fails the first time, `wait` waits for a file, `alone` fails beside another
one, `meet` waits for another one to come.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socket import create_server
from threading import Thread
from typing import Any

import psutil
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.client.schemas.objects import State
from prefect.settings import get_current_settings

from flows.pipeline import worktree
from tests.project import ROOT, params

DVC_YAML = """\
stages:
  base_model:
    cmd: python stage.py base_model data/base.txt suites/base.txt
    deps: [stage.py, suites/base.txt]
    params: [base_model]
    outs: [data/base.txt]
    meta: {prefect: {retries: 1}}
  adapter:
    foreach: ${adapters}
    do:
      cmd: python stage.py adapter data/adapters/${key}.txt suites/${key}.txt data/base.txt
      deps: [stage.py, data/base.txt, 'suites/${key}.txt']
      params: ['adapters.${key}', adapter, seed]
      outs: ['data/adapters/${key}.txt']
      meta: {prefect: {limit: training}}
  compare:
    cmd: python stage.py compare data/comparison.json data/adapters
    deps: [stage.py, data/adapters]
    params: [tasks]
    metrics:
      - data/comparison.json: {cache: false}
  report:
    cmd: python stage.py report data/report data/comparison.json
    deps: [stage.py, data/comparison.json]
    outs: [data/report]
"""
STAGE = """\
import json, sys, time, yaml
from pathlib import Path

stage, out, *inputs = sys.argv[1:]
out, scratch = Path(out), Path(".scratch")
found = [sorted(Path(name).glob("*")) if Path(name).is_dir() else [Path(name)] for name in inputs]
text = "".join(file.read_text() for files in found for file in files)

def until(done):
    for _ in range(2400):
        if done():
            return
        time.sleep(0.05)
    sys.exit("error: waited too long")

def alone():
    (scratch / "alone").mkdir()  # fails if it is there
    time.sleep(0.5)
    (scratch / "alone").rmdir()

def meet():
    (scratch / f"{out.stem}.here").touch()
    until(lambda: len(list(scratch.glob("*.here"))) == 2)

def wait():
    until((scratch / "go").exists)

def once():
    if not (scratch / "tried").exists():
        (scratch / "tried").touch()
        sys.exit("error: the index does not answer")

def bad():
    sys.exit(f"error: suites/{out.stem}.txt: bad words")

if stage in ("base_model", "adapter"):
    print(f"{stage} {out.stem}: 1/4, 3 s left loss 0.5", file=sys.stderr, flush=True)
    for word in Path(inputs[0]).read_text().split():
        {"alone": alone, "meet": meet, "wait": wait, "once": once, "bad": bad}.get(word, str)()
    out.parent.mkdir(parents=True, exist_ok=True)
    params = yaml.safe_load(Path("params.yaml").read_text())
    told = [params["seed"], params["adapter"], params["adapters"].get(out.stem)]
    out.write_text(f"{text} {told}")
elif stage == "compare":
    out.write_text(json.dumps({"iid": {"single": {"score": 1 / len(text), "low": None}}}))
else:
    (out / "figures").mkdir(parents=True)
    (out / "figures/scores.svg").write_text("<svg/>")
    (out / "report.md").write_text("# Report\\n\\n![Scores](figures/scores.svg)\\n")
    (out / "index.html").write_text("<h1>Report</h1>")
"""


@dataclass(frozen=True)
class Ended:
    """What became of a flow run: its state, and those of its stages by name."""

    state: State[Any]
    stages: dict[str, State[Any]]
    artifacts: dict[str, Any]

    def named(self, name: str) -> set[str]:
        """Return the stages whose state has that name."""
        return {stage for stage, state in self.stages.items() if state.name == name}

    def told(self, message: str) -> set[str]:
        """Return the stages whose state says so."""
        return {stage for stage, state in self.stages.items() if state.message == message}


@dataclass(frozen=True)
class Tree:
    """A working tree of the dummy pipeline."""

    root: Path

    def run(self, *words: str, check: bool = True) -> str:
        """Run a command here; return what it prints."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        done = subprocess.run(
            words, cwd=self.root, env=os.environ | {"PATH": path}, capture_output=True, text=True
        )
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def commit(self) -> None:
        """Commit all that there is."""
        self.run("git", "add", "-A")
        who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
        self.run("git", *who, "commit", "-qm", "Begin")

    def write(self, task: str, text: str) -> None:
        """Write what a task's stage reads."""
        (self.root / f"suites/{task}.txt").write_text(text)

    def edit(self, change: Any) -> None:
        """Change params.yaml by a function of its parsed values."""
        file = self.root / "params.yaml"
        values = yaml.safe_load(file.read_text())
        change(values)
        file.write_text(yaml.safe_dump(values, sort_keys=False))

    def start(
        self, log: str, *words: str, with_server: bool = True, own_group: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start the flow by its command line, PATH bare; its lines go to a file beside here.

        Without the tests' server it is as in a fresh clone.
        """
        environment = {name: value for name, value in os.environ.items() if "PREFECT" not in name}
        environment["PATH"] = os.defpath
        if with_server:
            environment["PREFECT_API_URL"] = str(get_current_settings().api.url)
        with (self.root.parent / log).open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.pipeline", *words],
                cwd=self.root,
                env=environment,
                stdout=file,
                stderr=file,
                start_new_session=own_group,
            )

    def lines(self, log: str) -> str:
        """Return what a started flow has written."""
        return (self.root.parent / log).read_text()

    def flow(self, *targets: str, force: bool = False) -> Ended:
        """Run the flow here; return what became of it."""
        state = worktree(self.root, list(targets), force, return_state=True)
        return ended(state)


def ended(state: State[Any]) -> Ended:
    """Ask the server what became of a flow run."""
    run_id = state.state_details.flow_run_id
    assert run_id is not None
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(
            flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
        )
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        )
    return Ended(
        state,
        {run.name: run.state for run in runs if run.state is not None},
        {artifact.key: artifact.data for artifact in artifacts if artifact.key},
    )


def make_tree(root: Path) -> Tree:
    """Make a committed tree of the dummy pipeline with the tasks opposites and colours."""
    (root / "suites").mkdir(parents=True)
    (root / "dvc.yaml").write_text(DVC_YAML)
    (root / "stage.py").write_text(STAGE)
    for package in ("flows", "dlplora"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, root / package, ignore=ignored)
    (root / ".gitignore").write_text("/data/*\n!/data/comparison.json\n/.scratch/\n")
    (root / "params.yaml").write_text(
        yaml.safe_dump(params("0" * 64, root / "base"), sort_keys=False)
    )
    tree = Tree(root)
    for task in ("base", "opposites", "colours"):
        tree.write(task, f"{task}\n")
    tree.run("git", "init", "-q")
    tree.run("dvc", "init", "-q")
    tree.commit()
    return tree


def make_deployable(root: Path) -> Tree:
    """Make a tree whose flows Prefect can deploy: they need a list of deployments and a suite."""
    tree = make_tree(root)
    (root / "prefect.yaml").write_bytes((ROOT / "prefect.yaml").read_bytes())
    values = (root / "params.yaml").read_text()
    (root / "suites/toy.yaml").write_text(values[values.index("sources:") :])
    return tree


def free_ports() -> int:
    """Find a port that is free with the one after it; who else looks finds others."""
    while True:
        with suppress(OSError), create_server(("127.0.0.1", 0)) as one:
            port: int = one.getsockname()[1]
            with create_server(("127.0.0.1", port + 1)):
                return port


@contextmanager
def answering(port: int, status: int = 200) -> Iterator[None]:
    """Answer all requests at a port by a status."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield
        finally:
            server.shutdown()
            thread.join()


def seldom(done: Callable[[], bool]) -> Callable[[], bool]:
    """Slow `until` down: a server that is asked all the time slows down what is waited for."""

    def asked() -> bool:
        time.sleep(0.3)
        return done()

    return asked


def marked(mark: str, pid: int) -> list[psutil.Process]:
    """List the living processes that a command has started, by the mark that they bear."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(mark) == str(pid) and process.pid != pid:
                found.append(process)
        except psutil.Error:
            continue
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]
