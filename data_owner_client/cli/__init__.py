"""The command `pema-client`: arguments in, functions of the library called, results out."""

# Each module registers its commands.
from data_owner_client.cli import connection, data_check, evaluation, gateway, generation, training
from data_owner_client.cli.app import app, main, run

__all__ = ["app", "connection", "data_check", "evaluation", "gateway", "generation", "main", "run", "training"]
