"""Plans for 1, 8 and 64 GPUs: the tables of docs/scaling.md.

Memory and traffic are those that `opd check` predicts (`opd_lightning.preflight`), of models that
exist as shapes alone. Seconds are arithmetic on the assumptions in `speeds.py`.

Run: python -m benchmarks.scaling
"""

from benchmarks.scaling.tables import TABLES

for name, make in TABLES.items():
    print(f"<!-- benchmarks/scaling: {name} -->\n{make()}\n")
