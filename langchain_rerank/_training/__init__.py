"""Parts of `langchain_rerank.training`."""

NEEDED = (
    "torch",
    "transformers",
    "sentence_transformers",
    "datasets",
    "accelerate",
    "onnx",
    "onnxscript",
    "langchain_qdrant",
    "qdrant_client",
    "Stemmer",
    "ir_measures",
)
"""The modules that the extra `train` brings."""
