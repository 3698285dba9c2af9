"""Params: sections without defaults, one-line errors, names that may stand in paths."""

from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import pytest
import yaml
from dvc.utils.serialize import load_yaml
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dlplora import params as params_package
from dlplora.data.wordings import read_wordings
from dlplora.errors import ParamsError
from dlplora.params.fields import Section, is_identifier, named
from dlplora.params.load import load_params, parse_params
from dlplora.params.overrides import adapter_of, expert_training_of

HEADER = ("seed", "runtime", "flow", "answers", "gate", "log", "base_model")
ROUTERS = ("routers", "embedding_routers")
RESERVED = {"con", "prn", "aux", "nul", "default", "base", "single", "none"}
RESERVED |= {f"{port}{number}" for port in ("com", "lpt") for number in range(10)}
SUITES = sorted(path.stem for path in (Path(__file__).parent.parent / "suites").glob("*.yaml"))


@pytest.fixture
def values(root: Path) -> dict[str, Any]:
    return _read(root / "params.yaml")


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return values


def _sections(parent: type[Section] = Section) -> Iterator[type[Section]]:
    for child in parent.__subclasses__():
        yield child
        yield from _sections(child)


def _error(file: Path, values: object) -> str:
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    with pytest.raises(ParamsError) as caught:
        load_params(file)
    return str(caught.value)


def test_every_pydantic_class_of_params_is_a_section() -> None:
    models = {
        value
        for module in iter_modules(params_package.__path__, "dlplora.params.")
        for value in vars(import_module(module.name)).values()
        if isinstance(value, type) and issubclass(value, BaseModel)
    }
    assert models - {BaseModel, Section} == set(_sections())
    assert len(models) > 10


def test_no_field_of_a_section_has_a_default() -> None:
    optional = [
        f"{section.__name__}.{name}"
        for section in _sections()
        for name, field in section.model_fields.items()
        if not field.is_required()
    ]
    assert optional == []


def test_every_section_is_frozen_and_knows_its_keys() -> None:
    for section in _sections():
        assert section.model_config["frozen"], section
        assert section.model_config["extra"] == "forbid", section


def test_a_loaded_section_cannot_be_changed(values: dict[str, Any]) -> None:
    loaded = parse_params(values, "params.yaml")
    with pytest.raises(ValidationError, match="frozen"):
        loaded.splits.train = 1


def test_the_committed_params_are_the_header_and_the_default_suite(
    root: Path, values: dict[str, Any]
) -> None:
    suite = _read(root / "suites/default.yaml")
    assert set(values) == {*HEADER, *suite}
    for section, expected in suite.items():
        assert values[section] == expected, section
        if isinstance(expected, dict):
            assert list(values[section]) == list(expected), section


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_parses_with_the_header_of_params(
    root: Path, values: dict[str, Any], suite: str
) -> None:
    sections = _read(root / f"suites/{suite}.yaml")
    assert not set(HEADER) & set(sections)
    loaded = parse_params({key: values[key] for key in HEADER} | sections, suite)
    for task in loaded.adapters:
        adapter_of(loaded, task)
    for cluster in loaded.experts:
        expert_training_of(loaded, cluster)


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_trains_an_adapter_for_each_task_and_names_what_exists(
    root: Path, suite: str
) -> None:
    sections = _read(root / f"suites/{suite}.yaml")
    assert list(sections["adapters"]) == list(sections["tasks"])
    fetched = {
        f"data/fetched/{source}/{member}.json"
        for source, params in sections["sources"].items()
        for member in params["members"]
    }
    listed = sections["tasks"] | sections["unseen_tasks"]
    raws = {task["raw"] for task in listed.values()}
    for task in sections["tasks"].values():
        assert len(read_wordings(root / task["wordings"]).test) == 4
    assert fetched <= raws
    assert all((root / raw).is_file() for raw in raws - fetched)
    made = {f"data/routers/{router}" for section in ROUTERS for router in sections[section]}
    folders = {"joint": "joint", "merges": "merged", "lorahub": "lorahub"}
    made |= {f"data/{folder}/{name}" for key, folder in folders.items() for name in sections[key]}
    made |= {"data/base", "data/adapters"} | ({"data/experts"} if sections["experts"] else set())
    for name, system in sections["systems"].items():
        assert {system[key] for key in ("adapters", "artifact", "router")} <= made, name
    for router in sections["routers"].values():
        in_embedders = router["reads"].startswith("data/embedders/")
        reads_embedder = router["kind"] in ("encoder", "ensemble", "logistic", "ridge")
        assert in_embedders if reads_embedder else router["reads"] == "data/base"


