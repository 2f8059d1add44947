"""The numbers that `opd check` looks at: tokens, agreement of engine and trainer, memory, cost."""
