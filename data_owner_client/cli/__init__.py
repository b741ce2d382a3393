"""The command `pema-client`: arguments in, `verbs` called, results out."""

# Each registers its commands, which `--help` lists in this order.
from data_owner_client.cli import connection, evaluation, generation, training
from data_owner_client.cli.app import app

__all__ = ["app", "connection", "evaluation", "generation", "main", "training"]


def main() -> None:
    """Entry point of `pema-client`."""
    app()
