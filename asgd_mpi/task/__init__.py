"""What is trained: images by their classes, or a user's own task; opened from a configuration, the same on every rank."""

from asgd_mpi.task.base import Task
from asgd_mpi.task.images import open_split
from asgd_mpi.task.opened import OpenedTask
from asgd_mpi.task.opening import complete, for_workers, open_task, told

__all__ = ["OpenedTask", "Task", "complete", "for_workers", "open_split", "open_task", "told"]
