"""The tasks of lctrain-eval, one file each: see `lctrain.eval.task`."""
