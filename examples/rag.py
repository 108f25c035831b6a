"""Ask a text file: recall 10 passages, keep the best 3, answer from them. With and without reranking.

python examples/rag.py
python examples/rag.py --file notes.md --question "Who pays?" --model openai:gpt-5.5
"""

import argparse
import sys
import time
from pathlib import Path
from textwrap import shorten

from langchain_core.language_models import BaseChatModel
from langchain_core.messages.utils import count_tokens_approximately
from langchain_text_splitters import RecursiveCharacterTextSplitter

from langchain_rerank import create_qdrant_retriever, create_rerank_retriever, init_reranker

parser = argparse.ArgumentParser(description="Ask a text file, with and without reranking.")
parser.add_argument("--file", type=Path, default=Path(__file__).parent / "data" / "handbook.md", help="the text to ask")
parser.add_argument("--question", default="How do I turn on the lights?")
parser.add_argument("--embedding", help="as init_embeddings takes it; without one, BM25 recalls")
parser.add_argument("--reranker", default="embedded", help="as init_reranker takes it")
parser.add_argument("--model", help="as init_chat_model takes it; without one, nothing is answered")


def main(file: Path, question: str, embedding: str | None, reranker: str, model: str | None) -> None:
    chat = chat_model(model) if model else None
    splitter = RecursiveCharacterTextSplitter.from_language("markdown", chunk_size=400, chunk_overlap=0)
    passages = splitter.create_documents([file.read_text("utf-8")])

    recall = create_qdrant_retriever(passages, embedding=embedding, k=10)  # in memory
    ranker = init_reranker(reranker, top_n=3)
    ranker.backend.warmup()  # loads the model now, so that the seconds below are those of one question
    retriever = create_rerank_retriever(recall, ranker)

    print(question)
    for name, stage in (("Without reranking", recall), ("With reranking", retriever)):
        started = time.perf_counter()
        documents = stage.invoke(question)
        seconds = time.perf_counter() - started
        context = "\n\n".join(document.page_content for document in documents)
        tokens = count_tokens_approximately([context])
        print(f"\n{name}: {len(documents)} passages, about {tokens} tokens, {seconds:.3f} seconds")
        print(*(f"  {shorten(document.page_content, 100, placeholder=' ...')}" for document in documents), sep="\n")
        if chat:
            print("Answer:", chat.invoke(f"Answer from these passages:\n\n{context}\n\nQuestion: {question}").text)
    if not chat:
        print("\nNo answer: give a chat model, such as --model openai:gpt-5.5 (pip install langchain-openai).")


def chat_model(name: str) -> BaseChatModel:
    try:
        from langchain.chat_models import init_chat_model
    except ImportError:  # langchain-classic, which langchain-rerank brings, has the same
        from langchain_classic.chat_models import init_chat_model
    return init_chat_model(name)


if __name__ == "__main__":
    try:
        main(**vars(parser.parse_args()))
    except (ImportError, OSError, ValueError) as error:  # a provider, a file or a name that is not there
        sys.exit(f"rag.py: {error}")
