"""Prompt files, the responses written to them, and the micro-batches made of both."""
