"""The receiving half of a WebSocket (RFC 6455) over a plain socket: enough to follow a server's messages."""
from __future__ import annotations

import base64
import os
import socket
import struct

TEXT, BINARY, CLOSE, PING, PONG = 0x1, 0x2, 0x8, 0x9, 0xA


class WebSocketClosed(ConnectionError):
    """The other side ended the connection, or never accepted it."""


class WebSocket:
    """A connection to `ws://host:port{path}`. `receive` returns one message at a time."""

    def __init__(self, host: str, port: int, path: str, timeout: float = 30.0):
        self._socket = socket.create_connection((host, port), timeout=timeout)
        self._buffer = b""
        key = base64.b64encode(os.urandom(16)).decode()
        self._socket.sendall((f"GET {path} HTTP/1.1\r\nHost: {host}:{port}\r\nUpgrade: websocket\r\n"
                              f"Connection: Upgrade\r\nSec-WebSocket-Key: {key}\r\n"
                              "Sec-WebSocket-Version: 13\r\n\r\n").encode())
        while b"\r\n\r\n" not in self._buffer:
            self._fill()
        head, self._buffer = self._buffer.split(b"\r\n\r\n", 1)
        status = head.split(b"\r\n", 1)[0]
        if b" 101" not in status:
            self.close()
            raise WebSocketClosed(f"{host}:{port}{path} did not accept a WebSocket: {status.decode(errors='replace')}")

    def __enter__(self) -> WebSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def receive(self, timeout: float) -> str | bytes | None:
        """The next message, text as str and binary as bytes; None if none is complete within `timeout` seconds.

        Answers pings meanwhile. Raises WebSocketClosed at the end of the connection.
        """
        self._socket.settimeout(timeout)
        try:
            return self._message()
        except TimeoutError:
            return None

    def _message(self) -> str | bytes:
        while True:
            frames, size = self._frames()  # the buffer keeps everything until a message is complete
            kind, parts = frames[0][0], b"".join(payload for _, payload in frames)
            self._buffer = self._buffer[size:]
            if kind == CLOSE:
                raise WebSocketClosed("the server closed the connection")
            if kind == PING:
                self._send(PONG, parts)
            elif kind == TEXT:
                return parts.decode()
            elif kind == BINARY:
                return parts

    def _frames(self) -> tuple[list[tuple[int, bytes]], int]:
        """One control frame, or all frames of one message, and their length in the buffer, in bytes."""
        frames: list[tuple[int, bytes]] = []
        position = 0
        while True:
            final, kind, payload, position = self._frame(position)
            if kind >= CLOSE and frames:  # a control frame may lie between the parts of a message
                if kind == CLOSE:
                    raise WebSocketClosed("the server closed the connection")
                if kind == PING:
                    self._send(PONG, payload)
                continue
            frames.append((kind, payload))
            if final:
                return frames, position

    def _frame(self, start: int) -> tuple[bool, int, bytes, int]:
        self._need(start + 2)
        first, second = self._buffer[start], self._buffer[start + 1]
        position, length = start + 2, second & 0x7F
        if length >= 126:
            width = 2 if length == 126 else 8
            self._need(position + width)
            length = int.from_bytes(self._buffer[position:position + width], "big")
            position += width
        self._need(position + length)
        return bool(first & 0x80), first & 0x0F, self._buffer[position:position + length], position + length

    def _need(self, size: int) -> None:
        while len(self._buffer) < size:
            self._fill()

    def _fill(self) -> None:
        chunk = self._socket.recv(65536)
        if not chunk:
            raise WebSocketClosed("the connection ended")
        self._buffer += chunk

    def _send(self, kind: int, payload: bytes) -> None:
        mask = os.urandom(4)  # RFC 6455: a client masks its frames
        masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(payload))
        self._socket.sendall(struct.pack("!BB", 0x80 | kind, 0x80 | len(payload)) + mask + masked)
