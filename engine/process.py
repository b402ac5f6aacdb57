"""The engine's own process: `python -m engine.process ADDRESS`, with the configuration as JSON on standard
input."""

import os
import signal
import sys

import zmq

from configs.errors import ConfigError
from configs.logs import configure_logs
from configs.schema import ServeConfig
from engine.engine import Engine
from engine.messages import (
    Abort,
    ClearCache,
    FromEngine,
    Loading,
    Ready,
    Refused,
    Resolved,
    Shutdown,
    Submit,
    decode_to_engine,
    encode,
)
from engine.startup import load, resolve

IDLE_SECONDS = 1.0  # how often an idle engine looks whether its parent still lives


def main() -> None:
    """Resolve, load, then serve until told to stop or orphaned. Exit code 2: the configuration was
    refused."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the server tells us when to go
    config = ServeConfig.model_validate_json(sys.stdin.read())
    configure_logs(config.server.log_format, "engine")
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.set_hwm(0)  # nothing is lost, and no step waits, while the server is busy
    socket.linger = 2000  # milliseconds for the last words to leave
    socket.connect(sys.argv[1])
    try:
        resolution = resolve(config)
        _send(socket, Resolved(resolution.card))
        engine, card = load(resolution, lambda phase, done: _send(socket, Loading(phase, done)))
        _send(socket, Ready(card))
        serve(engine, socket)
    except ConfigError as error:
        _send(socket, Refused(str(error)))
        sys.exit(2)
    finally:
        socket.close()
        context.term()


def serve(engine: Engine, socket: "zmq.Socket[bytes]") -> None:
    """The loop: hear everything that was said, make one step, tell what it brought."""
    parent = os.getppid()
    while os.getppid() == parent:
        wait = 0 if engine.has_work else int(IDLE_SECONDS * 1000)
        while socket.poll(wait):
            wait = 0
            match decode_to_engine(socket.recv()):
                case Submit() as request:
                    engine.submit(request)
                case Abort(request_id=request_id, choice=choice):
                    engine.abort(request_id, choice)
                case ClearCache():
                    _send(socket, engine.clear_cache())
                case Shutdown():
                    return
        if engine.has_work:
            _send(socket, engine.step())


def _send(socket: "zmq.Socket[bytes]", message: FromEngine) -> None:
    socket.send(encode(message))


if __name__ == "__main__":
    main()
