"""Runs of the deployments for the app: Prefect's server starts, watches and ends them."""

import ssl
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas import filters
from prefect.client.schemas.objects import Artifact, FlowRun, State, TaskRun
from prefect.client.schemas.responses import OrchestrationResult, StateAbortDetails
from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort, LogSort
from prefect.context import SettingsContext, get_settings_context
from prefect.exceptions import ObjectNotFound
from prefect.settings import PREFECT_CLIENT_MAX_RETRIES
from prefect.states import Cancelling, Pending

from dlplora.app.runs import Run, RunError, StageRun
from dlplora.errors import choices, one_line

T = TypeVar("T")
_SECONDS = 5.0  # of a request
_PAGE = 200  # the most rows that the server returns at once
_AHEAD = timedelta(minutes=1)  # a file in the inbox starts a run some seconds later


class PrefectRuns:
    """The runs that Prefect's server at `api` knows; see `dlplora.app.runs.Runs`.

    Each call has a client of its own: threads share nothing that changes.
    """

    def __init__(self, api: str) -> None:
        self._api = api
        self._address = api.removesuffix("/api")
        context = get_settings_context()
        self._profile = context.profile
        self._settings = context.settings.copy_with_update(updates={PREFECT_CLIENT_MAX_RETRIES: 0})
        self._tls = ssl.create_default_context()  # takes longer than a request

    def start(self, deployment: str, parameters: Mapping[str, Any]) -> str:
        """Start a run of a deployment and return its id; the worker takes it within seconds."""
        with self._client() as client:
            names = _Names(client).deployments
            found = [key for key, name in names.items() if name == deployment]
            if not found:
                raise RunError(f"no deployment {deployment}; there are: {choices(names.values())}")
            return _create(client, found[0], parameters)

    def recent(self, count: int) -> list[Run]:
        """List the newest runs; those that a schedule only plans and runs within runs are none."""
        top_level = filters.FlowRunFilter(
            parent_task_run_id=filters.FlowRunFilterParentTaskRunId(is_null_=True),
            expected_start_time=filters.FlowRunFilterExpectedStartTime.model_validate(
                {"before_": datetime.now(UTC) + _AHEAD}
            ),
        )
        with self._client() as client:
            names = _Names(client)
            rows = _pages(
                lambda **page: client.read_flow_runs(
                    flow_run_filter=top_level, sort=FlowRunSort.EXPECTED_START_TIME_DESC, **page
                )
            )
            begun = (row for row in rows if not (row.auto_scheduled and _state(row).is_scheduled()))
            return [_run(row, names) for row in islice(begun, count)]

    def read(self, run_id: str) -> Run:
        """Return a run."""
        with self._client() as client:
            return _run(_read(client, run_id), _Names(client))

    def stages(self, run_id: str) -> list[StageRun]:
        """List the stages of a run and of the runs within it, as they began."""
        with self._client() as client:
            ids = _with_inner(client, run_id)
            stages = filters.TaskRunFilter(
                flow_run_id=filters.TaskRunFilterFlowRunId(any_=ids),
                subflow_runs=filters.TaskRunFilterSubFlowRuns(exists_=False),
            )
            bars = filters.ArtifactFilter(
                flow_run_id=filters.ArtifactFilterFlowRunId(any_=ids),
                type=filters.ArtifactFilterType(any_=["progress"]),
            )
            rows = list(
                _pages(lambda **page: client.read_task_runs(task_run_filter=stages, **page))
            )
            newest = _pages(
                lambda **page: client.read_artifacts(
                    artifact_filter=bars, sort=ArtifactSort.CREATED_DESC, **page
                )
            )
            # A stage that is tried again has another bar, which comes last here.
            progress = {bar.task_run_id: bar for bar in reversed(list(newest))}
        never = datetime.max.replace(tzinfo=UTC)
        rows.sort(key=lambda row: (row.start_time or never, row.expected_start_time or never))
        return [_stage(row, progress.get(row.id)) for row in rows]

    def lines(self, run_id: str, *, last: int) -> list[str]:
        """Return the last lines of the log of a run and of the runs within it."""
        with self._client() as client:
            wanted = filters.LogFilter(
                flow_run_id=filters.LogFilterFlowRunId(any_=_with_inner(client, run_id))
            )
            newest = _pages(
                lambda **page: client.read_logs(
                    log_filter=wanted, sort=LogSort.TIMESTAMP_DESC, **page
                )
            )
            lines = (line for row in newest for line in reversed(row.message.splitlines()))
            return list(islice(lines, last))[::-1]

    def cancel(self, run_id: str) -> None:
        """End a run as Prefect's page does: its worker ends it; one that waits ends at once."""
        with self._client() as client:
            run = _read(client, run_id)
            if _state(run).is_final():
                raise RunError(f"run {run.name} has ended already: {_state(run).name}")
            answer: OrchestrationResult[Any] = client.set_flow_run_state(run.id, Cancelling())
            if isinstance(answer.details, StateAbortDetails):
                raise RunError(f"run {run.name} cannot be cancelled: {answer.details.reason}")

    def start_again(self, run_id: str) -> str:
        """Start a run of the same deployment with the same parameters."""
        with self._client() as client:
            run = _read(client, run_id)
            if run.deployment_id is None:
                raise RunError(f"run {run.name} was started on a command line; start it there")
            return _create(client, run.deployment_id, run.parameters)

    def page(self, run_id: str) -> str:
        """Return the address of a run on Prefect's pages."""
        return f"{self._address}/runs/flow-run/{_uuid(run_id)}"

    @contextmanager
    def _client(self) -> Iterator[SyncPrefectClient]:
        """Yield a client that asks once; raise what goes wrong as `RunError`."""
        transport = httpx.HTTPTransport(verify=self._tls)
        options = {"timeout": _SECONDS, "transport": transport, "verify": self._tls}
        try:
            with (
                SettingsContext(profile=self._profile, settings=self._settings),
                SyncPrefectClient(self._api, httpx_settings=options) as client,
            ):
                yield client
        except httpx.HTTPStatusError as error:
            raise RunError(f"Prefect refuses it: {_detail(error.response)}") from error
        except httpx.TransportError as error:
            raise RunError(
                f"Prefect's server at {self._address} does not answer: {one_line(error)}"
            ) from error


