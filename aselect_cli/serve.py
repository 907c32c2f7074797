"""`aselect app`."""

from __future__ import annotations

from typing import Annotated

import typer

from aselect_cli import options as opt
from aselect_cli.command import Answer


def app(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Checkpoints: folders, Hub ids, or sample (default: sample). Several can be compared."),
    ] = None,
    *,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for every network.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port to listen on (default: the first free one from 7860).")] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Also open a public address, through a tunnel of Gradio's servers.")
    ] = False,
    device: opt.Device = None,
) -> Answer:
    """Show in a browser what noise does to a model's features: predict, walk the noise, compare.

    Nothing is sent anywhere without --share. It needs Gradio, which the extra `app` of this package installs.
    """
    from importlib.util import find_spec

    if find_spec("gradio") is None:
        raise ValueError("aselect app needs Gradio 6: pip install aselect-hf[app]")
    from aselect_cli.inputs import best_device
    from aselect_hf.app import Workbench, load_shown
    from aselect_hf.app.server import serve

    shown = [load_shown(each, device or best_device()) for each in models or ["sample"]]
    _, address = serve(Workbench(shown), host=host, port=port, share=share, block=True)
    return Answer("", {"address": address, "models": [each.name for each in shown]})
