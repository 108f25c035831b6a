"""The same program with another reranker: only the YAML file changes.

python examples/swap.py
python examples/swap.py examples/config/bge.yaml
"""

import sys
from pathlib import Path

from langchain_core.documents import Document

from langchain_rerank import init_reranker

TEXTS = [
    "Jupiter is the largest planet of the solar system.",
    "A red dwarf is a small star that burns slowly.",
    "Mars is called the red planet, because its dust is full of rust.",
]
QUESTION = "Which planet is called the red planet?"

config = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "config" / "embedded.yaml"

reranker = init_reranker(config)
ranked = reranker.compress_documents([Document(page_content=text) for text in TEXTS], QUESTION)

print(f"{config.name}: {reranker.backend.name} {reranker.backend.model}".rstrip())
for document in ranked:
    print(f"{document.metadata['relevance_score']:.3f}  {document.page_content}")
