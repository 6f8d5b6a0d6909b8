"""A server on this machine that speaks S3, and an environment in which s3fs finds it."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from moto.server import ThreadedMotoServer


@contextmanager
def s3_server(bucket: str) -> Iterator[None]:
    """With an empty bucket of that name."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    with pytest.MonkeyPatch.context() as patched:
        host, port = server.get_host_and_port()
        # Its buckets are the process's, and stay when a server ends.
        with urllib.request.urlopen(urllib.request.Request(f"http://{host}:{port}/moto-api/reset", method="POST")) as answer:
            assert answer.status == 200
        told = {
            "ENDPOINT_URL": f"http://{host}:{port}",
            "ACCESS_KEY_ID": "key",
            "SECRET_ACCESS_KEY": "secret",
            "DEFAULT_REGION": "us-east-1",
        }
        for name, value in told.items():
            patched.setenv(f"AWS_{name}", value)
        store = fsspec.get_filesystem_class("s3")
        store.clear_instance_cache()  # those of a server before
        fsspec.filesystem("s3").mkdir(bucket)
        yield
        store.clear_instance_cache()
    server.stop()
