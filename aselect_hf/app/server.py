"""Serve the page."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from aselect_hf.app.page import CSS, TITLE, Page, theme
from aselect_hf.app.uploads import MAX_MEGABYTES
from aselect_hf.app.workbench import Workbench


def serve(
    bench: Workbench, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False, block: bool = False
) -> tuple[Any, str]:
    """Start the server.

    Args:
        bench: the models on show.
        host: address to listen on.
        port: `None` for the first free one from 7860.
        share: open a tunnel to a public address, by Gradio's servers.
        block: do not return before the server is stopped.

    Returns:
        The page, whose `close()` stops the server, and its address.

    Raises:
        OSError: the port is in use.
    """
    page = Page(bench).build()
    _, local, public = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        theme=theme(),
        css=CSS,
        max_file_size=f"{MAX_MEGABYTES}mb",
        enable_monitoring=False,
        run_history=False,
        ssr_mode=False,
        footer_links=["api"],
        mcp_server=find_spec("mcp") is not None,
        quiet=True,
        prevent_thread_lock=True,
    )
    address = public or local
    print(f"{TITLE}: {address} (Ctrl+C stops it)", flush=True)
    if block:
        page.block_thread()
    return page, address
