"""From pictures to a relation classifier: `python -m training build` makes a dataset, `train` trains.

`sources` and `gqa` read labelled pictures; `small_world` draws or generates its own. `inversion` turns a picture into
attention maps, and `dataset` stores them on disk. `trainer` trains the classifier, and `evaluation` measures it.
"""
