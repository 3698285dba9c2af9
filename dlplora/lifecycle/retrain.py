"""A retrain: new data and commits → candidate → gate → a version that is promoted or not.

`production` moves on to every candidate that is not refused, so that it holds nothing that made
answers significantly worse. Each step can be repeated.
"""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from dlplora.lifecycle.candidate import Candidate
from dlplora.lifecycle.gate import decide
from dlplora.lifecycle.registry import CARD, Registry, Version, state_of
from dlplora.params.load import load_params
from dlplora.project.repro import run_cli
from dlplora.project.suites import suite_of
from dlplora.project.worktrees import RETRAIN, commit_all, commit_of, shared_folder
from dlplora.records.files import read_json, record_of, write_json
from dlplora.records.model_card import VersionCard, read_model_card
from dlplora.records.verdict import Decision, Judgement, State
from dlplora.scratch import alone

logger = logging.getLogger(__name__)
_VERDICT = Path(".scratch/verdict.json")
_STATES: dict[State, str] = {
    "production": "",
    "replaced": ", which is no longer in production",
    "refused": ", which was refused",
    "not promoted": ", which was not promoted",
    "awaiting approval": ", which awaits approval",
}


@dataclass(frozen=True)
class Outcome:
    """How a retrain ended: the version it registered, if any, why, and what became of that."""

    version: Version | None
    message: str
    decision: Decision | None = None


def retrain(root: Path, run_pipeline: Callable[[Path], None]) -> Outcome:
    """Retrain if there is anything new; another retrain is waited for first.

    `run_pipeline` brings a working tree up to date, and raises a `DlpLoraError` if it cannot.
    The user's checkout, index and branch stay as they are. Raises `DlpLoraError` if there is no
    commit, if the user's commit conflicts with `production`, or if a step fails.
    """
    with alone(RETRAIN, scratch=shared_folder(root)):
        registry, candidate = Registry(root), Candidate(root)
        _finish_registered(registry, candidate)
        registry.current()
        if advice := registry.advice():
            logger.warning(advice)
        if not candidate.may_have_news() and (promoted := registry.promoted()):
            return Outcome(None, f"nothing new since {promoted}")
        candidate.begin()
        candidate.take_inbox()
        candidate.update_imports()
        inputs = candidate.inputs_sha256()
        if known := _known(registry, lambda version: version.card.inputs == inputs):
            return _nothing_new(known, registry, candidate)
        if candidate.has_accepted_inputs() and (promoted := registry.promoted()):
            candidate.accept()
            return Outcome(None, f"nothing new since {promoted}")
        run_pipeline(candidate.project.root)
        commit_all(candidate.project.root, "Keep the results of a retrain")
        model_md5 = candidate.md5_of("data/model")
        if known := _known(registry, lambda version: version.card.model_md5 == model_md5):
            return _nothing_new(known, registry, candidate)
        return _register(registry, candidate, inputs=inputs)


def _known(registry: Registry, is_same: Callable[[Version], bool]) -> Version | None:
    """Return the version that is the same, if there is one: that in production, or the newest."""
    promoted = registry.promoted()
    same = [version for version in registry.versions() if is_same(version)]
    same.sort(key=lambda version: version.name == promoted)
    return same[-1] if same else None


def _nothing_new(known: Version, registry: Registry, candidate: Candidate) -> Outcome:
    """End a candidate that is the same as a version, as that ended."""
    state = state_of(known, registry.history())
    _accept_or_refuse(known, state, candidate)
    return Outcome(None, f"nothing new since {known.name}{_STATES[state]}")


def _register(registry: Registry, candidate: Candidate, *, inputs: str) -> Outcome:
    """Judge a candidate, commit and tag it, and let it take its place."""
    folder, promoted = candidate.project.root, registry.current()
    params = load_params(candidate.project.params_file)
    judgement = None if promoted is None else _judge(folder, promoted)
    card, scores = read_model_card(folder / "data/model"), read_json(folder / "data/metrics.json")
    version_card = VersionCard(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        suite=suite_of(candidate.project),
        score=scores["iid"][card.system],
        scores=scores,
        card=card,
        inputs=inputs,
        base_md5=candidate.md5_of("data/base"),
        model_md5=candidate.md5_of("data/model"),
        verdict=judgement,
        decision=decide(judgement, approval=params.gate.approval),
    )
    write_json(folder / CARD, asdict(version_card))
    told = "The first version." if judgement is None else str(judgement)
    commit_all(folder, f"Register a model: {version_card.decision}\n\n{told}")
    name = registry.register(commit_of(folder))
    _finish_registered(registry, candidate)
    return outcome_of(registry, registry.named(name), told)


def outcome_of(registry: Registry, version: Version, told: str) -> Outcome:
    """Tell what became of a version, which is not promoted if another one was meanwhile."""
    decision = version.card.decision
    if decision == "promoted" and state_of(version, registry.history()) == "not promoted":
        decision = "not promoted"
        told = (
            f"{registry.promoted()} was put into production meanwhile, and {version.name} was not "
            f"compared with it. {told}"
        )
    return Outcome(version, told, decision)


def _judge(folder: Path, promoted: Path) -> Judgement:
    """Compare the candidate with the promoted model, by the candidate's own code."""
    run_cli(folder, "judge", "--against", str(promoted.resolve()), "--out", str(_VERDICT))
    return record_of(Judgement, read_json(folder / _VERDICT))


def _finish_registered(registry: Registry, candidate: Candidate) -> None:
    """Promote and accept the candidate, or refuse it, if it is registered and not finished yet."""
    tip = candidate.tip()
    name = registry.at(tip) if tip and not candidate.is_accepted() else None
    if name is None:
        return
    version = registry.named(name)
    card, state = version.card, state_of(version, registry.history())
    if card.decision == "promoted" and state == "not promoted":
        registry.promote_after(name, card.verdict.against if card.verdict else None)
    _accept_or_refuse(version, state, candidate)


def _accept_or_refuse(version: Version, state: State, candidate: Candidate) -> None:
    """Accept what a candidate has taken in unless its version was refused."""
    if state == "refused":
        candidate.refuse(str(version.card.verdict))
    else:
        candidate.accept()
