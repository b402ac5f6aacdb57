"""Child: one engine process and the socket to it, from its start to its end."""

import asyncio
import os
import subprocess
import sys

import zmq
import zmq.asyncio

from configs.schema import ServeConfig
from engine.errors import EngineDead
from engine.messages import FromEngine, ToEngine, decode_from_engine, encode

# How the engine's threads wait, unless the environment says otherwise. Idle ones must not take cores from the
# server, so they sleep; but first they spin for as long as Python takes from one layer's kernel to the next:
# waking takes longer than many kernels of a decode step do.
WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "10000"}


class Child:
    """Has a socket of its own: what a dead process said and nobody has heard yet is never heard."""

    def __init__(self, config: ServeConfig, context: zmq.asyncio.Context, address: str) -> None:
        """Raises OSError if no process can be started."""
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # the engine reads between steps: a long step must not block senders
        self._socket.bind(address)
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "engine.process", address],
                stdin=subprocess.PIPE,
                env={**WAITING, **os.environ},
            )
            assert self._process.stdin is not None
            with self._process.stdin as stdin:
                stdin.write(config.model_dump_json().encode())
        except OSError:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    async def send(self, message: ToEngine) -> None:
        """Raises EngineDead if there is no one at the other end."""
        try:
            await self._socket.send(encode(message), zmq.NOBLOCK)
        except zmq.Again as error:  # no queue is ever full
            raise EngineDead("the engine process has gone") from error

    async def hear(self) -> FromEngine:
        """The next that it says."""
        said: FromEngine = decode_from_engine(await self._socket.recv())
        return said

    async def ended(self) -> int:
        """Wait for its end, however it ends: the exit code, or minus the number of a signal."""
        return await asyncio.to_thread(self._process.wait)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()

    def close(self) -> None:
        """Hear nothing more."""
        self._socket.close(linger=0)
