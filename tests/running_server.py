"""A server on a real socket, in a thread."""

from __future__ import annotations

import json
import socket
import threading
import time
from dataclasses import replace

from ollm_core.server.app import open_app
from ollm_core.server.listening import Listener, address_of, bound


class Running:
    """A server in a thread."""

    def __init__(self, service, **options) -> None:
        told = replace(service.options, port=0, **options)
        self.socket = bound(told)
        self.url = address_of(self.socket)
        self.ended = []
        self.listener = Listener(open_app(service), told, lambda: self.ended.append(True))
        self._thread = threading.Thread(target=self.listener.run, args=([self.socket],))

    def __enter__(self) -> Running:
        self._thread.start()
        for _ in range(1000):
            if self.listener.started:
                return self
            time.sleep(0.01)
        raise AssertionError("it does not start")

    def __exit__(self, *_: object) -> None:
        self.listener.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert self.ended == [True]

    def connect(self) -> socket.socket:
        """A connection to it."""
        return socket.create_connection(self.socket.getsockname()[:2], timeout=20)

    def post(self, path: str, fields: object) -> socket.socket:
        """One that has sent a request."""
        body, connection = json.dumps(fields).encode(), self.connect()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection
