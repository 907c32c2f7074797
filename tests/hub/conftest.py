"""Fixtures: a loopback Hub, and a process of its own for the real client which talks to it."""

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from typing import Any, TypeVar

import pytest

from .server import HubServer

T = TypeVar("T")


class ClientProcess:
    """A process in which ``huggingface_hub`` is imported with an environment of its own.

    The client reads ``HF_ENDPOINT`` and its like once, at import, so the process of the tests cannot be redirected.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self._pool = ProcessPoolExecutor(1, get_context("spawn"), set_environment, (environment,))

    def run(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function (of a module, not a local one) in the process; what it returns or raises comes back."""
        return self._pool.submit(function, *args, **kwargs).result(timeout=120)

    def stop(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class RemoteApi:
    """``HfApi`` with one user's token: each method runs in the client process, listings come back as lists."""

    def __init__(self, client: ClientProcess, token: str | bool) -> None:
        self._client, self._token = client, token

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return partial(self._client.run, call_api, method, self._token)


def set_environment(environment: dict[str, str]) -> None:
    """Forget the parent's variables, and the folder of remote code that a test may have put on its path."""
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:] = [folder for folder in sys.path if not folder.endswith(os.path.join("huggingface", "modules"))]


def call_api(method: str, token: str | bool, *args: Any, **kwargs: Any) -> Any:
    from huggingface_hub import HfApi

    result = getattr(HfApi(token=token), method)(*args, **kwargs)
    return list(result) if isinstance(result, Iterator) else result


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    """A running Hub with two users, ada and bob."""
    with HubServer(tokens={"hf_ada": "ada", "hf_bob": "bob"}) as server:
        yield server


@pytest.fixture(scope="module")
def client(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClientProcess]:
    """A client process in which ada is logged in."""
    process = ClientProcess(hub.client_environment(tmp_path_factory.mktemp("hf_home"), token="hf_ada"))
    yield process
    process.stop()


@pytest.fixture(scope="module")
def ada(client: ClientProcess) -> RemoteApi:
    return RemoteApi(client, "hf_ada")


@pytest.fixture(scope="module")
def bob(client: ClientProcess) -> RemoteApi:
    return RemoteApi(client, "hf_bob")


@pytest.fixture(scope="module")
def anonymous(client: ClientProcess) -> RemoteApi:
    return RemoteApi(client, False)


@pytest.fixture(autouse=True)
def _no_leftover_faults(hub: HubServer) -> Iterator[None]:
    yield
    hub.faults.clear()
