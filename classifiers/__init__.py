"""Relation classifiers: (subject maps, object maps, step progress) -> logits over named spatial relations.

Plain torch, no host. `base` holds the contract, `geometric` the classifier without a network, `network` and `learned` the
trained one, `checkpoint` their files, `steps` the step mapping, `convert` the command line.
"""
