"""The `hfpatch` command. Nothing here takes time to import, so that Ctrl-C is quiet from the first moment on."""

from .interrupts import quiet_end


def main() -> None:
    """Entry point: bad input gives one sentence and exit code 2, Ctrl-C nothing and exit code 130."""
    with quiet_end():
        from .cli_app import run_command

        run_command()


if __name__ == "__main__":
    main()
