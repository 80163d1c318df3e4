"""What requests may say, and how much of it. Unknown fields are refused: without effect they would mislead."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .sampling import Sampling

Text = Annotated[str, Field(max_length=1 << 20)]
Count = Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True)
class Limits:
    length: int = 2048  # tokens of prompt and answer together
    body: int = 1 << 20  # bytes of a request
    body_seconds: float = 30.0  # to send them
    stalled_seconds: float = 120.0  # that a reader may take to read nothing


MAX_MESSAGES, MAX_INPUTS, MAX_CHOICES = 512, 64, 8


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, data: Any) -> Any:
        """null is how clients leave a field out."""
        return {name: value for name, value in data.items() if value is not None} if isinstance(data, dict) else data


class Ignored(Strict):
    """Fields that concern OpenAI's own services and no answer."""

    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None


class Sampled(Ignored):
    """Fields of both kinds of completion."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    max_tokens: Count | None = None
    temperature: float = Field(0.95, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(0.7, gt=0, le=1, allow_inf_nan=False)
    top_k: int = Field(50, ge=0)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    presence_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    frequency_penalty: float = Field(0.0, ge=-2, le=2, allow_inf_nan=False)
    logit_bias: dict | None = Field(None, max_length=0)
    stop: str | list[str] = []

    @field_validator("stop")
    @classmethod
    def check_stop(cls, stop: str | list[str]) -> str | list[str]:
        words = [stop] if isinstance(stop, str) else stop
        if not all(words) or len(words) > 4 or any(len(word) > 256 for word in words):
            raise ValueError("up to 4 texts of 1 to 256 characters")
        return stop

    @model_validator(mode="after")
    def check(self):
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is for stream = true")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def sampling(self, index: int, logprobs: int | None) -> Sampling:
        """Of choice `index`: the first has the seed of the request, the others those that follow."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=None if self.seed is None else (self.seed + index) % (1 << 63),
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logprobs=logprobs,
        )


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None
    refusal: Any = None  # assistants' messages come back as they were given out
    annotations: Any = None

    @property
    def as_turn(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class JsonSchema(Strict):
    name: str | None = None
    description: str | None = None
    strict: bool = True
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def check(self):
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema goes with the type 'json_schema', and only with it")
        return self

    @property
    def schema_to_follow(self) -> dict | None:
        if self.type == "text":
            return None
        return {"type": "object"} if self.json_schema is None else self.json_schema.schema_


class ChatRequest(Sampled):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def check_logprobs(self):
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is for logprobs = true")
        return self


class CompletionRequest(Sampled):
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    max_tokens: Count | None = 16
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: Literal[1] = 1
    echo: Literal[False] = False
    suffix: Literal[""] = ""


class EmbeddingRequest(Ignored):
    model: str | None = None
    input: Text | Annotated[list[Text], Field(min_length=1, max_length=MAX_INPUTS)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Count | None = None


class OfficialRequest(BaseModel):
    """The `POST /` of the official repository's api.py, whose 0, "" and null mean the default."""

    prompt: Text
    history: Annotated[list[tuple[Text, Text]], Field(max_length=(MAX_MESSAGES - 1) // 2)] | None = None
    max_length: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1, allow_inf_nan=False)
    temperature: float | None = Field(None, ge=0, le=2, allow_inf_nan=False)

    def as_chat(self) -> tuple[ChatRequest, int | None]:
        """The same as a chat request, and its max_length."""
        turns = [turn for pair in self.history or [] for turn in zip(("user", "assistant"), pair)]
        messages = [Message(role=role, content=text) for role, text in [*turns, ("user", self.prompt)]]
        chosen = {"top_p": self.top_p, "temperature": self.temperature}
        chat = ChatRequest(messages=messages, **{name: value for name, value in chosen.items() if value})
        return chat, self.max_length or None


Sampled.model_rebuild()
