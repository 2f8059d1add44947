"""The `opd` command, and `python -m opd_lightning`.

Worker processes import the main script again: nothing heavy may be imported at its top.
"""


def main() -> None:
    from opd_lightning.cli import main as run

    run()


if __name__ == "__main__":
    main()
