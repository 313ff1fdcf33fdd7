"""The training program of a host: the verbs, the step, the loss, the optimizer, the batches."""
