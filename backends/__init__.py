"""Lowerings, one per file."""

if __name__ != "tfmq_fx.backends":
    raise ImportError("import this package as tfmq_fx.backends, not as backends")
