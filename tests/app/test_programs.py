"""What the page shows, programs get by the same functions: by Gradio's client, and as tools of an MCP server."""

from __future__ import annotations

import asyncio
import base64
import io
from typing import Any

import pytest
from PIL import Image

from aselect_hf.app import Checkpoint, Workbench

gradio_client = pytest.importorskip("gradio_client")
pytestmark = pytest.mark.app
FUNCTIONS = {"walk", "attend", "predict", "neighbors"}


def test_a_client_calls_the_functions(address, trousers):
    client = gradio_client.Client(address, verbose=False)
    picture = gradio_client.handle_file(str(trousers))
    noisy, _, _, facts, plot, _ = client.predict(picture, 100, 2, "key", api_name="/walk")
    assert Image.open(noisy).size == (336, 336)
    assert "blocks.2.key" in facts
    assert "<svg" in plot
    classes, _, _ = client.predict(picture, api_name="/predict")
    assert classes["label"] == "Trouser"
    with pytest.raises(Exception, match="timestep must be a multiple of 25"):
        client.predict(picture, 101, 2, "key", api_name="/walk")
    _, shades, legend = client.predict(picture, model="segmenter", api_name="/predict")
    assert Image.open(shades).size == (28, 28)
    assert "owl" in legend
    with pytest.raises(Exception, match="there is no block 5"):  # the first model has one
        client.predict(picture, 100, 5, "key", model="classifier", api_name="/walk")
    described = client.view_api(return_format="dict")["named_endpoints"]
    assert set(described) == {f"/{name}" for name in FUNCTIONS}
    assert described["/walk"]["parameters"][1]["parameter_name"] == "timestep"


def test_a_model_of_one_block_has_a_page(make_model):
    from aselect_hf.app.page import Page

    shown = Checkpoint("one", make_model(num_channels=1, num_hidden_layers=1))
    page = Page(Workbench([shown]))
    page.build()
    block = page.walk.block
    assert (block.maximum, block.interactive) == (1, False)
    assert page._switched("one")[1]["maximum"] == 1


def call_tools(address: str, calls: list[tuple[str, dict[str, Any]]]) -> tuple[dict[str, Any], list[Any]]:
    """The tools of the server by name, and what calls of them give."""
    import mcp
    from mcp.client.streamable_http import streamablehttp_client

    async def heard(progress: float, total: float | None, message: str | None) -> None:
        """Whoever asks for progress gets every output by itself, and pictures as pictures."""

    async def ask() -> tuple[dict[str, Any], list[Any]]:
        async with (
            streamablehttp_client(f"{address}gradio_api/mcp/") as (read, write, _),
            mcp.ClientSession(read, write) as session,
        ):
            await session.initialize()
            tools = {tool.name: tool for tool in (await session.list_tools()).tools}
            return tools, [await session.call_tool(*call, progress_callback=heard) for call in calls]

    return asyncio.run(ask())


def test_tools_of_a_language_model_are_the_functions(address, trousers):
    pytest.importorskip("mcp")
    picture = f"data:image/png;base64,{base64.b64encode(trousers.read_bytes()).decode()}"
    place = {"picture": picture, "timestep": 100, "block": 2, "kind": "key"}
    tools, (walk, predict, wrong) = call_tools(
        address, [("walk", place), ("predict", {"picture": picture}), ("walk", place | {"timestep": 101})]
    )
    assert set(tools) == FUNCTIONS
    assert "at one noise level" in tools["walk"].description
    described = tools["walk"].inputSchema["properties"]
    assert {"picture", "timestep", "block", "kind", "row", "column", "second", "model"} <= set(described)
    assert described["timestep"]["description"].startswith("one of the timesteps of the slider")
    pictures = [part for part in walk.content if part.type == "image"]
    assert Image.open(io.BytesIO(base64.b64decode(pictures[0].data))).size == (336, 336)
    assert "blocks.2.key" in "".join(part.text for part in walk.content if part.type == "text")
    assert "'label': 'Trouser'" in predict.content[0].text
    assert wrong.isError
    assert "timestep must be a multiple of 25" in wrong.content[0].text
