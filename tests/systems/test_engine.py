"""The engine that users load: a system by its name, answering until it is closed."""

import shutil
from pathlib import Path

import pytest

import dlplora
from dlplora.errors import GenerationError, ParamsError, RouterError
from dlplora.lora.paging import PagedPool
from dlplora.records.router_card import write_fallback
from dlplora.systems.engine import Engine
from dlplora.systems.load import Systems
from tests.answering import write_answering_project
from tests.device import float32_place

ROOT = Path(__file__).parent.parent.parent
PLACE = float32_place()
ONE = dlplora.Route(("colours",), (1.0,))
PROMPTS = ["say red", "what is the opposite of up ?"]
SAMPLING = dlplora.Sampling(max_new_tokens=6)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    write_answering_project(ROOT, folder)
    return folder / "data"


@pytest.mark.parametrize("adapter_mib", [None, 1e-3])
@pytest.mark.parametrize("name", [None, "base", "single:colours", "fused", "logo", "arrow"])
def test_an_engine_answers_as_its_system_until_it_is_closed(
    data: Path, name: str | None, adapter_mib: float | None
) -> None:
    system = Systems(data, [name], place=PLACE).named(name)
    with system.running() as runner:
        expected = runner.generate(PROMPTS, sampling=SAMPLING)
    own = {path: type(module) for path, module in system.base.model.named_modules()}

    settings = {"place": PLACE, "max_batch_size": 2, "adapter_mib": adapter_mib}
    with Engine.load(data, system=name, **settings) as engine:
        assert engine.generate(PROMPTS, sampling=SAMPLING) == expected
        if isinstance(engine.pool, PagedPool):
            assert len(engine.pool.resident) == (name != "base")
        assert isinstance(engine.pool, PagedPool) == (
            adapter_mib is not None and name not in ("fused", "arrow")
        )
        running = {path: type(module) for path, module in engine.base.model.named_modules()}
        assert (running == own) == (name == "base")
    engine.close()
    for requests in (PROMPTS, [dlplora.Request("say red", routes=(ONE,))]):
        with pytest.raises(RouterError):
            engine.generate(requests)
    closed = {path: type(module) for path, module in engine.base.model.named_modules()}
    assert closed == own


def test_an_engine_that_is_not_closed_answers_on(data: Path) -> None:
    engine = Engine.load(data, system="arrow", place=PLACE)
    first = engine.generate(PROMPTS, sampling=SAMPLING)
    assert engine.generate(PROMPTS, sampling=SAMPLING) == first


def test_by_default_a_router_says_itself_when_it_is_unsure(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data.parent, tmp_path / "project")
    folder = tmp_path / "project/data"
    with Engine.load(folder, place=PLACE, fallback_below=0.0) as engine:
        sure, unsure = sorted(engine.route(PROMPTS), key=lambda route: -(route.confidence or 0))
    assert sure.confidence is not None
    assert unsure.confidence is not None
    between = (sure.confidence + unsure.confidence) / 2
    write_fallback(folder / "routers/mlp", between)
    expected = {sure, dlplora.Route((), (), unsure.confidence)}
    for told in ({}, {"fallback_below": between}, {"fallback_below": "auto"}):
        with Engine.load(folder, place=PLACE, **told) as engine:
            assert set(engine.route(PROMPTS)) == expected
    with Engine.load(folder, place=PLACE, system="base", systems=["dlp_mlp"]) as engine:
        asked = [dlplora.Request(text, SAMPLING, system="dlp_mlp") for text in PROMPTS]
        assert {answer.sentences[0].route for answer in engine.generate(asked)} == expected


def test_what_an_engine_cannot_load_is_told_in_one_line(data: Path) -> None:
    with pytest.raises(ParamsError, match=r"no systems\.none; there are: arrow, base"):
        Engine.load(data, system="none")
    with pytest.raises(GenerationError, match="max_batch_size is 0"):
        Engine.load(data, system="arrow", place=PLACE, max_batch_size=0)
    with pytest.raises(GenerationError, match="max_batch_size is '4', expected a whole number"):
        Engine.load(data, system="base", place=PLACE, max_batch_size="4")
    with pytest.raises(GenerationError, match="fallback_below is 'often', expected 0 to 1"):
        Engine.load(data, system="base", place=PLACE, fallback_below="often")  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="adapter_mib is '1', expected more than 0"):
        Engine.load(data, place=PLACE, adapter_mib="1")  # type: ignore[arg-type]
    with pytest.raises(GenerationError, match="adapter_mib is -1, expected more than 0"):
        Engine.load(data, system="arrow", place=PLACE, adapter_mib=-1)
    with pytest.raises(ParamsError, match=r"a project's folder; expected its .*/data"):
        Engine.load(data.parent)
    with pytest.raises(ParamsError, match="absent: no such folder"):
        Engine.load(data / "absent")


def test_the_package_has_one_door() -> None:
    assert dlplora.Engine is Engine
    assert {name for name in dlplora.__all__ if getattr(dlplora, name) is None} == set()
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        dlplora.Motor  # noqa: B018
