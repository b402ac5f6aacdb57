"""Several prompts in a request: replies to each, as one. Choice `i * n + j` is choice j of prompt i."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import Any

Json = dict[str, Any]


async def together(replies: Sequence[Awaitable[Json]], n: int) -> Json:
    """The whole replies to all prompts as one, with `n` choices each. The first that fails ends all."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(_awaited(reply)) for reply in replies]
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
    contents = [task.result() for task in tasks]
    return {
        **contents[0],
        "choices": [choice for i, content in enumerate(contents) for choice in _choices(content, i, n)],
        "usage": _sum([content["usage"] for content in contents]),
        "farspan": [content["farspan"] for content in contents],
    }


async def interleaved(streams: Sequence[AsyncGenerator[Json, None]], n: int) -> AsyncGenerator[Json, None]:
    """The chunks of all prompts as they come, usage counted over all of them, in the last chunk once."""
    usages: dict[int, Json] = {}  # of each prompt so far
    last: Json = {}
    upcoming = {asyncio.ensure_future(anext(stream, None)): i for i, stream in enumerate(streams)}
    try:
        while upcoming:
            done, _ = await asyncio.wait(upcoming, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                chunk, i = task.result(), upcoming.pop(task)
                if chunk is None:
                    continue
                upcoming[asyncio.ensure_future(anext(streams[i], None))] = i
                if chunk.get("usage"):
                    usages[i] = chunk["usage"]
                    chunk |= {"usage": _sum(list(usages.values()))}
                if _is_total(chunk):
                    last = chunk
                    continue
                if progress := (chunk.get("farspan") or {}).get("progress"):
                    progress["prompt"] = i
                yield chunk | {"choices": _choices(chunk, i, n)}
        if last:
            yield last
    finally:
        for task in upcoming:
            task.cancel()
        await asyncio.gather(*upcoming, return_exceptions=True)
        for stream in streams:
            await stream.aclose()


async def _awaited(reply: Awaitable[Json]) -> Json:
    return await reply


def _choices(content: Json, prompt: int, n: int) -> list[Json]:
    return [choice | {"index": prompt * n + choice["index"]} for choice in content["choices"]]


def _is_total(chunk: Json) -> bool:
    """Is this a stream's last chunk, which has nothing but the usage?"""
    return not chunk["choices"] and bool(chunk.get("usage")) and "farspan" not in chunk


def _sum(usages: Sequence[Json]) -> Json:
    """All counts added up, those within counts, too."""
    return {
        name: _sum([usage[name] for usage in usages])
        if isinstance(value, dict)
        else sum(usage[name] for usage in usages)
        for name, value in usages[0].items()
    }
