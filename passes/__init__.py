"""Graph rewrites, one per file. `tfmq_fx.api` calls them by name, in order."""

if __name__ != "tfmq_fx.passes":
    raise ImportError("import this package as tfmq_fx.passes, not as passes")