class _Names:
    """Names of flows, and of deployments as FLOW/DEPLOYMENT, by their ids."""

    def __init__(self, client: SyncPrefectClient) -> None:
        self.flows = {row.id: row.name for row in _pages(client.read_flows)}
        self.deployments = {
            row.id: f"{self.flows[row.flow_id]}/{row.name}"
            for row in _pages(client.read_deployments)
        }


def _pages(read: Callable[..., list[T]]) -> Iterator[T]:
    """Read page after page, as far as rows are asked for."""
    offset = 0
    while rows := read(limit=_PAGE, offset=offset):
        yield from rows
        offset += len(rows)
        if len(rows) < _PAGE:
            return


def _uuid(run_id: str) -> UUID:
    try:
        return UUID(run_id)
    except ValueError as error:
        raise RunError(f"no run {run_id!r}: expected an id of 32 hexadecimal digits") from error


def _read(client: SyncPrefectClient, run_id: str) -> FlowRun:
    try:
        return client.read_flow_run(_uuid(run_id))
    except ObjectNotFound as error:
        raise RunError(f"no run {run_id}; Prefect's server has none of that id") from error


def _with_inner(client: SyncPrefectClient, run_id: str) -> list[UUID]:
    """Return the ids of a run and of the runs that it has started."""
    run = _read(client, run_id)
    inner = filters.FlowRunFilter(
        parent_flow_run_id=filters.FlowRunFilterParentFlowRunId(any_=[run.id])
    )
    rows = _pages(lambda **page: client.read_flow_runs(flow_run_filter=inner, **page))
    return [run.id, *(row.id for row in rows)]


def _create(client: SyncPrefectClient, deployment: UUID, parameters: Mapping[str, Any]) -> str:
    created = client.create_flow_run_from_deployment(deployment, parameters=dict(parameters))
    return str(created.id)


def _state(run: FlowRun | TaskRun) -> State[Any]:
    return run.state or Pending()  # a task run may be known before its first state


def _run(row: FlowRun, names: _Names) -> Run:
    state = _state(row)
    deployment = None if row.deployment_id is None else names.deployments.get(row.deployment_id)
    return Run(
        id=str(row.id),
        name=row.name,
        deployment=deployment or names.flows.get(row.flow_id, ""),
        parameters=row.parameters,
        state=state.name or state.type.value,
        message=state.message or "",
        is_over=state.is_final(),
        began=row.start_time,
        seconds=_seconds(row),
    )


def _stage(row: TaskRun, bar: Artifact | None) -> StageRun:
    state = _state(row)
    return StageRun(
        name=row.name.removesuffix(f"-{row.dynamic_key[:3]}"),  # which it has until it begins
        state=state.name or state.type.value,
        message=state.message or "",
        seconds=_seconds(row),
        percent=None if bar is None else float(str(bar.data)),
        told="" if bar is None else bar.description or "",
    )


def _seconds(run: FlowRun | TaskRun) -> float | None:
    return None if run.start_time is None else run.estimated_run_time.total_seconds()


def _detail(response: httpx.Response) -> str:
    """Return what the server says of a request that it refuses."""
    try:
        told = response.json()
    except ValueError:
        return f"status {response.status_code}"
    detail = told.get("detail", told) if isinstance(told, dict) else told
    return " ".join(str(detail).split())[:300]
