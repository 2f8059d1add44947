"""A run as a whole: its data, configuration checks, log, lock, and the signals that end it."""
