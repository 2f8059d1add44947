"""Models behind HTTP: vLLM servers, and how to ask them."""
