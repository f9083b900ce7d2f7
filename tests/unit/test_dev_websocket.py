"""The WebSocket reader with bytes written by RFC 6455."""
from __future__ import annotations

import socket
import struct
import threading

import pytest

from dev.websocket import WebSocket, WebSocketClosed

ACCEPT = b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"


def frame(kind: int, payload: bytes, final: bool = True) -> bytes:
    head = bytes([(0x80 if final else 0) | kind])
    if len(payload) < 126:
        return head + bytes([len(payload)]) + payload
    if len(payload) < 65536:
        return head + b"\x7e" + struct.pack("!H", len(payload)) + payload
    return head + b"\x7f" + struct.pack("!Q", len(payload)) + payload


@pytest.fixture
def connect():
    """connect(bytes the server sends after its greeting) -> (client, list that gets what the client sent)."""
    opened = []

    def start(*chunks: bytes, greeting: bytes = ACCEPT):
        listener = socket.create_server(("127.0.0.1", 0))
        received: list[bytes] = []

        def serve() -> None:
            with listener, listener.accept()[0] as peer:
                while b"\r\n\r\n" not in peer.recv(4096):
                    pass
                peer.sendall(greeting)
                for chunk in chunks:
                    peer.sendall(chunk)
                while data := peer.recv(4096):
                    received.append(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        client = WebSocket("127.0.0.1", listener.getsockname()[1], "/ws")
        opened.append((client, thread))
        return client, received, thread

    yield start
    for client, thread in opened:
        client.close()
        thread.join(5)


@pytest.mark.parametrize("size", [0, 5, 125, 126, 65535, 65536, 300_000])
def test_text_and_binary_of_every_length_form(connect, size):
    client, _, _ = connect(frame(1, b"x" * size) + frame(2, b"\x00" * size))
    assert client.receive(5) == "x" * size
    assert client.receive(5) == b"\x00" * size


def test_parts_with_a_ping_between(connect):
    client, received, thread = connect(frame(1, "grü".encode(), final=False), frame(9, b"hello"),
                                       frame(0, "ße".encode()))
    assert client.receive(5) == "grüße"
    client.close()
    thread.join(5)
    answer = b"".join(received)
    mask = answer[2:6]
    assert answer[:2] == b"\x8a\x85" and bytes(b ^ mask[i % 4] for i, b in enumerate(answer[6:])) == b"hello"


def test_message_that_comes_in_pieces_is_not_lost(connect):
    whole = frame(1, b"slowly")
    client, _, _ = connect(whole[:4])
    assert client.receive(0.1) is None
    client._buffer += whole[4:]  # what the next packet would bring
    assert client.receive(0.1) == "slowly"


def test_close(connect):
    client, _, _ = connect(frame(1, b"last") + frame(8, b""))
    assert client.receive(5) == "last"
    with pytest.raises(WebSocketClosed):
        client.receive(5)


def test_refusal(connect):
    with pytest.raises(WebSocketClosed, match="404"):
        connect(greeting=b"HTTP/1.1 404 Not Found\r\n\r\n")
