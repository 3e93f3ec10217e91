"""What is learned: pretrained backbones, freezing, per-layer rates, heads. Keras and TensorFlow only."""


class GraftError(Exception):
    """The user's error: one message that says which item, what it was, what was expected, what to do.

    Commands print it without a traceback and exit with `exit_code`.
    """

    exit_code = 2
