"""What routing needs of a request's body: its head. The body itself goes on as it was received.

To a stock vLLM server alone it goes with another model's name (`for_model`), and else as it was.

The JSON is read once, whole, and only these fields become objects; everything else is skipped over.
Of a key that stands twice the last one counts, here and in vLLM, so both see the same model.
"""

from typing import Annotated, Any, Final

import msgspec

from router.frontend.errors import ApiError

BYTES_PER_TOKEN: Final = 4  # of English text, about; an estimate is all that placement needs
MODEL_MAX: Final = 512
NOBODY: Final = frozenset({b"null", b'""'})


class Head(msgspec.Struct):
    """The fields of an OpenAI request that matter here.

    Only the model's id is checked. What the lengths may be is the engine's to say: vLLM takes "8" for
    8, and refuses in its own words what it does not take.
    """

    model: Annotated[str, msgspec.Meta(max_length=MODEL_MAX)] | None = None
    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    user: msgspec.Raw = msgspec.Raw(b"null")

    @property
    def output_tokens(self) -> int:
        """The most tokens that the client wants, 0 where it does not say."""
        for asked in (self.max_completion_tokens, self.max_tokens, self.max_output_tokens):
            if isinstance(asked, int) and asked > 0:
                return asked
        return 0

    @property
    def who(self) -> str:
        """The `user` as the client wrote it, whatever that is: the same bytes are the same one."""
        text = bytes(self.user)
        return "" if text in NOBODY else text.decode("utf-8", errors="replace")


_decode = msgspec.json.Decoder(Head).decode
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode


def parse_head(body: bytes) -> Head:
    """Read the head of a body. Raises `ApiError` 400 that says what to send instead."""
    try:
        head = _decode(body)
        head.user = head.user.copy()  # as it is it would keep the whole body
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at ")
        field = where.strip("`").removeprefix("$").removeprefix(".")
        if not field:
            raise ApiError(400, 'The body must be a JSON object, such as {"model": ...}.') from None
        raise ApiError(400, f"`{field}`: {what}.", param=field, code="invalid_value") from None
    except RecursionError:
        raise ApiError(400, "The body is nested too deeply.", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(
            400, f"The body is not valid JSON ({error}); send a JSON object.", code="invalid_json"
        ) from None
    return head


def for_model(body: bytes, model: str) -> bytes:
    """A body that `parse_head` has read, with that `model`; of each other value the bytes stay."""
    try:
        fields = _decode_fields(body)
    except UnicodeDecodeError:  # a key that is no text, which is skipped over when the head is read
        return body  # the engine refuses it in its own words
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    return msgspec.json.encode(fields)
