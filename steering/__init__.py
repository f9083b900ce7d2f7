"""The method on plain tensors: attention maps, loss, update rule, report. No host."""