def test_loading_keeps_every_value_of_the_file(root: Path, values: dict[str, Any]) -> None:
    assert load_params(root / "params.yaml").model_dump(mode="json") == values


Edit = Callable[[dict[str, Any]], object]


@pytest.mark.parametrize(
    ("edit", "key", "found"),
    [
        (lambda v: v.update(tokens=3), "tokens: ", "found 3"),
        (lambda v: v["evaluation"].update(beams=4), "evaluation.beams: ", "found 4"),
        (lambda v: v.pop("balance"), "balance: ", "is missing"),
        (lambda v: v["splits"].pop("test"), "splits.test: ", "is missing"),
        (
            lambda v: v["tasks"]["past_tense"].pop("primary"),
            "tasks.past_tense.primary: ",
            "is missing",
        ),
        (lambda v: v["runtime"].update(dtype="float8"), "runtime.dtype: ", "found 'float8'"),
        (lambda v: v["runtime"].update(threads=0), "runtime.threads: ", "found 0"),
        (lambda v: v["runtime"].update(kernels="fast"), "runtime.kernels: ", "found 'fast'"),
        (lambda v: v["adapter"].update(rank=-8), "adapter.rank: ", "found -8"),
        (lambda v: v["adapter"].update(dropout=1.0), "adapter.dropout: ", "found 1.0"),
        (lambda v: v["adapter"].update(learning_rate="fast"), "adapter.learning_rate: ", "'fast'"),
        (
            lambda v: v["adapters"]["past_tense"].update(max_tokens=64),
            "adapters.past_tense.max_tokens: ",
            "set adapter.max_tokens",
        ),
        (lambda v: v["splits"].update(least=[16, 4]), "splits.least.2: ", "is missing"),
        (lambda v: v["splits"].update(shares=[0.9, 0.9, -0.8]), "splits.shares.2: ", "found -0.8"),
        (lambda v: v["systems"]["dlp_mlp"].update(p=1.5), "systems.dlp_mlp.p: ", "found 1.5"),
        (lambda v: v["systems"]["dlp_mlp"].update(kind="best"), "systems.dlp_mlp: ", "'best'"),
        (lambda v: v["systems"]["dlp_mlp"].update(k=2), "systems.dlp_mlp.k: ", "found 2"),
        (
            lambda v: v["systems"]["base"].update(settings=["pool"]),
            "systems.base.settings.0: ",
            "found 'pool'",
        ),
        (lambda v: v["systems"]["base"].update(policy="anew"), "systems.base.policy", "anew"),
        (lambda v: v["routers"]["mlp"].update(kind="magic"), "routers.mlp: ", "'magic'"),
        (lambda v: v["base_model"].update(sha256="abc"), "base_model.sha256: ", "abc"),
        (lambda v: v["balance"].update(per_task=0), "balance.per_task: ", "found 0"),
        (lambda v: v.update(evaluation=None), "evaluation: ", "found None"),
        (lambda v: v["adapters"].update(past_tense=None), "adapters.past_tense: ", "found None"),
        (lambda v: v["tasks"].update({"../x": v["tasks"]["past_tense"]}), "tasks.../x", "'../x'"),
        (lambda v: v["tasks"].update({3: v["tasks"]["past_tense"]}), "tasks.3", "found 3"),
        (lambda v: v["routers"].update({"base": v["routers"]["mlp"]}), "routers.base", "'base'"),
    ],
)
def test_a_wrong_file_gives_one_line_with_file_key_and_value(
    tmp_path: Path, values: dict[str, Any], edit: Edit, key: str, found: str
) -> None:
    edit(values)
    message = _error(tmp_path / "params.yaml", values)
    assert message.startswith(f"{tmp_path / 'params.yaml'}: {key}")
    assert found in message
    assert "\n" not in message
    assert len(message) < 400


