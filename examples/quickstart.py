"""The shortest useful program: documents in, the best two out. Nothing is downloaded."""

from langchain_core.documents import Document

from langchain_rerank import init_reranker

documents = [
    Document(page_content="Jupiter is the largest planet of the solar system.", metadata={"page": 5}),
    Document(page_content="The rings of Saturn are made of ice and rock.", metadata={"page": 6}),
    Document(page_content="Mars is called the red planet, because its dust is full of rust.", metadata={"page": 4}),
    Document(page_content="A red dwarf is a small star that burns slowly.", metadata={"page": 9}),
]

reranker = init_reranker("embedded", top_n=2)

for document in reranker.compress_documents(documents, "Which planet is called the red planet?"):
    print(f"{document.metadata['relevance_score']:.3f}  page {document.metadata['page']}: {document.page_content}")
