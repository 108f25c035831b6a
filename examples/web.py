"""A search page's server in Starlette: requests are awaited, and the event loop stays free while a model computes.

python examples/web.py                                asks itself two questions at once
uvicorn --app-dir examples web:app                    serves http://127.0.0.1:8000/search?q=...
(pip install starlette httpx uvicorn)
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from langchain_rerank import RerankError, create_qdrant_retriever, create_rerank_retriever, init_reranker

HANDBOOK = Path(__file__).parent / "data" / "handbook.md"


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    reranker = init_reranker("embedded", top_n=2)
    await asyncio.to_thread(reranker.warmup)  # the model is loaded before the first user comes
    with create_qdrant_retriever(HANDBOOK.read_text("utf-8").split("\n\n## ")) as recall:
        app.state.retriever = create_rerank_retriever(recall, reranker)
        yield


async def search(request: Request) -> JSONResponse:
    question = request.query_params.get("q", "").strip()
    if not question:
        return JSONResponse({"error": "Ask something: /search?q=..."}, status_code=400)
    found = await request.app.state.retriever.ainvoke(question)
    return JSONResponse([{"score": d.metadata["relevance_score"], "text": d.page_content} for d in found])


async def unavailable(_: Request, error: Exception) -> JSONResponse:
    return JSONResponse({"error": f"No answer at the moment ({type(error).__name__})"}, status_code=503)


app = Starlette(routes=[Route("/search", search)], lifespan=lifespan, exception_handlers={RerankError: unavailable})


async def main(*questions: str) -> None:
    transport = httpx.ASGITransport(app)  # no port: straight into the app
    async with lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://app") as client:
        answers = await asyncio.gather(*(client.get("/search", params={"q": question}) for question in questions))
    for question, answer in zip(questions, answers, strict=True):
        best = answer.json()[0]
        title, _, _ = best["text"].partition("\n")
        print(f"{question}\n{best['score']:.3f}  {title}\n")


if __name__ == "__main__":
    asyncio.run(main("How do I turn on the lights?", "I lost my key. What now?"))
