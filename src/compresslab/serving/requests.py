"""Bodies of OpenAI's API, checked: JSON -> a request, or what is wrong with it and in which field.

Source: OpenAI's API reference (chat/completions, completions). A field that would change the answer and is not one of these
is refused unless it has the value that changes nothing; one that only labels the request is let pass.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from compresslab.serving.runtime import Messages, Sampling

LABELS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "parallel_tool_calls"}
NEUTRAL: dict[str, Any] = {
    "best_of": 1, "response_format": {"type": "text"}, "tool_choice": "none", "modalities": ["text"], "suffix": "",
}  # fmt: skip


class ApiError(Exception):
    """An answer in the API's own shape."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.headers = status, headers
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")

    include_usage: bool = False


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]

    def flat(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


StopString = Annotated[str, Field(min_length=1, max_length=1000)]


class Request(_Strict):
    """What both kinds of request have."""

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _knows_all_fields(self) -> Request:
        for name, value in (self.model_extra or {}).items():
            if name not in LABELS and value and value != NEUTRAL.get(name):
                raise ApiError(
                    400, f"'{name}' is not supported: leave it out", param=name, code="unsupported_parameter"
                )
        return self

    def wanted_tokens(self) -> int | None:
        return self.max_tokens

    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    def sampling(self, most: int) -> Sampling:
        """At most so many tokens, whatever was asked for."""
        return Sampling(
            max_tokens=min(self.wanted_tokens() or most, most),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )

    def text(self) -> str | Messages:
        raise NotImplementedError


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def wanted_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def text(self) -> Messages:
        return [message.flat() for message in self.messages]


class CompletionRequest(Request):
    prompt: str | Annotated[list[str], Field(min_length=1, max_length=1)]

    def text(self) -> str:
        return self.prompt if isinstance(self.prompt, str) else self.prompt[0]


def read(body: bytes, kind: type[Request]) -> Request:
    """A request from its JSON.

    Raises:
        ApiError: 400, with the first field that is wrong.
    """
    try:
        raw = from_json(body, allow_inf_nan=False)  # json.loads lets lone surrogates pass, which no tokenizer takes
    except ValueError as error:
        raise ApiError(400, f"the body is no JSON: {error}", code="invalid_json") from None
    if not isinstance(raw, dict):
        raise ApiError(400, f"the body must be a JSON object, not {type(raw).__name__}", code="invalid_type")
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        code = "missing_required_parameter" if first["type"] == "missing" else "invalid_value"
        raise ApiError(400, f"'{where}': {first['msg']}", param=where, code=code) from None
