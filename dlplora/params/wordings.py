"""Files of what people type: other wordings of a task's questions, and texts of no task."""

from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

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


Text = Annotated[str, Field(min_length=1)]


class NoTask(Section):
    """Texts that belong to no task: to calibrate routers by, and to test them with."""

    validation: Annotated[list[Text], Field(min_length=1)]
    test: Annotated[list[Text], Field(min_length=1)]
