"""What `create_qdrant_retriever` is made of; only `points` and `indexes` can be imported without qdrant-client."""
