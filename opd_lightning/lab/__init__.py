"""Synthetic labs: data, tokenizer and tiny models that train in minutes on two cores."""
