"""Tools, resources and prompts by the names the conformance suite calls, on a server made by our own factory. Nothing else offers them."""
# no `from __future__ import annotations`: the SDK reads the annotations of these local functions as they are

import asyncio
import base64
import json
from typing import Annotated, Any

from mcp.server.mcpserver import Context, MCPServer, Resolve
from mcp.server.mcpserver.prompts.base import UserMessage
from mcp.server.mcpserver.resolve import Sample
from mcp_types import (
    AudioContent,
    CreateMessageRequest,
    CreateMessageRequestParams,
    CreateMessageResult,
    ElicitRequest,
    ElicitRequestFormParams,
    EmbeddedResource,
    EmptyResult,
    ImageContent,
    InputRequiredResult,
    ListRootsRequest,
    SamplingMessage,
    SetLevelRequestParams,
    SubscribeRequestParams,
    TextContent,
    TextResourceContents,
    UnsubscribeRequestParams,
)
from pydantic import BaseModel, Field

PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
SILENCE = base64.b64encode(
    b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x01\x00@\x1f\x00\x00@\x1f\x00\x00\x01\x00\x08\x00data\x00\x00\x00\x00")
PAUSE_SECONDS = 0.05
TITLED = [{"const": "value1", "title": "First Option"}, {"const": "value2", "title": "Second Option"}]
OPTIONS = ["option1", "option2", "option3"]


class Answer(BaseModel):
    username: str = Field(description="User's response")
    email: str = Field(description="User's email address")


class Defaults(BaseModel):
    name: str = "John Doe"
    age: int = 30
    score: float = 95.5
    status: str = Field("active", json_schema_extra={"enum": ["active", "inactive", "pending"]})
    verified: bool = True


class Choices(BaseModel):
    untitledSingle: str = Field(json_schema_extra={"enum": OPTIONS})
    titledSingle: str = Field(json_schema_extra={"oneOf": TITLED})
    legacyEnum: str = Field(json_schema_extra={"enum": OPTIONS, "enumNames": ["Option One", "Option Two", "Option Three"]})
    untitledMulti: list[str] = Field(json_schema_extra={"items": {"type": "string", "enum": OPTIONS}})
    titledMulti: list[str] = Field(json_schema_extra={"items": {"anyOf": TITLED}})


def add(server: MCPServer) -> None:
    """Adds everything the suite of 2025-11-25 and 2026-07-28 asks for by name."""
    _contents(server)
    _during_a_call(server)
    _asking_the_client(server)
    _input_required(server)
    _resources(server)
    _prompts(server)
    _optional_methods(server)


def _optional_methods(server: MCPServer) -> None:
    """Capabilities of the older revision that our server does not declare."""
    async def accepted(ctx: Any, params: Any) -> EmptyResult:
        return EmptyResult()

    for method, params in (("logging/setLevel", SetLevelRequestParams), ("resources/subscribe", SubscribeRequestParams),
                           ("resources/unsubscribe", UnsubscribeRequestParams)):
        server._lowlevel_server.add_request_handler(method, params, accepted)


def _contents(server: MCPServer) -> None:
    image = ImageContent(type="image", data=PIXEL, mime_type="image/png")

    def resource(uri: str, text: str, kind: str = "text/plain") -> EmbeddedResource:
        return EmbeddedResource(type="resource", resource=TextResourceContents(uri=uri, mime_type=kind, text=text))

    @server.tool()
    def test_simple_text() -> str:
        """Text."""
        return "This is a simple text response for testing."

    @server.tool()
    def test_image_content() -> list[ImageContent]:
        """An image."""
        return [image]

    @server.tool()
    def test_audio_content() -> list[AudioContent]:
        """A sound."""
        return [AudioContent(type="audio", data=SILENCE.decode(), mime_type="audio/wav")]

    @server.tool()
    def test_embedded_resource() -> list[EmbeddedResource]:
        """A resource inside the answer."""
        return [resource("test://embedded-resource", "This is an embedded resource content.")]

    @server.tool()
    def test_multiple_content_types() -> list[TextContent | ImageContent | EmbeddedResource]:
        """All three."""
        told = TextContent(type="text", text="Multiple content types test:")
        return [told, image, resource("test://mixed-content-resource", json.dumps({"test": "data", "value": 123}), "application/json")]

    @server.tool()
    def test_error_handling() -> str:
        """Always fails."""
        raise RuntimeError("This tool intentionally returns an error for testing")


def _during_a_call(server: MCPServer) -> None:
    @server.tool()
    async def test_tool_with_logging(ctx: Context) -> str:
        """Three log messages."""
        for text in ("Tool execution started", "Tool processing data", "Tool execution completed"):
            await ctx.info(text)
            await asyncio.sleep(PAUSE_SECONDS)
        return "done"

    @server.tool()
    async def test_logging_tool(ctx: Context) -> str:
        """One log message, for those who asked for them."""
        await ctx.info("logged")
        return "done"

    @server.tool()
    async def test_tool_with_progress(ctx: Context) -> str:
        """Three steps."""
        for step in (0, 50, 100):
            await ctx.report_progress(step, 100, f"step {step}")
            await asyncio.sleep(PAUSE_SECONDS)
        return "done"

    @server.tool()
    async def test_trigger_tool_change(ctx: Context) -> str:
        """Tells subscribers that the tools changed."""
        await ctx.notify_tools_changed()
        return "done"

    @server.tool()
    async def test_trigger_prompt_change(ctx: Context) -> str:
        """The same for prompts."""
        await ctx.notify_prompts_changed()
        return "done"

    @server.tool()
    async def test_reconnection(ctx: Context) -> str:
        """Closes its stream in the middle."""
        await ctx.close_sse_stream()
        await asyncio.sleep(4 * PAUSE_SECONDS)
        return "Reconnection test completed"


def _asking_the_client(server: MCPServer) -> None:
    def capital() -> Sample:
        said = SamplingMessage(role="user", content=TextContent(type="text", text="What is the capital of France?"))
        return Sample([said], max_tokens=100)

    @server.tool()
    async def test_sampling(prompt: str, ctx: Context) -> str:
        """Asks the client's model."""
        said = SamplingMessage(role="user", content=TextContent(type="text", text=prompt))
        result = await ctx.session.create_message(messages=[said], max_tokens=100)
        return f"LLM response: {getattr(result.content, 'text', '')}"

    @server.tool()
    async def test_missing_capability(said: Annotated[CreateMessageResult, Resolve(capital)]) -> str:
        """Cannot be called without the capability to sample."""
        return str(said.content)

    @server.tool()
    async def test_elicitation(message: str, ctx: Context) -> str:
        """Asks the person."""
        return await _elicited(ctx, message, Answer)

    @server.tool()
    async def test_elicitation_sep1034_defaults(ctx: Context) -> str:
        """Asks with defaults of every type."""
        return await _elicited(ctx, "Please provide user information", Defaults)

    @server.tool()
    async def test_elicitation_sep1330_enums(ctx: Context) -> str:
        """Asks with choices of every kind."""
        return await _elicited(ctx, "Please choose", Choices)


async def _elicited(ctx: Context, message: str, schema: type[BaseModel]) -> str:
    result = await ctx.elicit(message, schema)
    content = result.data.model_dump() if result.action == "accept" else {}
    return f"Elicitation completed: action={result.action}, content={json.dumps(content)}"


def _form(message: str, **fields: str) -> ElicitRequest:
    schema = {"type": "object", "properties": {name: {"type": kind} for name, kind in fields.items()}, "required": list(fields)}
    return ElicitRequest(params=ElicitRequestFormParams(message=message, requested_schema=schema))


def _sample(text: str, max_tokens: int) -> CreateMessageRequest:
    said = SamplingMessage(role="user", content=TextContent(type="text", text=text))
    return CreateMessageRequest(params=CreateMessageRequestParams(messages=[said], max_tokens=max_tokens))


def _given(ctx: Context, *keys: str) -> list[Any] | None:
    """What the client answered to exactly these questions, as plain values; None where one is missing."""
    answers = ctx.input_responses or {}
    return [answers[key].model_dump(mode="json") for key in keys] if all(key in answers for key in keys) else None


def _input_required(server: MCPServer) -> None:
    name = _form("What is your name?", name="string")

    @server.tool()
    async def test_input_required_result_elicitation(ctx: Context) -> str | InputRequiredResult:
        """One question to the person."""
        given = _given(ctx, "user_name")
        return f"Hello, {given[0]['content']['name']}!" if given else InputRequiredResult(input_requests={"user_name": name})

    @server.tool()
    async def test_streaming_elicitation(ctx: Context) -> str | InputRequiredResult:
        """The same, for a stream."""
        return "done" if _given(ctx, "user_name") else InputRequiredResult(input_requests={"user_name": name})

    @server.tool()
    async def test_input_required_result_sampling(ctx: Context) -> str | InputRequiredResult:
        """One question to the model."""
        given = _given(ctx, "capital_question")
        question = _sample("What is the capital of France?", 100)
        return str(given[0]["content"]) if given else InputRequiredResult(input_requests={"capital_question": question})

    @server.tool()
    async def test_input_required_result_list_roots(ctx: Context) -> str | InputRequiredResult:
        """The client's roots."""
        given = _given(ctx, "client_roots")
        return str(given[0]["roots"]) if given else InputRequiredResult(input_requests={"client_roots": ListRootsRequest()})

    @server.tool()
    async def test_input_required_result_capabilities(ctx: Context) -> str | InputRequiredResult:
        """Only what the client can do."""
        can = ctx.client_capabilities
        asked = {"user_name": name} if can and can.elicitation else {}
        asked |= {"greeting": _sample("Generate a greeting", 50)} if can and can.sampling else {}
        return InputRequiredResult(input_requests=asked) if asked and not ctx.input_responses else "done"

    _with_state(server, name)


def _with_state(server: MCPServer, name: ElicitRequest) -> None:
    async def confirm(ctx: Context) -> str | InputRequiredResult:
        """One question with a state that comes back."""
        if _given(ctx, "confirm") and ctx.request_state == "asked":
            return "state-ok"
        return InputRequiredResult(input_requests={"confirm": _form("Please confirm", ok="boolean")}, request_state="asked")

    server.add_tool(confirm, name="test_input_required_result_request_state")
    server.add_tool(confirm, name="test_input_required_result_tampered_state")

    @server.tool()
    async def test_input_required_result_multiple_inputs(ctx: Context) -> str | InputRequiredResult:
        """Three questions at once."""
        if _given(ctx, "user_name", "greeting", "client_roots"):
            return "done"
        asked = {"user_name": name, "greeting": _sample("Generate a greeting", 50), "client_roots": ListRootsRequest()}
        return InputRequiredResult(input_requests=asked, request_state="asked")

    @server.tool()
    async def test_input_required_result_multi_round(ctx: Context) -> str | InputRequiredResult:
        """Two questions, one after the other."""
        if ctx.request_state == "second" and _given(ctx, "step2"):
            return "done"
        if ctx.request_state == "first" and _given(ctx, "step1"):
            question = _form("Step 2: What is your favorite color?", color="string")
            return InputRequiredResult(input_requests={"step2": question}, request_state="second")
        return InputRequiredResult(input_requests={"step1": _form("Step 1: What is your name?", name="string")}, request_state="first")


def _resources(server: MCPServer) -> None:
    @server.resource("test://static-text", mime_type="text/plain")
    def static_text() -> str:
        """Text."""
        return "This is the content of the static text resource."

    @server.resource("test://static-binary", mime_type="image/png")
    def static_binary() -> bytes:
        """Bytes."""
        return base64.b64decode(PIXEL)

    @server.resource("test://template/{id}/data", mime_type="application/json")
    def template(id: str) -> str:
        """A template."""
        return json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"})

    @server.resource("test://watched-resource")
    def watched() -> str:
        """A resource to subscribe to."""
        return "Watched resource content"


def _prompts(server: MCPServer) -> None:
    def told(text: str) -> UserMessage:
        return UserMessage(content=TextContent(type="text", text=text))

    @server.prompt()
    def test_simple_prompt() -> list[UserMessage]:
        """Without arguments."""
        return [told("This is a simple prompt for testing.")]

    @server.prompt()
    def test_prompt_with_arguments(arg1: str, arg2: str) -> list[UserMessage]:
        """With two."""
        return [told(f"Prompt with arguments: arg1='{arg1}', arg2='{arg2}'")]

    @server.prompt()
    def test_prompt_with_embedded_resource(resourceUri: str) -> list[UserMessage]:
        """With a resource."""
        contents = TextResourceContents(uri=resourceUri, mime_type="text/plain", text="Embedded resource content for testing.")
        return [UserMessage(content=EmbeddedResource(type="resource", resource=contents)), told("Please process it.")]

    @server.prompt()
    def test_prompt_with_image() -> list[UserMessage]:
        """With an image."""
        return [UserMessage(content=ImageContent(type="image", data=PIXEL, mime_type="image/png")), told("Please analyze it.")]

    @server.prompt()
    async def test_input_required_result_prompt(ctx: Context) -> list[UserMessage] | InputRequiredResult:
        """Asks before it is rendered."""
        if _given(ctx, "user_context"):
            return [told("done")]
        return InputRequiredResult(input_requests={"user_context": _form("What context should the prompt use?", context="string")})
