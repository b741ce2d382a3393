"""The external memory E = {(f(c_i), y_i)}: on disk (`store`) and how it is built (`build`)."""

from data_owner_client.memory.build import build_memory
from data_owner_client.memory.store import ExternalMemory, MemoryRows

__all__ = ["ExternalMemory", "MemoryRows", "build_memory"]
