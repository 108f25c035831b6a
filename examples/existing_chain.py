"""A chain that you have, and the one line that puts a reranker into it."""

import re
from pathlib import Path
from zlib import crc32

from langchain_core.embeddings import Embeddings
from langchain_core.messages import AIMessage
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnableLambda, RunnablePassthrough
from langchain_core.vectorstores import InMemoryVectorStore
from langchain_text_splitters import RecursiveCharacterTextSplitter

from langchain_rerank import create_rerank_retriever

HANDBOOK = Path(__file__).parent / "data" / "handbook.md"
QUESTION = "Where do I leave the bike in the cold months?"


class WordEmbeddings(Embeddings):
    """Stands for your embedding model, so that this runs anywhere: it counts words."""

    def embed_query(self, text: str) -> list[float]:  # noqa: D102
        numbers = [crc32(word.encode()) % 512 for word in re.findall(r"\w+", text.lower())]
        return [float(numbers.count(place)) for place in range(512)]

    def embed_documents(self, texts: list[str]) -> list[list[float]]:  # noqa: D102
        return [self.embed_query(text) for text in texts]


# Stands for your chat model: it repeats the first passage that it is shown.
model = RunnableLambda(lambda prompt: AIMessage(prompt.to_string().split("\n---\n")[1]))
prompt = ChatPromptTemplate.from_template("Answer from these passages:\n---\n{context}\n---\n{question}")


def make_chain(retriever: BaseRetriever) -> Runnable[str, str]:
    context = retriever | (lambda documents: "\n---\n".join(document.page_content for document in documents))
    return {"context": context, "question": RunnablePassthrough()} | prompt | model | StrOutputParser()


splitter = RecursiveCharacterTextSplitter.from_language("markdown", chunk_size=400, chunk_overlap=0)
store = InMemoryVectorStore(WordEmbeddings())
store.add_documents(splitter.create_documents([HANDBOOK.read_text("utf-8")]))

retriever = store.as_retriever(search_kwargs={"k": 3})
print(f"Before:\n\n{make_chain(retriever).invoke(QUESTION)}\n")

retriever = create_rerank_retriever(store, "embedded", top_n=3)  # this is the line
print(f"After:\n\n{make_chain(retriever).invoke(QUESTION)}")
