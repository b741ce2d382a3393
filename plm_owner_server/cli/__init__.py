"""The command `pema-server`."""


def main() -> None:
    """Entry point of `pema-server`."""
    from plm_owner_server.cli.app import run

    run()