@pytest.fixture
def compared(root: Path, values: dict[str, Any]) -> dict[str, Any]:
    """The values of the suite compare, which trains experts."""
    return {key: values[key] for key in HEADER} | _read(root / "suites/compare.yaml")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda v: v["experts"]["all"].update(expert_rank=3),
            "params.yaml: experts.all: (1 common + 1 specific) × expert_rank 3 = 6; expected the "
            "rank of an adapter, 8",
        ),
        (
            lambda v: v["experts"]["all"]["training"].update(rank=16),
            "(1 common + 1 specific) × expert_rank 4 = 8; expected the rank of an adapter, 16",
        ),
        (
            lambda v: v["experts"]["all"]["tasks"].append("absent"),
            "file: experts.all.tasks: absent: not in tasks",
        ),
        (
            lambda v: v["experts"].update(more=v["experts"]["all"] | {"tasks": ["past_tense"]}),
            "file: past_tense: in experts.all and experts.more",
        ),
        (
            lambda v: v["experts"]["all"]["tasks"].remove("past_tense"),
            "file: past_tense: in none of the clusters of cgc (all)",
        ),
        (
            lambda v: v["systems"]["cgc_routed"].update(clusters=["one"]),
            "params.yaml: no experts.one; there are: all",
        ),
        (lambda v: v["experts"]["all"]["training"].update(rnak=4), "experts.all.training"),
        (lambda v: v["experts"]["all"].update(tasks=[]), "file: experts.all.tasks: "),
    ],
)
def test_experts_that_do_not_fit_are_refused_in_one_line(
    compared: dict[str, Any], edit: Edit, message: str
) -> None:
    parse_params(compared, "file")
    edit(compared)
    with pytest.raises(ParamsError) as caught:
        parse_params(compared, "file")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_training_of_experts_is_that_of_an_adapter_with_overrides(
    compared: dict[str, Any],
) -> None:
    overrides = compared["experts"]["all"]["training"]
    found = expert_training_of(parse_params(compared, "file"), "all")
    assert found.model_dump() == compared["adapter"] | overrides


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda v: v.update(default_system="absent"),
            "params.yaml: default_system is absent; expected a system that needs no task: "
            "base, dlp_mlp, ",
        ),
        (
            lambda v: v.update(default_system="single"),
            "params.yaml: default_system is single; expected a system that needs no task: ",
        ),
        (
            lambda v: v["systems"]["single"].update(settings=["iid", "reworded", "composite_3"]),
            "params.yaml: systems.dlp_mlp.settings: composite_2: expected systems.single to answer "
            "it, too: scores are compared with its",
        ),
        (
            lambda v: v["systems"]["single"].update(policy="route_once"),
            "params.yaml: systems.single.policy is route_once; expected split, keep or refill: a "
            "prompt of composite_2 has several tasks",
        ),
        (
            lambda v: v["systems"]["single"].update(settings=["composite_2", "composite_3"]),
            "params.yaml: systems.single.settings: expected iid among them",
        ),
        (
            lambda v: v["systems"]["dlp_mlp"].update(router="elsewhere/mlp"),
            "params.yaml: systems.dlp_mlp.router: expected a path under data/",
        ),
        (
            lambda v: v["systems"]["dlp_mlp"].update(router="data/../elsewhere"),
            "params.yaml: systems.dlp_mlp.router: expected a path under data/",
        ),
        (lambda v: v["systems"].pop("single"), "params.yaml: no systems.single; there are: base, "),
        (
            lambda v: v["systems"]["dlp_mlp"].update(router="data/base"),
            "params.yaml: systems.dlp_mlp.router is data/base; there are: data/routers/ensemble, "
            "data/routers/mlp, data/routers/tfidf",
        ),
        (
            lambda v: v["systems"]["dlp_mlp"].update(router="data/routers/absent"),
            "params.yaml: systems.dlp_mlp.router is data/routers/absent; there are: ",
        ),
        (
            lambda v: v["systems"]["dlp_mlp"].update(adapters="data/base"),
            "params.yaml: systems.dlp_mlp.adapters is data/base; its kind reads adapters: ",
        ),
        (
            lambda v: v["systems"]["base"].update(adapters="data/adapters"),
            "params.yaml: systems.base.adapters is data/adapters; expected data/base: its "
            "kind reads no adapters",
        ),
        (
            lambda v: v["systems"]["dlp_mlp"].update(settings=["iid", "iid"]),
            "params.yaml: systems.dlp_mlp.settings: expected each setting once; found ['iid', ",
        ),
    ],
)
def test_systems_that_do_not_fit_together_are_refused_in_one_line(
    values: dict[str, Any], edit: Edit, message: str
) -> None:
    edit(values)
    with pytest.raises(ParamsError) as caught:
        parse_params(values, "params.yaml")
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_told_system_of_single_questions_may_route_once(values: dict[str, Any]) -> None:
    values["systems"]["own"] = values["systems"]["single"] | {"settings": ["iid"]}
    values["systems"]["own"]["policy"] = "route_once"
    assert parse_params(values, "params.yaml").systems["own"].needs_task


