"""One sample of causal_loop_v2.py, which its audit reads as well."""

from dataclasses import dataclass

from data_pipeline.errors import DataError

LABEL_MODULUS = 10  # the largest whose values are single characters


@dataclass(frozen=True)
class Sample:
    """One question about one program. A document is prompt + completion, joined without a separator."""

    id: str
    family: str
    depth: int
    modulus: int
    program: str  # without the query
    question: str  # the queried variable, one capital letter
    answer: int  # 0..modulus-1
    values: tuple[int, ...]  # the result of each statement
    trace: str  # the worked steps, without prompt and answer
    prompt_trace: str
    completion_trace: str
    prompt_direct: str
    completion_direct: str

    def labelled(self) -> tuple[str, tuple[tuple[int, str], ...]]:
        """`program?X`, every character one token, and (index, the character to predict at it), in order.

        The targets are the result of each statement at its last character and the answer at the last
        character. Raises DataError for a modulus above 10, whose values need several characters.
        """
        if self.modulus > LABEL_MODULUS:
            raise DataError(
                f"labels are single characters, modulus {self.modulus} is above {LABEL_MODULUS}: lower it"
            )
        text = f"{self.program}?{self.question}"
        first = len(self.program) - 4 * len(self.values) + 3
        labels = [(first + 4 * i, str(value)) for i, value in enumerate(self.values)]
        return text, (*labels, (len(text) - 1, str(self.answer)))
