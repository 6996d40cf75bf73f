"""The `tokenry` command: thin, so that help is instant; whatever is heavy is imported inside the commands.

app          the command itself, and what becomes of errors
options      what several commands take
shared       what several commands do
comparing    compare, choose, results
generating   generate, methods
benches      bench
training     train
"""

from tokenry.cli import benches, comparing, generating, training
from tokenry.cli.app import app, main

__all__ = ["app", "benches", "comparing", "generating", "main", "training"]
