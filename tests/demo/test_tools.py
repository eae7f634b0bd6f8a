"""The tools for programs say what panes say."""

import asyncio
import base64
import json
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("gradio", reason="the demo needs gradio")

from tests.demo.shared import PROMPT, last
from vlm_fix import VlmFixError, cli
from vlm_fix.demo import app, compare, examples, tools


def test_tools_say_what_panes_say(loaded, catalogue, scene):
    describe, ask, compared = tools.tools(catalogue)
    panes = last(compare.compare(loaded, scene, PROMPT, [["vcd"], ["vhr", "hiprune:keep=32"]], 128))
    rows = json.loads(compared("scene:0", methods="vcd,baseline,vhr+hiprune:keep=32"))
    assert [row["methods"] for row in rows] == [pane.title for pane in panes]
    for row, pane in zip(rows, panes, strict=True):
        assert row["answer"] == pane.text.strip() and row["chair_i"] == pane.score().chair_i
        assert set(row["hallucinated"]) == {node for _, label, node in pane.words() if label == "hallucinated"}
    assert describe("scene:0", "baseline") == rows[0]["answer"] and describe("scene:0", "vcd") == rows[1]["answer"]
    encoded = base64.b64encode(scene.read_bytes()).decode()
    for image in (encoded, f"data:image/png;base64,{encoded}"):
        assert ask(image, "Is there a dog in the image?") == ask("scene:0", "Is there a dog in the image?") == "yes"


@pytest.mark.parametrize(
    ("tool", "given", "words"),
    [
        (0, {"image": "nothing"}, "There is no such image"),
        (0, {"image": "/etc/hostname"}, "There is no such image"),
        (0, {"image": "data:image/png;base64,AAAA"}, "not a readable image"),
        (0, {"image": "scene:99"}, "no example 'scene:99'"),
        (0, {"image": "scene:0", "methods": "vcd,vhr"}, "2 runs: join methods with"),
        (0, {"image": "scene:0", "longest": 5000}, "give 1 to 512"),
        (0, {"image": "scene:0", "model": "/tmp"}, "This page offers picto-llava"),
        (1, {"image": "scene:0", "question": " "}, "no prompt"),
        (2, {"image": "scene:0", "methods": "vcd+icd"}, "both contrast"),
        (2, {"image": "scene:0", "methods": "vcd:alpha=x"}, "not a valid value"),
    ],
)
def test_tools_refuse_in_a_sentence(catalogue, tool, given, words):
    with pytest.raises(VlmFixError, match=words):
        tools.tools(catalogue)[tool](**given)


def test_files_are_read_on_this_machine_only(scene):
    assert tools.image_of(str(scene), own=True).tobytes() == examples.scenes()[0].image.tobytes()
    with pytest.raises(VlmFixError, match="no such image"):
        tools.image_of(str(scene), own=False)


def test_the_server_for_programs(catalogue):
    client = pytest.importorskip("mcp.client.streamable_http", reason="the MCP server needs mcp")
    from mcp import ClientSession

    page = app.build(catalogue, mcp=True)
    _, url, _ = page.queue().launch(prevent_thread_lock=True, quiet=True, mcp_server=True, show_error=True)

    async def talk():
        async with (
            client.streamablehttp_client(f"{url}gradio_api/mcp/") as (read, write, _),
            ClientSession(read, write) as session,
        ):
            await session.initialize()
            offered = (await session.list_tools()).tools
            good = await session.call_tool("ask", {"image": "scene:0", "question": "Is there a dog in the image?"})
            return offered, good, await session.call_tool("describe", {"image": "scene:99"})

    try:
        offered, good, bad = run_apart(talk())
    finally:
        page.close()
    assert [tool.name for tool in offered] == ["describe", "ask", "compare"]
    for tool in offered:
        assert all(about.get("description") for about in tool.inputSchema["properties"].values())
    assert not good.isError and good.content[0].text == "yes"
    assert bad.isError and bad.content[0].text.startswith("There is no example 'scene:99'")


def test_without_mcp_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    assert cli.main(["demo", "--mcp"]) == 2
    assert "pip install 'vlm-fix[mcp]'" in capsys.readouterr().err


def run_apart(work):
    """In a thread: one that drives browsers has an event loop already."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, work).result()
