"""Tasks: templates, in TOML files, that turn a source text into a prompt and define where the answer ends."""

from data_owner_client.data.tasks.kinds import Kind
from data_owner_client.data.tasks.loading import builtin_tasks, load_task
from data_owner_client.data.tasks.task import Shot, Task

__all__ = ["Kind", "Shot", "Task", "builtin_tasks", "load_task"]
