"""From pictures to a relation classifier: `python -m training build` makes a dataset, `train` trains.

`sources` and `gqa` say which pictures, `small_world` draws its own; `inversion` turns a picture into attention maps,
`dataset` keeps them on disk, `trainer` and `evaluation` make the classifier of them.
"""
