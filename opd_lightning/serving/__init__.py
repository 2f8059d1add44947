"""vLLM servers behind HTTP, and their clients."""
