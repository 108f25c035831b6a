"""What `create_qdrant_retriever` is made of; only `points` can be imported without qdrant-client."""
