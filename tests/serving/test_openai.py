"""OpenAI's own client gets the engine's answers: at once, as a stream, from several threads."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from dlplora.engine.requests import Message, Request
from dlplora.records.routes import BASE_ROUTE, Route
from dlplora.sampling import Sampling
from dlplora.systems.engine import Engine
from tests.serving.running import Running, running

QUESTION = "what is the opposite of up ?"
PROMPTS = [QUESTION, "say red", "which colour : two a b c d ?", "sum of one plus two ?"]
SHORT = Sampling(max_new_tokens=6)


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def asked(text: str, **told: Any) -> Request:
    return Request(text, **({"sampling": SHORT, "policy": "split"} | told))


def test_a_question_gets_the_engines_answer(server: Running, engine: Engine) -> None:
    found = server.client().chat.completions.with_raw_response.create(
        model="dlp_mlp", messages=user(QUESTION), max_completion_tokens=6
    )
    (expected,) = engine.generate([asked(QUESTION)])
    reply = found.parse()
    choice = reply.choices[0]
    assert choice.message.content == expected.text
    assert choice.finish_reason == ("length" if expected.ending == "length" else "stop")
    assert reply.usage is not None
    assert reply.usage.prompt_tokens == expected.num_prompt_tokens
    assert reply.usage.completion_tokens == expected.num_tokens
    ((first, *_),) = reply.model_extra["route"]  # type: ignore[index]
    assert first["adapters"] == pytest.approx(dict(expected.sentences[0].route.mix))
    assert first["confidence"] == pytest.approx(expected.sentences[0].route.confidence)
    for name in expected.sentences[0].route.adapters:
        assert f"{name}=" in found.headers["x-dlplora-adapters"]
    assert 0 < float(found.headers["x-dlplora-confidence"]) <= 1
    assert len(found.headers["x-request-id"]) == 32
    assert reply.system_fingerprint == server.server.api.models.current.fingerprint


@pytest.mark.parametrize(
    ("model", "told"),
    [
        ("dlp_mlp", {"policy": "split"}),
        ("", {"policy": "split"}),
        ("single:opposites", {"system": "single:opposites", "policy": "split"}),
        ("logo", {"system": "logo", "policy": "split"}),
        ("colours", {"routes": (Route(("colours",), (1.0,)),), "policy": "route_once"}),
        ("base", {"routes": (BASE_ROUTE,), "policy": "route_once"}),
    ],
)
def test_a_model_is_the_base_an_adapter_or_a_system(
    server: Running, engine: Engine, model: str, told: dict[str, Any]
) -> None:
    (expected,) = engine.generate([asked(QUESTION, **told)])
    found = server.client().chat.completions.create(
        model=model, messages=user(QUESTION), max_tokens=6
    )
    assert found.choices[0].message.content == expected.text
    assert found.model == (model or "dlp_mlp")


def test_a_mix_is_weighed_as_the_client_says(server: Running, engine: Engine) -> None:
    mix = Route(("colours", "opposites"), (0.25, -1.5))
    (expected,) = engine.generate([asked(QUESTION, routes=(mix,), policy="route_once")])
    found = server.client().chat.completions.create(
        model="dlp_mlp",
        messages=user(QUESTION),
        max_tokens=6,
        extra_body={"lora": [{"id": "colours", "scale": 0.25}, {"id": "opposites", "scale": -1.5}]},
    )
    assert found.choices[0].message.content == expected.text


def test_a_mix_is_one_of_the_adapters_that_are_listed(server: Running, engine: Engine) -> None:
    lora = [{"id": "colours", "scale": 1.0}]
    found = {
        server.client()
        .chat.completions.create(
            model=model, messages=user(QUESTION), max_tokens=6, extra_body={"lora": lora}
        )
        .choices[0]
        .message.content
        for model in ("dlp_mlp", "logo", "single:opposites", "colours", "base")
    }
    route = Route(("colours",), (1.0,))
    (expected,) = engine.generate([asked(QUESTION, routes=(route,), policy="route_once")])
    assert found == {expected.text}


def test_a_chat_leaves_a_systems_own_policy(data: Path) -> None:
    text = "1. say red\n2. what is the opposite of up ?"
    with running(data, systems=["dlp_mlp_keep"]) as server:
        told = server.post("/v1/chat/completions", {"messages": user(text), "max_tokens": 6}).json()
        split = server.post(
            "/v1/chat/completions",
            {"messages": user(text), "max_tokens": 6, "route_policy": "split"},
        ).json()
    assert [part["question"] for part in told["route"][0]][:1] == [None]
    assert len(split["route"][0]) == 2


def test_a_stream_has_the_same_text_role_first_and_usage_last(
    server: Running, engine: Engine
) -> None:
    (expected,) = engine.generate([asked(QUESTION)])
    chunks = list(
        server.client().chat.completions.create(
            model="dlp_mlp",
            messages=user(QUESTION),
            max_tokens=6,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    *told, last = chunks
    assert told[0].choices[0].delta.role == "assistant"
    texts = [chunk.choices[0].delta.content or "" for chunk in told]
    assert "".join(texts) == expected.text
    assert [chunk.choices[0].finish_reason for chunk in told[:-1]] == [None] * (len(told) - 1)
    assert told[-1].choices[0].finish_reason is not None
    assert told[-1].choices[0].delta.content is None
    assert told[-1].model_extra["route"][0]["adapters"]  # type: ignore[index]
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == expected.num_tokens
    assert len({(chunk.id, chunk.created) for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in told)


def test_without_usage_a_stream_tells_none(server: Running) -> None:
    chunks = list(
        server.client().chat.completions.create(
            model="dlp_mlp", messages=user(QUESTION), max_tokens=3, stream=True
        )
    )
    assert all(chunk.choices and "usage" not in chunk.model_fields_set for chunk in chunks)


def test_several_questions_are_answered_each_by_its_route(server: Running, engine: Engine) -> None:
    text = "1. say red\n2. what is the opposite of up ?\n3. say blue"
    (expected,) = engine.generate([asked(text)])
    found = server.client().chat.completions.create(
        model="dlp_mlp", messages=user(text), max_tokens=6
    )
    assert found.choices[0].message.content == expected.text
    (parts,) = found.model_extra["route"]  # type: ignore[index]
    assert [part["question"] for part in parts] == [part.question for part in expected.parts]
    assert len(parts) == 3


def test_turns_system_messages_and_parts_of_text(server: Running, engine: Engine) -> None:
    turns = (
        Message("system", "say red"),
        Message("user", "what is up ?"),
        Message("assistant", "down"),
        Message("user", "and left ?"),
    )
    (expected,) = engine.generate([Request(turns, SHORT, policy="split")])
    messages: Any = [
        {"role": "developer", "content": "say red"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "what is "}, {"type": "text", "text": "up ?"}],
        },
        {"role": "assistant", "content": "down"},
        {"role": "user", "content": "and left ?"},
    ]
    found = server.client().chat.completions.create(
        model="dlp_mlp", messages=messages, max_tokens=6
    )
    assert found.choices[0].message.content == expected.text


def test_without_a_limit_an_answer_is_as_long_as_fits(server: Running, engine: Engine) -> None:
    text = " ".join(["red blue"] * 118)
    room = int(engine.base.room(engine.base.chat.prompt(text)))
    assert 1 < room < server.server.api.models.current.max_new_tokens
    told = {"ignore_eos": True}
    found = server.client().chat.completions.create(
        model="base", messages=user(text), extra_body=told
    )
    assert found.usage is not None
    assert found.usage.completion_tokens == room
    with pytest.raises(openai.BadRequestError, match="tokens"):
        server.client().chat.completions.create(model="base", messages=user(f"{text} {text}"))


def test_several_answers_are_drawn_by_one_seed(server: Running, engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=6, temperature=3.0, seed=5)
    expected = engine.generate([asked(QUESTION, sampling=sampling, n=3)])
    for _ in range(2):
        found = server.client().chat.completions.create(
            model="dlp_mlp", messages=user(QUESTION), max_tokens=6, temperature=3.0, seed=5, n=3
        )
        assert [one.index for one in found.choices] == [0, 1, 2]
        assert [one.message.content for one in found.choices] == [one.text for one in expected]
    without_seed = {
        server.client()
        .chat.completions.create(
            model="dlp_mlp", messages=user(QUESTION), max_tokens=12, temperature=5.0
        )
        .choices[0]
        .message.content
        for _ in range(4)
    }
    assert len(without_seed) > 1


def test_stops_penalties_and_logprobs(server: Running, engine: Engine) -> None:
    sampling = Sampling(max_new_tokens=6, frequency_penalty=1.5, min_tokens=2)
    (expected,) = engine.generate([asked(QUESTION, sampling=sampling, logprobs=3)])
    found = server.client().chat.completions.create(
        model="dlp_mlp",
        messages=user(QUESTION),
        max_tokens=6,
        frequency_penalty=1.5,
        logprobs=True,
        top_logprobs=3,
        extra_body={"min_tokens": 2},
    )
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content or []
    assert [one.token for one in content] == [one.text for one in expected.tokens]
    assert [one.logprob for one in content] == pytest.approx(
        [one.logprob for one in expected.tokens], abs=1e-4
    )
    assert all(len(one.top_logprobs) == 3 for one in content)
    word = expected.text.split()[1]
    stopped = server.client().chat.completions.create(
        model="dlp_mlp",
        messages=user(QUESTION),
        max_tokens=6,
        frequency_penalty=1.5,
        stop=word,
        extra_body={"min_tokens": 2},
    )
    assert stopped.choices[0].finish_reason == "stop"
    assert word not in (stopped.choices[0].message.content or "")


def test_completions_take_texts_and_tokens_and_echo_them(server: Running, engine: Engine) -> None:
    base = engine.base.chat
    ids = base.prompt(QUESTION)
    expected = engine.generate(
        [
            Request("say red", SHORT, raw=True, logprobs=2, echo=True),
            Request(ids, SHORT, logprobs=2, echo=True),
        ]
    )
    client = server.client()
    found = client.completions.create(
        model="dlp_mlp", prompt="say red", max_tokens=6, logprobs=2, echo=True
    ).choices
    found += client.completions.create(
        model="dlp_mlp", prompt=[list(ids)], max_tokens=6, logprobs=2, echo=True
    ).choices
    for choice, answer in zip(found, expected, strict=True):
        scores = [*answer.prompt_tokens, *answer.tokens]
        assert choice.logprobs is not None
        assert choice.logprobs.tokens == [one.text for one in scores]
        assert (choice.logprobs.token_logprobs or [])[0] is None
        assert (choice.logprobs.token_logprobs or [])[1:] == pytest.approx(
            [one.logprob for one in scores[1:]], abs=1e-4
        )
        for one, top in zip(scores[1:], (choice.logprobs.top_logprobs or [])[1:], strict=True):
            assert one.text in top
    assert found[0].text == f"say red{expected[0].text}"
    both = client.completions.create(model="dlp_mlp", prompt=["say red", "say red"], n=2, seed=1)
    assert [one.index for one in both.choices] == [0, 1, 2, 3]


def test_a_stream_of_completions_has_the_same_text(server: Running) -> None:
    client = server.client()
    whole = client.completions.create(model="dlp_mlp", prompt=["say red", "a b"], max_tokens=6)
    told = {0: "", 1: ""}
    for chunk in client.completions.create(
        model="dlp_mlp", prompt=["say red", "a b"], max_tokens=6, stream=True
    ):
        for choice in chunk.choices:
            told[choice.index] += choice.text
    assert [told[0], told[1]] == [one.text for one in whole.choices]


def test_many_clients_get_what_each_would_alone(server: Running, engine: Engine) -> None:
    asks = [(prompt, model) for prompt in PROMPTS for model in ("dlp_mlp", "base", "colours")] * 2
    alone = {
        (prompt, model): server.client()
        .chat.completions.create(model=model, messages=user(prompt), max_tokens=6)
        .choices[0]
        .message.content
        for prompt, model in dict.fromkeys(asks)
    }

    def ask(one: tuple[str, str]) -> str | None:
        found = server.client().chat.completions.create(
            model=one[1], messages=user(one[0]), max_tokens=6
        )
        return found.choices[0].message.content

    with ThreadPoolExecutor(12) as threads:
        assert list(threads.map(ask, asks)) == [alone[one] for one in asks]


def test_the_asynchronous_client_streams_too(server: Running, engine: Engine) -> None:
    (expected,) = engine.generate([asked(QUESTION)])

    async def text() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model="dlp_mlp", messages=user(QUESTION), max_tokens=6, stream=True
            )
            return "".join(
                [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            )

    assert asyncio.run(text()) == expected.text


def test_models_are_listed_and_shown(server: Running) -> None:
    client = server.client()
    listed = {model.id: model for model in client.models.list()}
    assert listed.keys() == {"colours", "opposites", "base", "dlp_mlp", "single:opposites", "logo"}
    assert client.models.retrieve("colours") == listed["colours"]
    assert listed["base"].model_extra == {"root": "base", "parent": None, "max_model_len": 256}
    assert listed["logo"].model_extra["parent"] == "base"  # type: ignore[index]
    with pytest.raises(openai.NotFoundError, match="no model 'gone'; there are: base, colours"):
        client.models.retrieve("gone")
