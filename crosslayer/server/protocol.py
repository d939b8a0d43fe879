"""What requests may say: OpenAI's fields with OpenAI's limits, and a few of the engine's own."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from crosslayer.engine import SamplingParams
from crosslayer.errors import UserError

INT64 = 2**63

# OpenAI's fields that ask for what is not offered. They are taken as long as they do not ask.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "verbosity": (),
    "web_search_options": (),
}
# Labels that OpenAI's own service keeps, and that change no answer.
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key")


class _Strict(BaseModel):
    """Types are not converted, unknown fields are refused, and null means the default.

    `neutral` has values of fields that are otherwise not known.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    neutral: ClassVar[dict[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _asked(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields, neutral = cls.model_fields, cls.neutral
        asked = {key: value for key, value in data.items() if value is not None and value not in neutral.get(key, ())}
        unknown = [key for key in asked if key not in fields]
        for key in unknown[1:]:  # one is enough to refuse a million
            del asked[key]
        return asked


class StreamOptions(_Strict):
    neutral = {"include_obfuscation": (False,)}

    include_usage: bool = Field(False, description="A last chunk has the usage of the whole request.")


StopString = Annotated[str, Field(min_length=1, max_length=1000)]
StopStrings = Annotated[list[StopString], Field(max_length=16)]
# One error is enough to refuse a long list.
Texts = Annotated[list[str], Field(fail_fast=True)]
TokenIds = Annotated[list[int], Field(fail_fast=True)]


class _Generate(_Strict):
    """What both endpoints take."""

    neutral = NEUTRAL

    model: str
    temperature: float = Field(1.0, ge=0, le=2, description="0 takes the likeliest token.")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, lt=INT64, description="Not in OpenAI's API. 0 keeps every token.")
    min_p: float = Field(0.0, ge=0, le=1, description="Not in OpenAI's API.")
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100, description="Not in OpenAI's API.")
    seed: int | None = Field(None, ge=-INT64, lt=INT64)
    max_tokens: int | None = Field(None, ge=1, lt=INT64)
    min_tokens: int = Field(0, ge=0, lt=INT64, description="Not in OpenAI's API.")
    stop: StopString | StopStrings = Field(default=[])
    stop_token_ids: list[int] = Field(default=[], max_length=100, description="Not in OpenAI's API.")
    ignore_eos: bool = Field(False, description="Not in OpenAI's API. Go on after the end-of-text token.")
    n: int = Field(1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_labels(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        left_out = {*LABELS, "best_of"} if data.get("best_of") == data.get("n") else LABELS  # the best N of N are all
        return {key: data[key] for key in data if key not in left_out}

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, max_tokens: int | None, logprobs: int | None, stop_ids: tuple[int, ...]) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options goes with stream: true")
        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            stop_token_ids=(*self.stop_token_ids, *stop_ids),
            ignore_eos=self.ignore_eos,
            n=self.n,
            logprobs=logprobs,
        )


class CompletionRequest(_Generate):
    """Continue one or several prompts, each a text or token ids."""

    prompt: str | TokenIds | Texts | Annotated[list[TokenIds], Field(fail_fast=True)]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = Field(False, description="The text begins with the prompt.")

    def sampling(self) -> SamplingParams:
        """OpenAI's default is 16 tokens.

        Raises:
            UserError: `echo` with `logprobs`, which would have to be those of the prompt, too.
        """
        if self.echo and self.logprobs is not None:
            raise UserError("echo with logprobs is not supported: there are none of the prompt")
        return self._sampling(self.max_tokens or 16, self.logprobs, ())

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TextPart(_Strict):
    type: Literal["text"]
    text: str


# Not a union, whose errors would be those of both forms.
_PARTS = TypeAdapter(Annotated[list[TextPart], Field(fail_fast=True)])


def _text_of(content: Any) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in _PARTS.validate_python(content))


class Message(_Strict):
    neutral = {"annotations": ([],), "tool_calls": ([],)}  # clients send replies back as they came

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_text_of, str | list[TextPart])]
    name: str | None = None


class ChatRequest(_Generate):
    """Reply to messages, which the model's chat template makes into a prompt."""

    messages: list[Message] = Field(min_length=1, fail_fast=True)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    max_completion_tokens: int | None = Field(None, ge=1, lt=INT64, description="The newer name of max_tokens.")

    def sampling(self, stop_ids: tuple[int, ...]) -> SamplingParams:
        """Without a limit the reply may go on to the end of the context.

        Raises:
            UserError: `top_logprobs` without `logprobs`, or two different limits.
        """
        if self.top_logprobs and not self.logprobs:
            raise UserError("top_logprobs goes with logprobs: true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise UserError("max_tokens and max_completion_tokens are the same thing; give one of them")
        ignored = () if self.ignore_eos else stop_ids
        return self._sampling(
            self.max_completion_tokens or self.max_tokens, (self.top_logprobs or 0) if self.logprobs else None, ignored
        )

    def plain_messages(self) -> list[dict[str, str]]:
        """As templates want them: the content one text."""
        result = []
        for message in self.messages:
            name = {"name": message.name} if message.name else {}
            result.append({"role": message.role, "content": message.content} | name)
        return result


def describe(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with a body, in a line, and which field it is about."""
    errors = error.errors(include_url=False, include_input=False, include_context=False)
    first = errors[0]
    if not first["loc"]:
        return f"the body is not a JSON object: {first['msg']}", None
    field, path = str(first["loc"][0]), ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        known = field in NEUTRAL and path == field
        return f"{path}: {'this server does not support it' if known else 'there is no such field'}", field
    if first["type"] == "missing":
        return f"{path}: it is missing", field
    if not path.endswith("str"):  # as pydantic calls the first form of a field that is a text or something else
        return f"{path}: {first['msg'].lower()}", field
    reasons = dict.fromkeys(item["msg"].lower() for item in errors if item["loc"][0] == field)
    return f"{field}: {', or: '.join(reasons)}", field