def test_shares_that_do_not_add_up_are_refused(tmp_path: Path, values: dict[str, Any]) -> None:
    values["splits"]["shares"] = [0.5, 0.5, 0.5]
    assert "splits" in _error(tmp_path / "params.yaml", values)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda v: v["systems"]["dlp_mlp"].pop("policy"), "systems.dlp_mlp.policy: is missing"),
        (lambda v: v["systems"]["dlp_mlp"].pop("kind"), "systems.dlp_mlp: has no kind"),
        (
            lambda v: v["systems"]["dlp_mlp"].update(kind="topp"),
            "systems.dlp_mlp: no kind 'topp'; there are: 'base', 'by_task', ",
        ),
        (lambda v: v["systems"]["dlp_mlp"].update(policy="kept"), "systems.dlp_mlp.policy: Input"),
        (lambda v: v["systems"]["dlp_mlp"].update(q=1), "systems.dlp_mlp.q: Extra inputs"),
        (lambda v: v["systems"].update({"tf-idf": v["systems"]["tfidf"]}), "systems.tf-idf: 'tf-"),
        (lambda v: v.pop("default_system"), "default_system: is missing"),
        (lambda v: v["adapter"].update(micro_batch_size=0), "adapter.micro_batch_size: Input"),
        (lambda v: v["splits"].update(shares="half"), "splits.shares: Input"),
        (lambda v: v["adapters"]["past_tense"].update(stepz=3), "adapters.past_tense.stepz: Extra"),
        (lambda v: v["adapters"]["past_tense"].update(steps=0), "adapters.past_tense.steps: Input"),
        (lambda v: v["joint"].update(all={"rank": "x"}), "joint.all.rank: Input"),
    ],
)
def test_an_error_names_the_value_by_its_path_in_the_file(
    values: dict[str, Any], edit: Edit, message: str
) -> None:
    edit(values)
    with pytest.raises(ParamsError) as caught:
        parse_params(values, "params.yaml")
    assert str(caught.value).startswith(f"params.yaml: {message}")


def test_a_key_that_stands_twice_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "params.yaml"
    file.write_text("seed: 0\ntasks:\n  one: {}\n  two: {}\n  one: {}\n")
    with pytest.raises(ParamsError) as caught:
        load_params(file)
    assert str(caught.value) == f"{file}, line 5: one stands twice"


def test_an_error_counts_the_others(tmp_path: Path, values: dict[str, Any]) -> None:
    values["splits"].pop("test")
    values["adapter"].pop("rank")
    values["evaluation"]["beams"] = 4
    assert _error(tmp_path / "params.yaml", values).endswith("(and 2 more)")


@pytest.mark.parametrize("whole", [None, [], "params", {}])
def test_a_file_that_holds_no_sections_is_refused(tmp_path: Path, whole: object) -> None:
    message = _error(tmp_path / "params.yaml", whole)
    assert message.startswith(f"{tmp_path / 'params.yaml'}: ")
    assert "\n" not in message


@pytest.mark.parametrize("content", [b"seed: [0", b"seed: \xff", b"a: b: c", b"\tseed: 0"])
def test_a_file_that_is_no_yaml_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "params.yaml"
    file.write_bytes(content)
    with pytest.raises(ParamsError) as caught:
        load_params(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ParamsError, match=r"absent\.yaml: not there; run this in the project's folder"
    ):
        load_params(tmp_path / "absent.yaml")


def test_named_gives_the_entry_or_lists_those_there_are() -> None:
    section = {"b": 2, "a": 1}
    assert named(section, "a", "tasks") == 1
    with pytest.raises(ParamsError) as caught:
        named(section, "c", "tasks")
    assert str(caught.value) == "params.yaml: no tasks.c; there are: a, b"


def test_adapter_of_lays_the_overrides_over_the_section(values: dict[str, Any]) -> None:
    first, second = list(values["adapters"])[:2]
    values["adapters"][first] = {"rank": 3, "target_modules": ["k_proj"]}
    values["adapters"][second] = {}
    loaded = parse_params(values, "params.yaml")
    merged = values["adapter"] | {"rank": 3, "target_modules": ["k_proj"]}
    assert adapter_of(loaded, first).model_dump() == merged
    assert adapter_of(loaded, second).model_dump() == values["adapter"]
    assert loaded.adapter.model_dump() == values["adapter"]


