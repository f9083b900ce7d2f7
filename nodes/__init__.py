"""What a user sees: thin shells, one list of nodes each."""
from . import attention, classifiers, relations, steering, toyworld, training
from .classifiers import register_model_folders

NODES = [*relations.NODES, *classifiers.NODES, *steering.NODES, *attention.NODES, *training.NODES,
         *toyworld.NODES]

__all__ = ["NODES", "register_model_folders"]
