"""Other people's clients: lm-evaluation-harness, and schemathesis over the schema."""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from schemathesis.checks import (
    content_type_conformance,
    not_a_server_error,
    response_schema_conformance,
    status_code_conformance,
)

from dlplora.engine.requests import Request
from dlplora.records.routes import Route
from dlplora.sampling import Sampling
from dlplora.systems.engine import Engine
from tests.serving.running import Running

QUESTIONS = ["what is the opposite of up ?", "which colour : one ?", "say red", "sum of one two"]
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
EXAMPLES = 40
OPTIONS = ["red", "down left", "no", "five"]


def chat(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def harness(kind: type[Any], server: Running, path: str, **more: Any) -> Any:
    """Return a model of the harness that asks the server, by the server's own tokenizer."""
    return kind(model="opposites", base_url=f"{server.url}{path}", max_length=256, **more)


def instances(kind: str, arguments: list[Any]) -> list[Any]:
    return [
        Instance(request_type=kind, doc={}, arguments=one, idx=place)
        for place, one in enumerate(arguments)
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_harness_weighs_options_as_the_engine_does(
    server: Running, engine: Engine, batch_size: int
) -> None:
    client = harness(
        LocalCompletionsAPI,
        server,
        "/v1/completions",
        tokenizer_backend="remote",
        batch_size=batch_size,
    )
    asked = [(question, option) for question in QUESTIONS for option in OPTIONS]
    rendered = {
        question: client.tokenizer.apply_chat_template(chat(question)) for question in QUESTIONS
    }
    found = client.loglikelihood(
        instances("loglikelihood", [(rendered[question], option) for question, option in asked]),
        disable_tqdm=True,
    )
    route = Route(("opposites",), (1.0,))
    scores = {
        (question, option): logprob
        for question in QUESTIONS
        for option, logprob in zip(
            OPTIONS, engine.score(question, OPTIONS, route=route).logprobs, strict=True
        )
    }
    assert [one for one, _ in found] == pytest.approx([scores[one] for one in asked], abs=1e-4)


def test_the_harness_generates_what_the_engine_does(server: Running, engine: Engine) -> None:
    client = harness(LocalChatCompletion, server, "/v1/chat/completions", num_concurrent=4)
    told = {"until": ["red"], "max_gen_toks": 8, "temperature": 0}
    found = client.generate_until(
        instances(
            "generate_until",
            [(client.apply_chat_template(chat(question)), dict(told)) for question in QUESTIONS],
        ),
        disable_tqdm=True,
    )
    sampling = Sampling(max_new_tokens=8, stop=("red",))
    route = Route(("opposites",), (1.0,))
    expected = engine.generate(
        [Request(q, sampling, (route,), policy="route_once") for q in QUESTIONS]
    )
    assert found == [answer.text for answer in expected]


def test_every_reply_is_as_the_schema_says(server: Running) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    answered: Counter[str] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()

        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
        @given(case=operation.as_strategy(), is_known=st.booleans())
        def check(case: schemathesis.Case, is_known: bool) -> None:
            if is_known and isinstance(case.body, dict):  # else hardly a name is one
                case.body = case.body | {"model": "dlp_mlp", "lora": None}
            elif is_known and case.path_parameters:
                case.path_parameters["name"] = "colours"
            reply = case.call_and_validate(checks=CHECKS)
            answered[case.operation.path] += reply.status_code == 200

        check()
    for path in (
        *("/v1/chat/completions", "/v1/completions", "/v1/route", "/v1/score"),
        *("/v1/models/{name}", "/tokenize"),
    ):
        assert answered[path] >= 3, (path, answered)
