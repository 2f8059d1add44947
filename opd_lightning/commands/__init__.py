"""The commands of `opd` on Lightning's Trainer."""
