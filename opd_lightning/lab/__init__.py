"""Tiny worlds made on the spot: data, tokenizer and models that train in minutes on two cores."""
