"""Claims of papers, tested on the labs over seeds: `python -m experiments`."""
