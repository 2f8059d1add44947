"""Hugging Face models: folders, tokenizers, weights, heads, and the student."""