@pytest.mark.parametrize(
    ("override", "key"), [({"rnak": 8}, "rnak"), ({"rank": 0}, "rank"), ({"alpha": "x"}, "alpha")]
)
def test_adapter_of_refuses_a_wrong_override(
    values: dict[str, Any], override: dict[str, Any], key: str
) -> None:
    task = next(iter(values["adapters"]))
    values["adapters"][task] = override
    with pytest.raises(ParamsError, match=rf"adapters\.{task}.*{key}: ") as caught:
        adapter_of(parse_params(values, "params.yaml"), task)
    assert "\n" not in str(caught.value)


def test_adapter_of_an_unknown_task_lists_the_tasks(values: dict[str, Any]) -> None:
    with pytest.raises(ParamsError, match=r"no adapters\.absent; there are: .*past_tense"):
        adapter_of(parse_params(values, "params.yaml"), "absent")


IMPORTED = {"path": "data/imported/any"}


def test_a_task_has_an_adapter_that_is_trained_or_imported(values: dict[str, Any]) -> None:
    task = next(iter(values["adapters"]))
    values["adapters"].pop(task)
    values["imported_adapters"][task] = IMPORTED
    loaded = parse_params(values, "params.yaml")
    assert loaded.imported_adapters[task].path == "data/imported/any"
    with pytest.raises(ParamsError, match=rf"no adapters\.{task}; there are: "):
        adapter_of(loaded, task)


def test_a_task_with_both_adapters_is_refused(values: dict[str, Any]) -> None:
    task = next(iter(values["adapters"]))
    values["imported_adapters"][task] = IMPORTED
    with pytest.raises(ParamsError) as caught:
        parse_params(values, "params.yaml")
    assert str(caught.value) == f"params.yaml: {task}: in adapters and in imported_adapters"


@pytest.mark.parametrize(
    "edit",
    [
        lambda values, task: values["adapters"].pop(task),
        lambda values, task: values["tasks"].pop(task),
        lambda values, task: (
            values["tasks"].pop(task),
            values["imported_adapters"].update({task: values["adapters"].pop(task) | IMPORTED}),
        ),
    ],
)
def test_a_task_without_an_adapter_or_one_without_a_task_is_refused(
    values: dict[str, Any], edit: Callable[[dict[str, Any], str], object]
) -> None:
    task = next(task for task, own in values["adapters"].items() if not own)
    edit(values, task)
    with pytest.raises(ParamsError, match=rf"^params\.yaml: {task}: expected in tasks and in "):
        parse_params(values, "params.yaml")


def _hub_model(**changes: object) -> dict[str, object]:
    whole = {"kind": "hub", "id": "org/name", "revision": "0a" * 20}
    return whole | {"system_prompt": None, "trust_remote_code": False} | changes


@pytest.mark.parametrize("name", ["gpt2", "org/name", "o-r_g.1/Qwen2.5-0.5B-Instruct"])
def test_a_name_of_the_hub_with_a_whole_commit_is_taken(values: dict[str, Any], name: str) -> None:
    values["base_model"] = _hub_model(id=name)
    assert parse_params(values, "params.yaml").base_model.model_dump() == _hub_model(id=name)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("id", name) for name in ("", "../x", "/etc", "a/b/c", "a b", "org/", ".hidden", "~/x")),
        *(("id", name) for name in ("org/name\n", "a/../b", "-o", "https://hf.co/org/name")),
        *(("revision", name) for name in ("main", "v1.0", "0a" * 19, "0A" * 20, "0a" * 21)),
        *(("revision", name) for name in ("", None, "0a" * 20 + "\n")),
    ],
)
def test_what_does_not_pin_one_commit_of_the_hub_is_refused(
    tmp_path: Path, values: dict[str, Any], key: str, value: object
) -> None:
    values["base_model"] = _hub_model(**{key: value})
    assert f"base_model.{key}: " in _error(tmp_path / "params.yaml", values)
    values = _read(Path(__file__).parent.parent / "params.yaml")
    member = {"config": None, "split": "train"}
    member |= {"keys": {"question": "a", "answer": "b", "options": None}}
    source = {"kind": "hub_dataset", "id": "org/name", "revision": "0a" * 20}
    values["sources"]["mine"] = source | {"members": {"mine": member}} | {key: value}
    assert f"sources.mine.{key}: " in _error(tmp_path / "params.yaml", values)


@pytest.mark.parametrize("name", ["a", "Z9", "past_tense", "a" * 64, "two__", "base_2", "console"])
def test_plain_identifiers_may_name_a_task(name: str) -> None:
    assert is_identifier(name)


