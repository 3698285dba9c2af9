"""Other wordings of a task's questions, as a file of its own holds them."""

from typing import Annotated

from pydantic import AfterValidator, model_validator

from dlplora.params.fields import Section

SLOT = "{}"


def _with_one_slot(template: str) -> str:
    if (count := template.count(SLOT)) != 1:
        raise ValueError(f"expected one {SLOT} for the question, not {count}")
    return template


Wording = Annotated[str, AfterValidator(_with_one_slot)]


class Wordings(Section):
    """Templates with a slot: to learn from, to choose by and to test with; none is in two lists."""

    train: list[Wording]
    validation: list[Wording]
    test: list[Wording]

    @model_validator(mode="after")
    def _are_different(self) -> "Wordings":
        every = [" ".join(one.split()) for one in (*self.train, *self.validation, *self.test)]
        if twice := next((one for one in every if every.count(one) > 1), None):
            raise ValueError(f"{twice!r} stands twice; each wording is of one split")
        return self
