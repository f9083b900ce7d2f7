"""Relation classifiers: (subject maps, object maps, step progress) -> logits over named spatial relations.

Plain torch, no host. `base` holds the contract, `geometric` the classifier without weights, `network` and
`learned` the trained one, `checkpoint` its files, `steps` the step mapping, `convert` the command line.
"""