@pytest.mark.parametrize(
    "name",
    [
        *("", " ", "a b", " a", "a ", "a\n", "a\t", "a\0"),
        *("../x", "..", ".", "a/b", "/a", "a\\b", "C:", "a.b", "~", "$HOME", "a-b", "${key}"),
        *("9lives", "_a", "café", "ａ", "а", "a" * 65, "a" * 300),
        *("con", "CON", "Nul", "com1", "LPT9", "base", "Base", "default"),
    ],
)
def test_what_could_leave_its_folder_may_not_name_a_task(name: str) -> None:
    assert not is_identifier(name)


@given(st.text(alphabet="aZbsen09_-./ é\n", max_size=66) | st.sampled_from(sorted(RESERVED)))
@example("a" * 64)
@example("a" * 65)
def test_an_identifier_is_what_python_says_in_ascii_and_not_reserved(name: str) -> None:
    expected = name.isascii() and name.isidentifier() and not name.startswith("_")
    expected = expected and len(name) <= 64 and name.lower() not in RESERVED
    assert is_identifier(name) == expected


YAML_1_1 = ("no", "yes", "on", "off", "y", "n", "No", "ON")  # truth values there, words for DVC


@pytest.mark.parametrize("name", [*YAML_1_1, "'null'", "'true'", '"False"'])
def test_a_name_is_read_as_dvc_reads_it(tmp_path: Path, root: Path, name: str) -> None:
    text = (root / "params.yaml").read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text(text.replace("  past_tense: {", f"  {name}: {{"), encoding="utf-8")
    assert list(load_params(file).tasks) == list(load_yaml(str(file))["tasks"])
    assert name.strip("'\"") in load_params(file).adapters


@pytest.mark.parametrize("name", ["null", "true", "False", "~", "12", "1e3"])
def test_a_name_that_yaml_takes_for_a_value_is_refused(
    tmp_path: Path, root: Path, name: str
) -> None:
    text = (root / "params.yaml").read_text(encoding="utf-8")
    file = tmp_path / "params.yaml"
    file.write_text(text.replace("  past_tense: {", f"  {name}: {{"), encoding="utf-8")
    with pytest.raises(ParamsError, match=r"tasks.*; found") as caught:
        load_params(file)
    assert "\n" not in str(caught.value)
    assert "put the name in quotes" in str(caught.value)


PATHS = [
    ("tasks", "past_tense", "raw"),
    ("unseen_tasks", "object_counting", "raw"),
    ("routers", "mlp", "reads"),
    ("systems", "single", "adapters"),
    ("systems", "joined", "artifact"),
    ("imported_adapters", "past_tense", "path"),
]


def _put(values: dict[str, Any], place: tuple[str, str, str], path: str) -> str:
    section, name, field = place
    if section == "imported_adapters":
        del values["adapters"][name]
    joined = values["systems"]["base"] | {"kind": "fixed"}
    values[section].setdefault(name, joined if section == "systems" else {})[field] = path
    return ".".join(place)


@pytest.mark.parametrize("place", PATHS, ids=".".join)
@pytest.mark.parametrize("path", ["my data (1)/a [2] & b.json", "d'été; ls #/*?!~/ü.csv", "C:/x,y"])
def test_a_path_may_hold_what_quotes_carry(
    values: dict[str, Any], place: tuple[str, str, str], path: str
) -> None:
    _put(values, place, f"data/{path}" if place[0] == "systems" else path)
    parse_params(values, "params.yaml")


@pytest.mark.parametrize("place", PATHS, ids=".".join)
@pytest.mark.parametrize("path", ["", 'a "b".json', "$HOME/x", "`ls`", "a\\b", "a\nb", "--help"])
def test_a_path_that_no_quotes_carry_is_refused_by_its_field(
    values: dict[str, Any], place: tuple[str, str, str], path: str
) -> None:
    where = _put(values, place, path)
    with pytest.raises(ParamsError, match=r"params.yaml: .*path") as caught:
        parse_params(values, "params.yaml")
    assert place[0] in str(caught.value), where
    assert place[2] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_path_of_a_model_is_no_part_of_a_command_but_has_no_line_break(
    values: dict[str, Any],
) -> None:
    model = {"kind": "gguf", "sha256": "0" * 64, "system_prompt": None}
    values["base_model"] = model | {"path": "my $models/one `of` them.gguf"}
    parse_params(values, "params.yaml")
    values["base_model"] = model | {"path": "one\x00.gguf"}
    with pytest.raises(ParamsError, match=r"base_model\.path: .*control characters"):
        parse_params(values, "params.yaml")
