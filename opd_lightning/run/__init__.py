"""A run as a whole: its data, its configuration, its log and the signals that end it."""
