"""Clients of a server that measure what they get. A process of their own: `benchmarks/serving.py`.

Reads from stdin a list of bodies of `/v1/completions` for each client, which asks with them
one after the other. Writes for each answer its tokens, and when they came.
"""

import asyncio
import json
import sys
import time

import httpx


async def ask(client: httpx.AsyncClient, body: dict) -> dict:
    """The times of the pieces of one answer, in seconds from its request, and its tokens."""
    begun = time.perf_counter()
    times, usage = [], None
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line.removeprefix("data: "))
                usage = event.get("usage") or usage
                if event["choices"] and event["choices"][0]["text"]:
                    times.append(time.perf_counter() - begun)
    return {"begun": begun, "times": times, "usage": usage}


async def ask_all(address: str, clients: list[list[dict]]) -> list[list[dict]]:
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=httpx.Limits()) as client:
        # The first request of a process imports half of httpx: no time of a server's.
        await client.get("/health")

        async def one(bodies):
            found = []
            for body in bodies:
                await asyncio.sleep(body.pop("after", 0))
                found.append(await ask(client, body))
            return found

        return await asyncio.gather(*map(one, clients))


if __name__ == "__main__":
    print(json.dumps(asyncio.run(ask_all(sys.argv[1], json.load(sys.stdin)))))
